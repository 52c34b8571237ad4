"""The ledger: which row of the input takes which vector, written before anything is embedded.

One pass over the input gives every text a digest. Rows of one digest share one vector, whichever shard they stand
in, and a digest that an earlier artefact knows takes the vector it has there. ``rows/part-*.parquet`` then holds,
for every row of ``vectors/part-*.parquet``: id, digest, file and row of the text, and ``origin``, the number of
the row whose vector it takes: its own number if the text is new here, another's if the text stood there before,
``-1 - n`` for row n of the earlier artefact. ``ledger.parquet``, written last, has one row a shard.

Memory: 24 bytes a row (16 of digest, 8 of id), and as many again while they are sorted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.engines.shards import PART_PATTERN
from embedloom.errors import DataError
from embedloom.retrieval.inputs import TextSource
from embedloom.retrieval.scan import (
    DRAFT_SCHEMA,
    DRAFTS_FOLDER,
    REJECTS_FOLDER,
    ROWS_FOLDER,
    Numbers,
    digests_before,
    first_of_equals,
    first_of_repeats,
    reject_repeats,
    scan,
)  # fmt: skip
from embedloom.storage import Place

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
