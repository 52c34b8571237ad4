"""Exactly-once shards: the one way a data stage streams rows through an actor pool.

A table on disk is cut into shards by row number alone, so the cut never depends on the number of actors.
Ray Data reads a shard (a task), an actor turns it into one or more tables (the engine), a task writes them
under the shard's number, each by rename. A shard is done when its file in the *last* output folder is
there, so after ``kill -9`` of anything a rerun computes just the missing shards and ends with the same files.
No id set is kept in memory and no finished shard is read again (Ray Data's own checkpointing does both).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.engines.actors import ShardWorker
from embedloom.engines.pool import PLAIN, Handling, stream
from embedloom.errors import DataError
from embedloom.progress import Progress
from embedloom.storage import Place

PART_PATTERN = "part-{:06d}.parquet"


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start`` to ``stop`` of one Parquet file."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work: consecutive rows, possibly over several files."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def part(self) -> str:
        """Name of its files."""
        return PART_PATTERN.format(self.index)


def plan_shards(
    files: list[tuple[str, int]], shard_rows: int, first_part: int = 0, by_file: bool = False
) -> list[Shard]:
    """Cut files, given as (name, row count) in order, into shards of ``shard_rows`` (the last may be shorter).

    Part numbers count up from ``first_part``; ``by_file`` starts a new shard at every file.
    """
    shards: list[Shard] = []
    pieces: list[Piece] = []
    room = shard_rows
    for name, rows in files:
        start = 0
        while start < rows:
            stop = min(rows, start + room)
            pieces.append(Piece(name, start, stop))
            room -= stop - start
            start = stop
            if room == 0 or (by_file and start == rows):
                shards.append(Shard(first_part + len(shards), tuple(pieces)))
                pieces, room = [], shard_rows
    if pieces:
        shards.append(Shard(first_part + len(shards), tuple(pieces)))
    return shards


def parquet_rows(place: Place, folder: str) -> list[tuple[str, int]]:
    """(name, row count) of every Parquet file of a folder, read from the footers only."""
    found = [(name, place.parquet_footer(name)[1]) for name in place.names(folder, ".parquet")]
    if not found:
        raise DataError(f"{place.uri}/{folder}: no Parquet file")
    return found


def read_shard(place: Place, shard: Shard) -> pa.Table:
    """Rows of one shard."""
    return pa.concat_tables(
        [place.read_table(piece.file).slice(piece.start, piece.stop - piece.start) for piece in shard.pieces]
    )


def _files(place: Place, folders: str | tuple[str, ...]) -> list[tuple[str, int]]:
    names = (folders,) if isinstance(folders, str) else folders
    return [file for name in names for file in parquet_rows(place, name)]


def run_sharded(
    *,
    stage: str,
    source: Place,
    source_folder: str | tuple[str, ...],
    output: Place,
    done_folder: str,
    shard_rows: int,
    worker: Callable[..., ShardWorker] | None,
    worker_arguments: dict[str, Any] | Callable[[], dict[str, Any]],
    pool: PoolConfig,
    unit: str = "rows",
    first_part: int = 0,
    by_file: bool = False,
    handling: Handling = PLAIN,
) -> list[str]:
    """Stream every missing shard through an actor pool.

    Args:
        stage: name on the progress lines and in errors.
        source: place whose ``source_folder`` (or several, in order) holds the input Parquet files.
        output: place of the tables, ``<folder>/part-000000.parquet``.
        done_folder: whose part marks a shard as done; workers return it last.
        shard_rows: rows per shard.
        worker: class of the actors; called with ``worker_arguments``.
        worker_arguments: a dict, or what makes it; then made only if a shard is missing.
        pool: actors and what each reserves.
        unit: name of a row on progress lines.
        first_part: number of the first part, where several calls share the output folders.
        by_file: no shard holds rows of two files.
        handling: see Handling.

    Returns:
        The names of all finished parts of this call, in order.

    Raises:
        StageError: a worker failed for another reason than bad input.
        UserError: a worker refused its input or config.
    """
    shards = plan_shards(_files(source, source_folder), shard_rows, first_part, by_file)
    finished = set(output.names(done_folder, ".parquet"))
    missing = [shard for shard in shards if f"{done_folder}/{shard.part}" not in finished]
    total = sum(shard.rows for shard in shards)
    progress = Progress(stage, total, unit, done=total - sum(shard.rows for shard in missing))
    if missing:
        for item in stream(
            stage=stage,
            items=len(missing),
            read=lambda item: read_shard(source, missing[item]),
            write=lambda item, folder, table: output.write_table(f"{folder}/{missing[item].part}", table),
            written=lambda item: output.exists(f"{done_folder}/{missing[item].part}"),
            worker=worker,
            worker_arguments=worker_arguments() if callable(worker_arguments) else worker_arguments,
            done_folder=done_folder,
            pool=pool,
            handling=handling,
            name=lambda item: missing[item].part,
        ):
            progress.advance(missing[item].rows)
    return [f"{done_folder}/{shard.part}" for shard in shards]
