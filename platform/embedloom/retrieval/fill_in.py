"""Shards that take vectors from elsewhere: from an equal text in another shard, or from an earlier artefact."""

from functools import lru_cache

import numpy as np
import pyarrow as pa

from embedloom.engines.shards import parquet_rows
from embedloom.progress import note
from embedloom.retrieval.ledger import Ledger, origin_column
from embedloom.retrieval.scan import ROWS_FOLDER, Numbers
from embedloom.retrieval.stored import SCALE_COLUMN, final_table
from embedloom.retrieval.vector_files import CUT_KEYS, TOKENS_KEY
from embedloom.storage import Place

VECTORS_FOLDER = "vectors"
OWN_FOLDER = "own"
_CACHED_PARTS = 64  # vector files kept in memory


class _Finished:
    """Vector columns of finished rows by number: of this build, or below zero of the earlier artefact."""

    def __init__(self, ledger: Ledger, out: Place, previous: Place | None) -> None:
        self._ledger, self._out, self._previous = ledger, out, previous
        files = parquet_rows(previous, VECTORS_FOLDER) if previous else []
        self._before = [name for name, _ in files]
        self._ends = np.cumsum([rows for _, rows in files], dtype=np.int64)
        self._table = lru_cache(maxsize=_CACHED_PARTS)(self._read)

    def take(self, origins: Numbers) -> pa.Table:
        """Columns vector and scale of these rows, in this order; schema metadata of one of the files."""
        files = np.where(
            origins >= 0,
            origins // self._ledger.shard_rows,
            -1 - np.searchsorted(self._ends, -1 - origins, side="right"),
        )
        tables, places = [], []
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            tables.append(self._rows(int(file), origins[here]))
            places.append(here)
        order = np.argsort(np.concatenate(places))
        return pa.concat_tables(tables).take(pa.array(order))

    def _rows(self, file: int, origins: Numbers) -> pa.Table:
        table, offsets = self._table(file)
        if file >= 0:
            wanted = origins - file * self._ledger.shard_rows
            rows = wanted if offsets is None else np.searchsorted(offsets, wanted)
        else:
            first = self._ends[-2 - file] if file < -1 else 0
            rows = -1 - origins - first
        return table.take(pa.array(rows))

    def _read(self, file: int) -> tuple[pa.Table, Numbers | None]:
        """Vectors of a file and, if it holds only a shard's own rows, their offsets in the shard."""
        offsets = None
        if file < 0:
            assert self._previous is not None  # noqa: S101 - the ledger was opened with the same artefact
            table = self._previous.read_table(self._before[-1 - file])
        elif self._out.exists(f"{OWN_FOLDER}/{self._ledger.parts[file]}"):
            table = self._out.read_table(f"{OWN_FOLDER}/{self._ledger.parts[file]}")
            offsets = np.asarray(table.column("offset"))
        else:
            table = self._out.read_table(f"{VECTORS_FOLDER}/{self._ledger.parts[file]}")
        return table.select([n for n in ("vector", SCALE_COLUMN) if n in table.column_names]), offsets


def fill_in(stage: str, ledger: Ledger, out: Place, previous: Place | None) -> None:
    """Put together the shards that take vectors from elsewhere; all own vectors must be there."""
    done = set(out.names(VECTORS_FOLDER, ".parquet"))
    missing = [n for n, part in enumerate(ledger.parts) if f"{VECTORS_FOLDER}/{part}" not in done]
    if not missing:
        return
    note(stage, f"filling in shared vectors of {len(missing)} of {len(ledger.parts)} shards")
    finished = _Finished(ledger, out, previous)
    for shard in missing:
        part = ledger.parts[shard]
        rows = out.read_table(f"{ROWS_FOLDER}/{part}")
        table = finished.take(origin_column(rows))
        cost = (TOKENS_KEY, *CUT_KEYS)
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key not in cost}
        own = (
            out.parquet_footer(f"{OWN_FOLDER}/{part}")[0].metadata
            if ledger.own[shard]
            else {TOKENS_KEY: b"0"}
        )
        metadata |= {key: own[key] for key in cost if key in own}
        table = table.add_column(0, "id", rows.column("id"))
        out.write_table(f"{VECTORS_FOLDER}/{part}", final_table(table, metadata))
