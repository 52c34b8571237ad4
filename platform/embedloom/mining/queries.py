"""Gathering the pairs of all artefacts into one table of queries to mine, in parts of one collection each.

A collection is what a query's negatives are searched in: ``corpus``, or, for texts that stand opposite each other
(STS, bitext) and come with the pairs, the other texts of the same dataset and task type.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.artefacts import Artefact
from embedloom.engines.shards import PART_PATTERN
from embedloom.errors import DataError
from embedloom.instructions import SYMMETRIC_TASK_TYPES, check_task_type
from embedloom.mining.documents import text_digest
from embedloom.mining.given import CORPUS, LABEL_TASK_TYPES, GivenTexts, wrong_labels
from embedloom.records import check_table, content_id, table_from_rows
from embedloom.storage import Place

QUERIES_FOLDER = "queries"
REJECTS_FOLDER = "rejects"
COUNTS_FILE = "queries.json"  # written last: the queries are all there
# Negatives of these come from the dataset's own texts where the corpus does not hold them (recipe of the paper, §3.2).
_PAIRED_TASK_TYPES = ("sts", "bitext", "pair_classification", "clustering")

_TEXTS = pa.list_(pa.string())
QUERY_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("instruction", pa.string()),
        ("part", pa.string()),  # name of this row's file, which its vectors and results share
        ("collection", pa.string()),
        ("document_id", pa.string()),  # of the positive in its collection
        ("known_positives", _TEXTS),  # document ids of every pair with this query text, this one included
        ("positive", pa.string()),  # given with the pair; null if the corpus has document_id
        ("negatives", _TEXTS),  # given with the pair, or wrong labels; replace mined ones
        ("task_type", pa.string()),
        ("dataset", pa.string()),
    ]
)
_Source = tuple[Place, str]


def pair_files(corpus: Artefact, others: list[Artefact]) -> list[_Source]:
    """(place, file) of every pairs file to mine: the corpus's training pairs, then each further artefact's.

    Raises:
        DataError: no pairs anywhere.
    """
    folders = [(corpus.place, "pairs/train"), *((artefact.place, "pairs") for artefact in others)]
    files = [(place, name) for place, folder in folders for name in place.names(folder, ".parquet")]
    if not files:
        raise DataError(
            f"mining: no pairs in {' or '.join(f'{place.uri}/{folder}' for place, folder in folders)}"
        )
    return files


def write_queries(files: list[_Source], corpus: _Source, out: Place, shard_rows: int) -> dict[str, Any]:
    """Write ``queries/``, the texts that come with pairs (``given/<collection>/``) and ``rejects/``, once.

    Args:
        files: pairs files in order; all rows of one, then the next.
        corpus: place and folder of the documents.
        out: the artefact's place.
        shard_rows: rows per part.

    Returns:
        ``{"rows", "pairs": {origin: n}, "rejects": {reason: n}, "parts": {collection: [names]}, "given": [collections]}``.

    Raises:
        DataError: a pair id twice, an unknown task type, or no row at all.
    """
    if out.exists(COUNTS_FILE):
        return out.read_json(COUNTS_FILE)
    _check_ids(files)
    writer = _Writer(files, corpus, out, shard_rows)
    for table in _in_parts(files, shard_rows):
        writer.add(table.to_pylist())
    counts = writer.finish()
    if not counts["rows"]:
        raise DataError(
            f"mining: no usable pair in {files[0][0].uri}/{files[0][1]} or the {len(files) - 1} files after it; rejects: {counts['rejects']}"
        )
    out.write_json(COUNTS_FILE, counts)
    return counts


def inline_id(text: str, task_type: str, instruction: str) -> str:
    """Id of a text that comes with a pair; the instruction belongs to it where documents carry one."""
    return content_id("inline", text, task_type, instruction if task_type in SYMMETRIC_TASK_TYPES else "")


class _Writer:
    """Sorts pairs into collections and writes a part whenever one is full."""

    def __init__(self, files: list[_Source], corpus: _Source, out: Place, shard_rows: int) -> None:
        self._out = out
        self._shard_rows = shard_rows
        self._shared = _shared_queries(files)
        self._right = _shared_positives(files, self._shared)
        self._labels = _label_sets(files)
        place, folder = corpus
        names = place.names(folder, ".parquet")
        ids = [place.read_table(name, ["id"]).column("id").combine_chunks() for name in names]
        self._corpus_ids = pa.concat_arrays(ids) if ids else pa.array([], pa.string())
        self._given = GivenTexts(out, shard_rows)
        self._waiting: dict[str, list[dict[str, Any]]] = {}
        self._parts: dict[str, list[str]] = {}
        self._origins: Counter[str] = Counter()
        self._rejects: list[dict[str, object]] = []

    def add(self, pairs: list[dict[str, Any]]) -> None:
        """Take some pairs."""
        known = pc.is_in(
            pa.array([pair["document_id"] for pair in pairs], pa.string()), value_set=self._corpus_ids
        )
        for pair, in_corpus in zip(pairs, known.to_pylist(), strict=True):
            check_task_type(pair["task_type"], f"pair {pair['id']!r}")
            reason = _reject_reason(pair, in_corpus)
            if reason:
                self._rejects.append({"id": pair["id"], "reason": reason, "detail": pair["document_id"]})
                continue
            row = self._row(pair, in_corpus)
            self._origins[row["dataset"]] += 1
            self._given.add(row, inline_id)
            waiting = self._waiting.setdefault(row["collection"], [])
            waiting.append(row)
            if len(waiting) == self._shard_rows:
                self._write(row["collection"])

    def finish(self) -> dict[str, Any]:
        """Write what is left; the counts."""
        for collection in list(self._waiting):
            self._write(collection)
        self._out.write_table(
            f"{REJECTS_FOLDER}/{PART_PATTERN.format(0)}", table_from_rows("rejects", self._rejects)
        )
        return {
            "rows": sum(self._origins.values()),
            "pairs": dict(sorted(self._origins.items())),
            "rejects": dict(sorted(Counter(row["reason"] for row in self._rejects).items())),
            "parts": self._parts,
            "given": self._given.finish(),
        }

    def _row(self, pair: dict[str, Any], in_corpus: bool) -> dict[str, Any]:
        positive = None if in_corpus else pair["positive"]
        right = {positive} | self._right.get(pair["query"], set()) if positive is not None else set()
        negatives = [text for text in pair["negatives"] or [] if text not in right]
        if not negatives and pair["task_type"] in LABEL_TASK_TYPES and positive is not None:
            negatives = wrong_labels(self._labels[pair["origin"], pair["instruction"]], right, pair["id"])
        own = positive is not None and not negatives and pair["task_type"] in _PAIRED_TASK_TYPES
        collection = f"{pair['origin']}-{pair['task_type']}" if own else CORPUS
        named = (
            {text: inline_id(text, pair["task_type"], pair["instruction"]) for text in right} if own else {}
        )
        document_id = named.get(positive, pair["document_id"])
        shared = self._shared.get(pair["query"], [pair["document_id"]])
        return {
            "id": pair["id"],
            "text": pair["query"],
            "instruction": pair["instruction"],
            "part": "",
            "collection": collection,
            "document_id": document_id,
            "known_positives": sorted(named.values()) if own else shared,
            "positive": positive,
            "negatives": negatives or None,
            "task_type": pair["task_type"],
            "dataset": pair["dataset"] or pair["origin"],
        }

    def _write(self, collection: str) -> None:
        rows = self._waiting.pop(collection)
        name = PART_PATTERN.format(sum(len(names) for names in self._parts.values()))
        self._parts.setdefault(collection, []).append(name)
        table = pa.Table.from_pylist([{**row, "part": name} for row in rows], schema=QUERY_SCHEMA)
        self._out.write_table(f"{QUERIES_FOLDER}/{name}", table)


def _reject_reason(pair: dict[str, Any], in_corpus: bool) -> str | None:
    if not pair["query"].strip():
        return "empty_query"
    if in_corpus:
        return None
    if pair["positive"] is None:
        return "positive_not_in_corpus"
    return None if pair["positive"].strip() else "empty_positive"


def _in_parts(files: list[_Source], rows: int) -> Iterator[pa.Table]:
    for place, name in files:
        table = check_table("pairs", place.read_table(name), f"{place.uri}/{name}")
        for start in range(0, table.num_rows, rows):
            yield table.slice(start, rows)


def _rows(files: list[_Source], names: list[str]) -> Iterator[tuple[Any, ...]]:
    for place, name in files:
        table = check_table("pairs", place.read_table(name), f"{place.uri}/{name}")
        yield from zip(*(table.column(column).to_pylist() for column in names), strict=True)


def _repeated(values: Callable[[], Iterator[str]]) -> set[int]:
    """Digests that stand more than once; eight bytes a value while counting."""
    digests = np.fromiter((text_digest(value) for value in values()), dtype=np.int64)
    digests.sort()
    return {int(digest) for digest in np.unique(digests[1:][digests[1:] == digests[:-1]])}


def _check_ids(files: list[_Source]) -> None:
    suspects = _repeated(lambda: (row[0] for row in _rows(files, ["id"])))
    counts = (
        Counter(row[0] for row in _rows(files, ["id"]) if text_digest(row[0]) in suspects)
        if suspects
        else Counter()
    )
    for identifier, count in counts.items():
        if count > 1:
            raise DataError(
                f"mining: pair id {identifier!r} stands {count} times in the pairs to mine; ids must be unique"
            )


def _shared_queries(files: list[_Source]) -> dict[str, list[str]]:
    """Query texts that stand in several pairs, with all their document ids."""
    repeated = _repeated(lambda: (row[0] for row in _rows(files, ["query"])))
    found: dict[str, set[str]] = {}
    for query, document_id in _rows(files, ["query", "document_id"]) if repeated else ():
        if text_digest(query) in repeated:
            found.setdefault(query, set()).add(document_id)
    return {query: sorted(ids) for query, ids in found.items()}


def _shared_positives(files: list[_Source], shared: dict[str, list[str]]) -> dict[str, set[str]]:
    """Positive texts that come with the pairs of each shared query: all of them are right answers to it."""
    found: dict[str, set[str]] = {}
    for query, positive in _rows(files, ["query", "positive"]) if shared else ():
        if positive and query in shared:
            found.setdefault(query, set()).add(positive)
    return found


def _label_sets(files: list[_Source]) -> dict[tuple[str, str], list[str]]:
    """All labels of each classification task, which its dataset and instruction name."""
    found: dict[tuple[str, str], set[str]] = {}
    for task_type, origin, instruction, positive, negatives in _rows(
        files, ["task_type", "origin", "instruction", "positive", "negatives"]
    ):
        if task_type in LABEL_TASK_TYPES and positive:
            found.setdefault((origin, instruction), set()).update([positive, *(negatives or [])])
    return {task: sorted(labels) for task, labels in found.items()}
