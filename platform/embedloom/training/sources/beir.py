"""Reader of the train judgements of a BEIR folder."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.formats import beir_entries, judgements
from embedloom.instructions import document_text
from embedloom.training.sources.example import SourceExample, bad_row, plain_example
from embedloom.training.sources.texts import TextTable


def read_beir(source: TrainingSource, scratch: Path) -> Iterator[SourceExample]:
    """One example a query: its best document (of equals the first by id), and those judged 0 as negatives.

    Its other relevant documents are right answers too, which no row of the query may have as negatives.
    Only ``qrels/train.tsv`` is read: dev and test are the benchmark's own measure.

    Raises:
        DataError: a file that is missing or does not fit.
    """
    root = Path(source.path or "").expanduser()
    files = [root / "corpus.jsonl", root / "queries.jsonl", root / "qrels" / "train.tsv"]
    for path in files:
        if not path.is_file():
            raise DataError(f"source {source.name!r}: {path} is missing; a beir source needs it")
    documents = ((key, document_text(title, text)) for key, title, text in beir_entries(files[0]))
    texts = TextTable.build(scratch / "corpus", documents)
    judged, asked = _judgements(files[2]), set[str]()
    for query_id, _, query in beir_entries(files[1]):
        if query_id not in judged:
            continue
        asked.add(query_id)
        ranked = sorted(judged[query_id], key=lambda entry: (-entry[1], entry[0]))
        positives = [key for key, score in ranked if score > 0]
        found = [texts.get(key) for key in (*positives[:1], *(key for key, score in ranked if score <= 0))]
        if None in found:
            yield bad_row(query_id, "unknown_document", "a judged document is not in corpus.jsonl")
            continue
        split = 1 if positives else 0
        others = (texts.get(key) for key in positives[1:])
        yield plain_example(
            source, query_id, query, found[0] if split else None, found[split:], others=others
        )
    for query_id in judged:
        if query_id not in asked:
            yield bad_row(query_id, "unknown_query", "a judged query is not in queries.jsonl")


def _judgements(path: Path) -> dict[str, list[tuple[str, float]]]:
    judged: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for query_id, document_id, score in judgements(path):
        judged[query_id].append((document_id, score))
    return judged
