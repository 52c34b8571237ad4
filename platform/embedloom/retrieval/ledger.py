"""The deduplication index of an embedding job: which row of the input takes which vector, from one pass over the input."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.compute.shards import PART_PATTERN
from embedloom.core.prompting import Side, document_text
from embedloom.core.schemas import content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.core.text import hashes64
from embedloom.errors import DataError
from embedloom.retrieval.inputs import TextSource

# One pass over an input: a digest of every text, a hash of every id, and a reject of every row without a text.


ROWS_FOLDER = "rows"
REJECTS_FOLDER = "rejects"
DRAFTS_FOLDER = "drafts"
_SCAN_ROWS = 8192
_DIGEST_BYTES = 16  # two different texts of one digest would share a vector: among 10^10, a chance of 10^-19

Digests = np.ndarray[Any, np.dtype[np.uint64]]  # [n, 2]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

DRAFT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("digest", pa.binary(_DIGEST_BYTES), False),
        pa.field("file", pa.int32(), False),
        pa.field("row", pa.int64(), False),
    ]
)


def text_digest(text: str) -> bytes:
    """What equal texts have in common: 128 bits."""
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()


def texts_of(table: pa.Table, source: TextSource) -> list[str]:
    """What a model is given of each row; see ``given_texts``."""
    titles = table.column(source.title).to_pylist() if source.title else None
    return given_texts(table.column(source.text).to_pylist(), titles, source.side)


def given_texts(bodies: Sequence[str | None], titles: Sequence[str | None] | None, side: Side) -> list[str]:
    """What a model is given of texts; empty where there is none.

    A document is its title and text, joined and without blanks at the ends; a query is given as it stands.
    """
    if side == "query":
        return [body if body and body.strip() else "" for body in bodies]
    return [
        document_text(title, body or "")
        for title, body in zip(titles or [None] * len(bodies), bodies, strict=True)
    ]


def first_of_equals(digests: Digests) -> Numbers:
    """For each digest [n, 2], the smallest position that holds the same one: [n]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so positions ascend among equals
    ordered = digests[order]
    starts = np.ones(len(digests), dtype=bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    leaders = np.maximum.accumulate(np.where(starts, np.arange(len(digests)), 0))
    first = np.empty(len(digests), dtype=np.int64)
    first[order] = order[leaders]
    return first


def scan(source: TextSource, out: Place) -> tuple[Digests, Numbers, dict[str, int]]:
    """Read all texts once: drafts of the rows, digests [n, 2] and 64-bit hashes of the ids [n] of what has a text."""
    digests, hashes, rejects, number = [b""], [hashes64([])], dict[str, int](), 0
    for file, (name, _) in enumerate(source.files):
        start = 0
        for table in source.place.iter_tables(name, source.columns, _SCAN_ROWS):
            texts = texts_of(table, source)
            found = [text_digest(text) for text in texts]
            ids = _ids(table, source, found, f"{source.place.uri}/{name}", start)
            full = [row for row, text in enumerate(texts) if text]
            if len(full) < len(texts):
                where = [
                    (ids[row], f"{name}: row {start + row}") for row, text in enumerate(texts) if not text
                ]
                _reject(out, number, "empty", where, rejects)
            draft = [
                pa.array([ids[row] for row in full], pa.string()),
                pa.array([found[row] for row in full], pa.binary(_DIGEST_BYTES)),
                pa.array([file] * len(full), pa.int32()),
                pa.array([start + row for row in full], pa.int64()),
            ]
            out.write_table(
                f"{DRAFTS_FOLDER}/{PART_PATTERN.format(number)}",
                pa.table(draft, schema=DRAFT_SCHEMA),
            )
            digests.append(b"".join(found[row] for row in full))
            hashes.append(hashes64(ids[row] for row in full))
            start, number = start + table.num_rows, number + 1
    pairs = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
    return pairs, np.concatenate(hashes), rejects


def _ids(table: pa.Table, source: TextSource, digests: list[bytes], where: str, start: int) -> list[str]:
    if source.id is None:
        return [content_id(digest.hex()) for digest in digests]
    ids = table.column(source.id).to_pylist()
    for row, value in enumerate(ids):
        if value is None or value == "":
            raise DataError(
                f"{where}: row {start + row}: column {source.id!r} holds {value!r}; every row needs an id"
            )
    return [str(value) for value in ids]


def _reject(
    out: Place, number: int, reason: str, rows: list[tuple[str, str]], counts: dict[str, int]
) -> None:
    table = table_from_rows("rejects", ({"id": i, "reason": reason, "detail": d} for i, d in rows))
    out.write_table(f"{REJECTS_FOLDER}/{reason}-{number:06d}.parquet", table)
    counts[reason] = counts.get(reason, 0) + len(rows)


def first_of_repeats(out: Place, hashes: Numbers, digests: Digests) -> np.ndarray[Any, Any]:
    """Which rows [n] say something new: not those whose id and text an earlier row has; hashes only nominate.

    Raises:
        DataError: an id that stands for two texts.
    """
    ordered = np.sort(hashes)
    suspect = np.isin(hashes, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
    new = np.ones(len(hashes), dtype=bool)
    seen: dict[str, bytes] = {}
    start = 0
    for name in out.names(DRAFTS_FOLDER, ".parquet") if suspect.any() else ():
        ids = out.read_table(name, ["id"]).column("id")
        rows = np.flatnonzero(suspect[start : start + len(ids)])
        for row, identifier in zip(rows + start, ids.take(pa.array(rows)).to_pylist(), strict=True):
            text = digests[row].tobytes()
            new[row] = identifier not in seen
            if seen.setdefault(identifier, text) != text:
                raise DataError(
                    f"embedding.corpus: id {identifier!r} stands for two texts; ids must be unique"
                )
        start += len(ids)
    return new


def reject_repeats(out: Place, kept: np.ndarray[Any, Any], counts: dict[str, int]) -> None:
    """Count the rows that repeat an earlier one: its id and text, or its text alone where rows have no ids."""
    start = 0
    for number, name in enumerate(out.names(DRAFTS_FOLDER, ".parquet")):
        table = out.read_table(name, ["id", "file", "row"])
        again = table.filter(pa.array(~kept[start : start + table.num_rows]))
        if again.num_rows:
            rows = [(row["id"], f"file {row['file']}, row {row['row']}") for row in again.to_pylist()]
            _reject(out, number, "repeated", rows, counts)
        start += table.num_rows


def digests_before(place: Place) -> tuple[Digests, Numbers]:
    """Digests [n, 2] and hashes of the ids [n] of an earlier artefact's rows, in order."""
    digests, hashes = [b""], [hashes64([])]
    for name in place.names(ROWS_FOLDER, ".parquet"):
        table = place.read_table(name, ["id", "digest"])
        digests.extend(table.column("digest").to_pylist())
        hashes.append(hashes64(table.column("id").to_pylist()))
    pairs = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
    return pairs, np.concatenate(hashes)


# The ledger: which row of the input takes which vector, written before anything is embedded.
#
# One pass over the input gives every text a digest. Rows of one digest share one vector, whichever shard they stand
# in, and a digest that an earlier artefact knows takes the vector it has there. ``rows/part-*.parquet`` then holds,
# for every row of ``vectors/part-*.parquet``: id, digest, file and row of the text, and ``origin``, the number of
# the row whose vector it takes: its own number if the text is new here, another's if the text stood there before,
# ``-1 - n`` for row n of the earlier artefact. ``ledger.parquet``, written last, has one row a shard.
#
# Memory: 24 bytes a row (16 of digest, 8 of id), and as many again while they are sorted.


_LEDGER_FILE = "ledger.parquet"
_ROWS_SCHEMA = DRAFT_SCHEMA.append(pa.field("origin", pa.int64(), False))


@dataclass(frozen=True, slots=True)
class Ledger:
    """How the rows fall into shards.

    Attributes:
        shard_rows: rows of every shard but the last.
        rows: rows of each shard.
        own: how many of them are embedded in that shard.
        previous: fingerprint of the earlier artefact whose vectors are taken, or empty.
        counts: rows, ``embedded`` (texts that go through the model), ``shared`` (rows that take the vector of an
            equal text of this input), ``reused`` (rows that take one of the earlier artefact), ``removed`` (ids of
            the earlier artefact that are no more), and rejects by reason.
    """

    shard_rows: int
    rows: tuple[int, ...]
    own: tuple[int, ...]
    previous: str
    counts: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        """Names of the shards' files, in order."""
        return [PART_PATTERN.format(number) for number in range(len(self.rows))]


def open_ledger(
    source: TextSource, out: Place, shard_rows: int, previous: tuple[str, Place] | None
) -> Ledger:
    """The ledger of a build: read if it is there, else written.

    Args:
        source: the rows.
        out: the artefact being built; gets ``rows`` and ``rejects``.
        shard_rows: rows a shard.
        previous: fingerprint and place of an earlier artefact whose vectors may be taken.

    Raises:
        DataError: an id that is missing or stands for two texts, no row with a text, or a build that took its vectors from
            another earlier artefact when it was interrupted.
    """
    if not out.exists(_LEDGER_FILE):
        for folder in (DRAFTS_FOLDER, ROWS_FOLDER, REJECTS_FOLDER):
            out.child(folder).remove()
        _write(source, out, shard_rows, previous)
    out.child(DRAFTS_FOLDER).remove()
    ledger = _read(out)
    now = previous[0] if previous else ""
    if ledger.previous != now:
        raise DataError(
            f"{out.uri}: the interrupted build takes vectors from the artefact {ledger.previous or 'none'!r}, "
            f"now given is {now or 'none'!r}; give the same, or delete {out.uri}"
        )
    return ledger


def _write(source: TextSource, out: Place, shard_rows: int, previous: tuple[str, Place] | None) -> None:
    digests, ids, rejects = scan(source, out)
    if source.id is None:
        kept = first_of_equals(digests) == np.arange(len(digests))
    else:
        kept = first_of_repeats(out, ids, digests)
    reject_repeats(out, kept, rejects)
    digests, ids = digests[kept], ids[kept]
    if not len(digests):
        raise DataError(f"embedding.corpus: {source.place.uri}: no row with a text; rejects: {rejects}")
    before, ids_before = digests_before(previous[1]) if previous else (digests[:0], ids[:0])
    first = first_of_equals(np.concatenate([before, digests]))[len(before) :]
    origins = np.where(first < len(before), -1 - first, first - len(before))
    own = origins == np.arange(len(origins))
    counts = {
        "rows": len(origins),
        "embedded": int(own.sum()),
        "shared": int(((origins >= 0) & ~own).sum()),
        "reused": int((origins < 0).sum()),
        "removed": int((~np.isin(ids_before, ids)).sum()),
    }
    _cut(out, kept, origins, shard_rows)
    _write_shards(out, own, shard_rows, previous[0] if previous else "", {**counts, "rejects": rejects})


def _kept_rows(out: Place, kept: np.ndarray[Any, Any]) -> Iterator[pa.Table]:
    start = 0
    for name in out.names(DRAFTS_FOLDER, ".parquet"):
        table = out.read_table(name)
        yield table.filter(pa.array(kept[start : start + table.num_rows]))
        start += table.num_rows


def _cut(out: Place, kept: np.ndarray[Any, Any], origins: Numbers, shard_rows: int) -> None:
    """Write the drafts' rows with their origins, ``shard_rows`` to a file."""
    number = 0

    def write(table: pa.Table) -> None:
        nonlocal number
        mine = origins[number * shard_rows : number * shard_rows + table.num_rows]
        full = [*table.columns, pa.chunked_array([mine])]
        out.write_table(f"{ROWS_FOLDER}/{PART_PATTERN.format(number)}", pa.table(full, schema=_ROWS_SCHEMA))
        number += 1

    waiting: pa.Table | None = None
    for rows in _kept_rows(out, kept):
        waiting = rows if waiting is None else pa.concat_tables([waiting, rows])
        while waiting.num_rows >= shard_rows:
            write(waiting.slice(0, shard_rows).combine_chunks())
            waiting = waiting.slice(shard_rows)
    if waiting is not None and waiting.num_rows:
        write(waiting.combine_chunks())


def _write_shards(
    out: Place, own: np.ndarray[Any, Any], shard_rows: int, previous: str, counts: dict[str, Any]
) -> None:
    starts = np.arange(0, len(own), shard_rows)
    rejects = counts.pop("rejects")
    metadata = {"shard_rows": str(shard_rows), "previous": previous}
    metadata |= {f"count.{key}": str(value) for key, value in counts.items()}
    metadata |= {f"reject.{key}": str(value) for key, value in rejects.items()}
    columns = {
        "rows": pa.array(np.minimum(len(own) - starts, shard_rows), pa.int64()),
        "own": pa.array(np.add.reduceat(own.astype(np.int64), starts), pa.int64()),
    }
    out.write_table(_LEDGER_FILE, pa.table(columns).replace_schema_metadata(metadata))


def _read(out: Place) -> Ledger:
    table = out.read_table(_LEDGER_FILE)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}

    def counted(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): int(v) for k, v in metadata.items() if k.startswith(prefix)}

    return Ledger(
        int(metadata["shard_rows"]),
        tuple(table.column("rows").to_pylist()),
        tuple(table.column("own").to_pylist()),
        metadata["previous"],
        {**counted("count."), "rejects": counted("reject.")},
    )


def origin_column(table: pa.Table) -> Numbers:
    """Column ``origin`` of a rows table: int64 [n]."""
    return np.asarray(pc.cast(table.column("origin"), pa.int64()).to_numpy(), dtype=np.int64)


VECTORS_FOLDER = "vectors"
OWN_FOLDER = "own"
