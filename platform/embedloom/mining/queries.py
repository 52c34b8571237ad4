"""Gathering the pairs of all artefacts into one table of queries to mine, in parts of equal size."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.artefacts import Artefact
from embedloom.engines.shards import PART_PATTERN
from embedloom.errors import DataError
from embedloom.instructions import check_task_type
from embedloom.mining.documents import text_digest
from embedloom.records import check_table, content_id
from embedloom.storage import Place

QUERIES_FOLDER = "queries"
INLINE_FOLDER = "inline_documents"
COUNTS_FILE = "queries.json"  # written last: the queries are all there

_TEXTS = pa.list_(pa.string())
QUERY_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("instruction", pa.string()),
        ("part", pa.string()),  # name of this row's file, which its vectors and results share
        ("document_id", pa.string()),
        ("known_positives", _TEXTS),  # document ids of every pair with this query text, this one included
        ("positive", pa.string()),  # given with the pair; used only if the corpus lacks document_id
        ("negatives", _TEXTS),  # given with the pair; replace mined ones
        ("task_type", pa.string()),
        ("dataset", pa.string()),
    ]
)
_INLINE_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])
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
    """Write ``queries/`` and the given texts the corpus lacks (``inline_documents/``), once.

    Args:
        files: pairs files in order; all rows of one, then the next.
        corpus: place and folder of the documents.
        out: the artefact's place.
        shard_rows: rows per part.

    Returns:
        ``{"rows", "inline", "pairs": {origin: n}}``.

    Raises:
        DataError: a pair id twice, an unknown task type, or no row at all.
    """
    if out.exists(COUNTS_FILE):
        return out.read_json(COUNTS_FILE)
    _check_ids(files)
    shared = _shared_queries(files)
    origins: Counter[str] = Counter()
    inline = _InlineDocuments(corpus, out, shard_rows)
    part = 0
    for table in _in_parts(files, shard_rows):
        name = PART_PATTERN.format(part)
        rows = [_query_row(pair, name, shared) for pair in table.to_pylist()]
        origins.update(row["dataset"] for row in rows)
        inline.add(rows)
        out.write_table(f"{QUERIES_FOLDER}/{name}", pa.Table.from_pylist(rows, schema=QUERY_SCHEMA))
        part += 1
    if not part:
        raise DataError(
            f"mining: no pair in {files[0][0].uri}/{files[0][1]} or the {len(files) - 1} files after it"
        )
    counts = {
        "rows": sum(origins.values()),
        "inline": inline.finish(),
        "pairs": dict(sorted(origins.items())),
    }
    out.write_json(COUNTS_FILE, counts)
    return counts


def inline_id(text: str) -> str:
    """Id of a text that comes with a pair and is no document of the corpus."""
    return content_id("inline", text)


def _query_row(pair: dict[str, Any], part: str, shared: dict[str, list[str]]) -> dict[str, Any]:
    check_task_type(pair["task_type"], f"pair {pair['id']!r}")
    return {
        "id": pair["id"],
        "text": pair["query"],
        "instruction": pair["instruction"],
        "part": part,
        "document_id": pair["document_id"],
        "known_positives": shared.get(pair["query"], [pair["document_id"]]),
        "positive": pair["positive"],
        "negatives": pair["negatives"],
        "task_type": pair["task_type"],
        "dataset": pair["origin"],
    }


def _in_parts(files: list[_Source], rows: int) -> Iterator[pa.Table]:
    """The pairs of all files in tables of exactly ``rows`` rows, the last shorter."""
    held: pa.Table | None = None
    for place, name in files:
        table = check_table("pairs", place.read_table(name), f"{place.uri}/{name}")
        held = table if held is None else pa.concat_tables([held, table])
        while held.num_rows >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
        held = held.combine_chunks()
    if held is not None and held.num_rows:
        yield held


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


class _InlineDocuments:
    """Texts given with pairs that need a vector of their own, each written once."""

    def __init__(self, corpus: _Source, out: Place, shard_rows: int) -> None:
        self._corpus = corpus
        self._out = out
        self._shard_rows = shard_rows
        self._known: pa.Array | None = None
        self._seen: set[str] = set()
        self._waiting: list[dict[str, str]] = []
        self._parts = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Collect the texts of these query rows that the miner will need."""
        given = [row for row in rows if row["positive"]]
        missing = dict(
            zip(
                (row["id"] for row in given),
                self._not_in_corpus([row["document_id"] for row in given]),
                strict=True,
            )
        )
        for row in rows:
            texts = [row["positive"]] if missing.get(row["id"]) else []
            for text in [*texts, *(row["negatives"] or [])]:
                if inline_id(text) not in self._seen:
                    self._seen.add(inline_id(text))
                    self._waiting.append({"id": inline_id(text), "text": text})
        while len(self._waiting) >= self._shard_rows:
            self._write()

    def finish(self) -> int:
        """Write what is left and return the number of texts."""
        if self._waiting:
            self._write()
        return len(self._seen)

    def _write(self) -> None:
        table = pa.Table.from_pylist(self._waiting[: self._shard_rows], schema=_INLINE_SCHEMA)
        self._out.write_table(f"{INLINE_FOLDER}/{PART_PATTERN.format(self._parts)}", table)
        self._waiting = self._waiting[self._shard_rows :]
        self._parts += 1

    def _not_in_corpus(self, ids: list[str]) -> list[bool]:
        if not ids:
            return []
        if self._known is None:
            place, folder = self._corpus
            self._known = (
                pa.concat_tables([place.read_table(name, ["id"]) for name in place.names(folder, ".parquet")])
                .column("id")
                .combine_chunks()
            )
        return [
            not known for known in pc.is_in(pa.array(ids, pa.string()), value_set=self._known).to_pylist()
        ]
