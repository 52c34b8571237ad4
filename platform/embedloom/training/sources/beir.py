"""Reader of the train judgements of a BEIR folder."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.formats import json_lines, judgements
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
    texts = TextTable.build(scratch / "corpus", _documents(files[0]))
    judged = _judgements(files[2])
    for number, record in json_lines(files[1]):
        if "_id" not in record or "text" not in record:
            raise DataError(f"{files[1]}: line {number} needs '_id' and 'text', found {list(record)}")
        query_id = str(record["_id"])
        if query_id not in judged:
            continue
        ranked = sorted(judged[query_id], key=lambda entry: (-entry[1], entry[0]))
        positives = [key for key, score in ranked if score > 0]
        found = [texts.get(key) for key in (*positives[:1], *(key for key, score in ranked if score <= 0))]
        if None in found:
            yield bad_row(query_id, "unknown_document", "a judged document is not in corpus.jsonl")
            continue
        split = 1 if positives else 0
        others = (texts.get(key) for key in positives[1:])
        yield plain_example(
            source, query_id, record["text"], found[0] if split else None, found[split:], others=others
        )


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    for number, record in json_lines(path):
        if "_id" not in record or "text" not in record:
            raise DataError(f"{path}: line {number} needs '_id' and 'text', found {list(record)}")
        yield str(record["_id"]), document_text(record.get("title"), record["text"])


def _judgements(path: Path) -> dict[str, list[tuple[str, float]]]:
    judged: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for query_id, document_id, score in judgements(path):
        judged[query_id].append((document_id, score))
    return judged
