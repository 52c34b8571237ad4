"""Reader of BEIR folders: ``corpus.jsonl``, and the judged train queries as natural pairs.

Dev and test judgements are left alone: they are the benchmark's own measure.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from embedloom.config.data import CorpusSource
from embedloom.corpus.columns import rows_of
from embedloom.corpus.rejects import Rejects
from embedloom.corpus.rows import SourceRow
from embedloom.errors import DataError
from embedloom.formats import beir_entries, judgements
from embedloom.instructions import DEFAULT_INSTRUCTIONS

_CORPUS, _QUERIES, _JUDGEMENTS = "corpus.jsonl", "queries.jsonl", Path("qrels", "train.tsv")


def read_beir(source: CorpusSource, rejects: Rejects | None = None) -> Iterator[SourceRow]:
    """Rows with the benchmark's own ids; a row carries every train query that it was judged relevant to.

    Args:
        source: its section.
        rejects: takes note of judgements whose query or document is not there; of documents only where all are read.

    Raises:
        DataError: no ``corpus.jsonl``, or a line of one of the files that does not fit.
    """
    root = Path(source.path or "").expanduser()
    corpus = root / _CORPUS
    if not corpus.is_file():
        found = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else "no such folder"
        raise DataError(f"corpus.sources: {source.path!r} (beir) has no {_CORPUS}; found: {found}")
    rejects = Rejects() if rejects is None else rejects
    judged = _relevant(root, rejects)
    missing = dict.fromkeys(judged)
    columns = source.model_copy(update={"text_column": "text", "title_column": "title", "id_column": "_id"})
    records = ({"_id": key, "title": title, "text": text} for key, title, text in beir_entries(corpus))
    for row in rows_of(columns, records, str(corpus), source.name or str(corpus)):
        own = judged.get(row.id, [])
        missing.pop(row.id, None)
        yield replace(
            row,
            queries=tuple(text for text, _ in own),
            grades=tuple(grade for _, grade in own),
            instruction=DEFAULT_INSTRUCTIONS["retrieval"],
        )
    for document_id in missing:
        asked = len(judged[document_id])
        rejects.add(
            document_id, "judged_document_missing", f"not in {_CORPUS}; answers {asked} train queries"
        )


def _relevant(root: Path, rejects: Rejects) -> dict[str, list[tuple[str, float]]]:
    """Document id → text of every train query it is judged relevant to (above 0), and the grade."""
    if not (root / _QUERIES).is_file() or not (root / _JUDGEMENTS).is_file():
        return {}
    judged: dict[str, dict[str, float]] = {}
    for query_id, document_id, score in judgements(root / _JUDGEMENTS):
        if score > 0:
            judged.setdefault(query_id, {})[document_id] = score
    found: dict[str, list[tuple[str, float]]] = {}
    known: set[str] = set()
    for query_id, _, text in beir_entries(root / _QUERIES):
        known.add(query_id)
        for document_id, grade in judged.get(query_id, {}).items():
            found.setdefault(document_id, []).append((text, grade))
    for query_id in judged:
        if query_id not in known:
            rejects.add(query_id, "judged_query_missing", f"{_JUDGEMENTS}: not in {_QUERIES}")
    return found
