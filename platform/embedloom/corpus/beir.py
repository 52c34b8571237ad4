"""Reader of BEIR folders: ``corpus.jsonl``, and the judged train queries as natural pairs.

Dev and test judgements are left alone: they are the benchmark's own measure.
"""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from embedloom.config.data import CorpusSource
from embedloom.corpus.columns import rows_of
from embedloom.corpus.rows import SourceRow
from embedloom.errors import DataError
from embedloom.formats import json_lines
from embedloom.instructions import DEFAULT_INSTRUCTIONS

_CORPUS, _QUERIES, _JUDGEMENTS = "corpus.jsonl", "queries.jsonl", Path("qrels", "train.tsv")


def read_beir(source: CorpusSource) -> Iterator[SourceRow]:
    """Rows with the benchmark's own ids; a row carries the train queries whose best document it is.

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
    for row in rows_of(columns, _records(corpus), str(corpus), source.name or str(corpus)):
        yield replace(row, queries=queries.get(row.id, ()), instruction=DEFAULT_INSTRUCTIONS["retrieval"])


def _records(corpus: Path) -> Iterator[dict[str, object]]:
    for number, record in json_lines(corpus):
        missing = [key for key in ("_id", "text") if key not in record]
        if missing:
            raise DataError(f"{corpus}: line {number} has no key {missing[0]!r}; keys found: {list(record)}")
        yield {"title": None, **record}


def _train_queries(root: Path) -> dict[str, tuple[str, ...]]:
    """Document id → its judged queries; a query goes to its best document, of equals the first by id."""
    if not (root / _QUERIES).is_file() or not (root / _JUDGEMENTS).is_file():
        return {}
    best: dict[str, tuple[float, str]] = {}
    for query_id, document_id, score in _judgements(root / _JUDGEMENTS):
        rank = (-score, document_id)
        if score > 0 and rank < best.get(query_id, (0.0, "")):
            best[query_id] = rank
    texts: dict[str, list[str]] = {}
    for number, record in json_lines(root / _QUERIES):
        if not isinstance(record.get("text"), str) or "_id" not in record:
            place = f"{root / _QUERIES}: line {number}"
            raise DataError(f"{place} needs the keys '_id' and 'text', keys found: {list(record)}")
        if str(record["_id"]) in best:
            texts.setdefault(best[str(record["_id"])][1], []).append(record["text"])
    return {document_id: tuple(found) for document_id, found in texts.items()}


def _judgements(path: Path) -> Iterator[tuple[str, str, float]]:
    with path.open(encoding="utf-8", newline="") as stream:
        for number, fields in enumerate(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            try:
                query_id, document_id, score = fields
                yield query_id, document_id, float(score)
            except ValueError as error:
                if number > 1:  # the first line may be a header
                    expected = "query-id, corpus-id and a number"
                    raise DataError(f"{path}: line {number} is {fields}; expected {expected}") from error
