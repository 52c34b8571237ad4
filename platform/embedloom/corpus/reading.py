"""The first steps of a corpus: pieces of sources become cleaned rows, and these rows in id order, cut into ranges.

Whatever the pieces and whoever read them, a row's position, its range and its place in it, is the same, and every later
step goes by positions alone.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.config.corpus import CorpusConfig
from embedloom.core.progress import note
from embedloom.core.prompting import document_text
from embedloom.core.storage import Place, is_remote
from embedloom.core.text import folded
from embedloom.corpus.clean import Rejects, SourceRow, clean_row, reject_reason
from embedloom.corpus.exchange import Counts, Numbers, received, send, write_rows
from embedloom.corpus.sources import Piece, finished_row, one_document_a_text, read_piece

# Reading order and positions are one number each: the piece or range, and the place in it.
PLACE_BITS = 40
_PLACE_MASK = (1 << PLACE_BITS) - 1

RAW_SCHEMA = pa.schema(
    [
        ("ordinal", pa.int64()), ("text", pa.large_string()), ("title", pa.string()), ("lang", pa.string()),
        ("source", pa.string()), ("group", pa.string()), ("id", pa.string()), ("queries", pa.list_(pa.string())),
        ("grades", pa.list_(pa.float64())), ("instruction", pa.string()), ("dataset", pa.string()), ("outline", pa.string()),
    ]
)  # fmt: skip
ROW_SCHEMA = pa.schema([*RAW_SCHEMA, ("digest", pa.uint64()), ("digest2", pa.uint64())])
REJECT_SCHEMA = pa.schema(
    [("at", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
DIGEST_SCHEMA = pa.schema([("digest", pa.uint64()), ("digest2", pa.uint64()), ("position", pa.int64())])
RANGES_FOLDER, SORTED_FOLDER, ROWS_FOLDER, DIGESTS_FOLDER = "ranges", "sorted", "rows", "digests"
READ_REJECTS = "rejects-read"
_PAIRS_FOLDER = "pairs-read"
_LOOKED_FOR = 16  # files of a source, on every machine
_SAMPLED = 64  # ids of a block that tell where ranges may be cut


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much one task takes; the corpus is the same whatever these are.

    Attributes:
        piece_bytes: of a source's files.
        block_rows: most rows that are held while they are cleaned, and about as many lie in a range.
        block_bytes: most UTF-8 bytes of their texts.
        bucket_rows: hashes that are compared with each other in one task.
    """

    piece_bytes: int = 64 * 2**20
    block_rows: int = 65_536
    block_bytes: int = 64 * 2**20
    bucket_rows: int = 2_000_000

    def buckets(self, rows: int) -> int:
        """Receivers that so many rows are sent to."""
        return max(1, -(-rows // self.bucket_rows))


@dataclass(frozen=True, slots=True)
class Work:
    """What every task of a build is told; picklable."""

    place: Place
    config: CorpusConfig
    seed: int
    sizes: Sizes


def own_rows(table: pa.Table) -> Iterator[SourceRow]:
    """The rows of a table of RAW_SCHEMA or ROW_SCHEMA."""
    for row in table.drop_columns(
        [name for name in ("ordinal", "digest", "digest2") if name in table.column_names]
    ).to_pylist():
        queries, grades = tuple(row.pop("queries")), tuple(row.pop("grades"))
        yield SourceRow(**row, queries=queries, grades=grades)


def range_of(positions: Numbers) -> Numbers:
    """The range that each row lies in."""
    return positions >> PLACE_BITS


def place_of(positions: Numbers) -> Numbers:
    """Its place in the range."""
    return positions & _PLACE_MASK


def position(range_number: int, place: int) -> int:
    """Where a row stands in id order."""
    return (range_number << PLACE_BITS) | place


# Reading: a piece is read from its first row to its last and written in blocks, so nobody holds a whole file.


class OrderedRejects(Rejects):
    """Rejects of a piece and the place of each in reading order."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def noted_at(self, place: int) -> None:
        """What was added since belongs here."""
        self.places += [place] * (len(self.rows) - len(self.places))

    def table(self) -> pa.Table:
        """As rows of REJECT_SCHEMA."""
        columns = [[row[name] for row in self.rows] for name in ("id", "reason", "detail")]
        return pa.table([self.places, *columns], schema=REJECT_SCHEMA)


def where_to_read(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Options of ``run_tasks`` for reading pieces of a source: beside the driver what not every machine of the cluster has.

    A folder of documents may lie on the driver's machine alone, as what is installed there and a data set's cache do.
    """
    import ray

    files = [str(piece.files[0][0]) for piece in pieces[:_LOOKED_FOR] if piece.files]
    if any(map(is_remote, [*files, *(piece.source.path or "" for piece in pieces)])):
        return {}
    if not ray.is_initialized() or (files and _seen_everywhere(files)):
        return {}
    if files:
        note(
            "corpus",
            f"{files[0]} is not on every machine of the cluster: this source is read beside the driver",
        )
    own = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    # A head that takes no work has no CPU to reserve; few sources are read as one.
    return {"beside_driver": True, "cpus": min(1.0, own["Resources"].get("CPU", 0.0))}


def _seen_everywhere(files: Sequence[str]) -> bool:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return True
    look = ray.remote(_all_there)
    places = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    return all(
        ray.get([look.options(num_cpus=0, scheduling_strategy=place).remote(files) for place in places])
    )


def _all_there(files: Sequence[str]) -> bool:
    return all(Path(file).exists() for file in files)


Numbered = tuple[Piece, int]  # a piece, and its number among those of all sources


def gather_pairs(item: Numbered, _: int, work: Work, source: int, buckets: int) -> Counts:
    """Send rows whose texts may repeat with further queries to where equal texts meet, as they are."""
    piece, number = item
    rejects = OrderedRejects()
    read = 0
    numbered = ((ordinal, _encodable(row)) for ordinal, row in _numbered(piece, number, rejects))
    for block, table in enumerate(blocks_of(numbered, work.sizes, RAW_SCHEMA)):
        keys = [_digest(f"{title or ''}\0{text}")[0] for title, text in _texts(table)]
        receivers = np.array(keys, dtype=np.uint64) % np.uint64(buckets)
        send(work.place, f"{_PAIRS_FOLDER}-{source}/{number:06d}-{block:06d}.arrow", table, receivers)
        read += table.num_rows
    _send_rejects(work.place, f"gather-{source:06d}-{number:06d}", rejects)
    return {"read": read, "rejects": rejects.counts}


def merge_pairs(piece: Piece, number: int, work: Work, source: int) -> Counts:
    """Clean the documents of the pairs that met here: each text once, where it first stood, with all its queries."""
    rows = received(work.place, f"{_PAIRS_FOLDER}-{source}", number, RAW_SCHEMA).sort_by("ordinal")
    numbered = zip(own_rows(rows), rows.column("ordinal").to_pylist(), strict=True)
    places: dict[tuple[str | None, str], int] = {}
    for row, ordinal in numbered:
        places.setdefault((row.title, row.text), ordinal)
    merged = one_document_a_text(own_rows(rows))
    return _clean(
        piece,
        ((places[row.title, row.text], row) for row in merged),
        f"merged-{source:06d}-{number:06d}",
        work,
        OrderedRejects(),
    )


def clean_piece(item: Numbered, _: int, work: Work) -> Counts:
    """Clean the rows of a piece; what is no document is a reject.

    Raises:
        DataError: not readable, or a row that does not fit its source's section.
    """
    piece, number = item
    rejects = OrderedRejects()
    return _clean(piece, _numbered(piece, number, rejects), f"piece-{number:06d}", work, rejects)


def _encodable(row: SourceRow) -> SourceRow:
    """Without the lone surrogates that JSON can carry and UTF-8 cannot; cleaning drops them as well."""

    def valid(text: str) -> str:
        return text.encode("utf-8", "ignore").decode()

    queries = tuple(map(valid, row.queries))
    title = None if row.title is None else valid(row.title)
    return replace(row, text=valid(row.text), title=title, queries=queries)


def _numbered(piece: Piece, number: int, rejects: OrderedRejects) -> Iterator[tuple[int, SourceRow]]:
    last = number << PLACE_BITS
    for ordinal, row in enumerate(read_piece(piece, rejects), start=last):
        rejects.noted_at(ordinal)
        yield ordinal, row
        last = ordinal + 1
    rejects.noted_at(last)


def _clean(
    piece: Piece, numbered: Iterable[tuple[int, SourceRow]], name: str, work: Work, rejects: OrderedRejects
) -> Counts:
    read = 0

    def kept() -> Iterator[tuple[int, SourceRow]]:
        nonlocal read
        for ordinal, raw in numbered:
            read += 1
            row = clean_row(finished_row(piece.source, raw))
            reason = reject_reason(row, work.config.min_characters)
            if reason is None:
                yield ordinal, row
            else:
                rejects.add(row.id, reason, f"{row.source}: {len(row.text)} characters")
                rejects.noted_at(ordinal)

    blocks = []
    for block, table in enumerate(blocks_of(kept(), work.sizes, RAW_SCHEMA)):
        rows = _with_digests(table)
        write_rows(work.place, f"{ROWS_FOLDER}/{name}-{block:06d}.arrow", ROW_SCHEMA, [rows])
        blocks.append(_block_facts(f"{ROWS_FOLDER}/{name}-{block:06d}.arrow", rows))
    _send_rejects(work.place, name, rejects)
    return {"read": read, "blocks": blocks, "rejects": rejects.counts}


def _block_facts(name: str, rows: pa.Table) -> Counts:
    lengths = pc.binary_length(rows.column("text"))
    return {
        "name": name, "rows": rows.num_rows, "bytes": pc.sum(lengths).as_py(),
        "queries": pc.sum(pc.list_value_length(rows.column("queries"))).as_py(),
        "ids": rows.column("id").take(list(range(0, rows.num_rows, -(-rows.num_rows // _SAMPLED)))).to_pylist(),
    }  # fmt: skip


def blocks_of(
    numbered: Iterable[tuple[int, SourceRow]], sizes: Sizes, schema: pa.Schema
) -> Iterator[pa.Table]:
    """Numbered rows as tables of ``schema``, each held while it is filled."""
    names = schema.names[1:]
    columns: list[list[Any]] = [[] for _ in schema]
    size = 0
    for ordinal, row in numbered:
        columns[0].append(ordinal)
        for column, name in zip(columns[1:], names, strict=True):
            column.append(getattr(row, name))
        size += len(row.text.encode())
        if len(columns[0]) >= sizes.block_rows or size >= sizes.block_bytes:
            yield pa.table(columns, schema=schema)
            columns, size = [[] for _ in schema], 0
    if columns[0]:
        yield pa.table(columns, schema=schema)


def _with_digests(table: pa.Table) -> pa.Table:
    """Rows in id order with the digests of their texts; a text that repeats in them is left out, as it will be dropped."""
    table = table.sort_by([("id", "ascending"), ("ordinal", "ascending")])
    seen: set[tuple[int, int]] = set()
    digests, repeats = [], []
    for title, text in _texts(table):
        digest = _digest(folded(document_text(title, text)))
        repeats.append(digest in seen)
        seen.add(digest)
        digests.append(digest)
    if any(repeats):
        # A page that a million sites have would else lie a million times in one range.
        text = pc.if_else(pa.array(repeats), pa.scalar("", pa.large_string()), table.column("text"))
        table = table.set_column(table.schema.get_field_index("text"), "text", text)
    return pa.table([*table.columns, *map(list, zip(*digests, strict=True))], schema=ROW_SCHEMA)


def _texts(table: pa.Table) -> Iterator[tuple[str | None, str]]:
    return zip(table.column("title").to_pylist(), table.column("text").to_pylist(), strict=True)


def _digest(text: str) -> tuple[int, int]:
    """128 bits: two texts of 10^12 share them with a chance of 10^-15."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _send_rejects(place: Place, name: str, rejects: OrderedRejects) -> None:
    table = rejects.table()
    send(place, f"{READ_REJECTS}/{name}.arrow", table, range_of(table.column("at").to_numpy()))


# Ranges: rows in id order, cut where the samples say that about as many lie between two cuts.


def range_bounds(blocks: Sequence[Counts], sizes: Sizes) -> list[str]:
    """Ids at which ranges begin, the first's aside; equal ids never part."""
    rows, size = sum(block["rows"] for block in blocks), sum(block["bytes"] for block in blocks)
    ranges = max(1, -(-rows // sizes.block_rows), -(-size // sizes.block_bytes))
    weighted = sorted((name, block["rows"] / len(block["ids"])) for block in blocks for name in block["ids"])
    bounds: list[str] = []
    before = 0.0
    for name, weight in weighted:
        if before >= rows * (len(bounds) + 1) / ranges and (not bounds or name > bounds[-1]):
            bounds.append(name)
        before += weight
    return bounds


def cut_ranges(block: Counts, number: int, work: Work, bounds: Sequence[str]) -> Counts:
    """Send the rows of a block to their ranges."""
    with work.place.open_input(block["name"]) as stream:
        table = pa.ipc.open_file(stream).read_all()
        ids = table.column("id").to_pylist()
        cuts = [0, *(bisect_left(ids, bound) for bound in bounds), len(ids)]
        sizes = [stop - start for start, stop in pairwise(cuts)]
        send(
            work.place, f"{RANGES_FOLDER}/{number:06d}.arrow", table, np.repeat(np.arange(len(sizes)), sizes)
        )
    return {}


def sort_range(item: None, number: int, work: Work, buckets: int) -> Counts:
    """Write the rows of a range in id order, rows of one id in reading order, and send their digests to where equal ones meet."""
    table = received(work.place, RANGES_FOLDER, number, ROW_SCHEMA)
    table = table.sort_by([("id", "ascending"), ("ordinal", "ascending")])
    write_rows(work.place, sorted_name(number), ROW_SCHEMA, [table])
    positions = np.arange(table.num_rows, dtype=np.int64) + position(number, 0)
    digests = pa.table(
        [table.column("digest"), table.column("digest2"), pa.array(positions)], schema=DIGEST_SCHEMA
    )
    receivers = table.column("digest").to_numpy() % np.uint64(buckets)
    send(work.place, f"{DIGESTS_FOLDER}/{number:06d}.arrow", digests, receivers)
    return {"rows": table.num_rows}


def sorted_name(number: int) -> str:
    """File of a range's rows."""
    return f"{SORTED_FOLDER}/{number:06d}.arrow"
