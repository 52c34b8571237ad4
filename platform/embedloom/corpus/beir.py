"""Reader of BEIR folders: ``corpus.jsonl``, and the judged train queries as natural pairs.

Dev and test judgements are left alone: they are the benchmark's own measure.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from embedloom.config.data import CorpusSource
from embedloom.corpus.columns import rows_of
from embedloom.corpus.rows import SourceRow
from embedloom.errors import DataError
from embedloom.formats import beir_entries, judgements
from embedloom.instructions import DEFAULT_INSTRUCTIONS

_CORPUS, _QUERIES, _JUDGEMENTS = "corpus.jsonl", "queries.jsonl", Path("qrels", "train.tsv")


def read_beir(source: CorpusSource) -> Iterator[SourceRow]:
    """Rows with the benchmark's own ids; a row carries every train query that it was judged relevant to.

    Raises:
        DataError: no ``corpus.jsonl``, or a line of one of the files that does not fit.
    """
    root = Path(source.path or "").expanduser()
    corpus = root / _CORPUS
    if not corpus.is_file():
        found = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else "no such folder"
        raise DataError(f"corpus.sources: {source.path!r} (beir) has no {_CORPUS}; found: {found}")
    queries = _train_queries(root)
    columns = source.model_copy(update={"text_column": "text", "title_column": "title", "id_column": "_id"})
    records = ({"_id": key, "title": title, "text": text} for key, title, text in beir_entries(corpus))
    for row in rows_of(columns, records, str(corpus), source.name or str(corpus)):
        own = queries.get(row.id, [])
        yield replace(
            row,
            queries=tuple(text for text, _ in own),
            grades=tuple(grade for _, grade in own),
            instruction=DEFAULT_INSTRUCTIONS["retrieval"],
        )


def _train_queries(root: Path) -> dict[str, list[tuple[str, float]]]:
    """Document id → text of every query it is judged relevant to (above 0), and the grade."""
    if not (root / _QUERIES).is_file() or not (root / _JUDGEMENTS).is_file():
        return {}
    judged: dict[str, dict[str, float]] = {}
    for query_id, document_id, score in judgements(root / _JUDGEMENTS):
        if score > 0:
            judged.setdefault(query_id, {})[document_id] = score
    found: dict[str, list[tuple[str, float]]] = {}
    for query_id, _, text in beir_entries(root / _QUERIES):
        for document_id, grade in judged.get(query_id, {}).items():
            found.setdefault(document_id, []).append((text, grade))
    return found
