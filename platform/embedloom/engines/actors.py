"""What stands inside the actors of a pipeline, and the rows that pass between its steps."""

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.engines.protocol import EngineLostError
from embedloom.errors import EmbedloomError, StageError
from embedloom.progress import note
from embedloom.storage import Place

WRITTEN = "written"  # in place of folders: nothing left to do

Row = dict[str, Any]


class ShardWorker(Protocol):
    """What an actor of a pool does with one shard; built once per actor from keyword arguments."""

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Turn one shard into tables by output folder; the last folder named marks the shard done."""
        ...


@dataclass(frozen=True, slots=True)
class Starts:
    """Remembers how often actors began each item, so that an item that kills its engine does not do so for ever.

    Ray restarts a dead actor and gives it the same items again, which is right for a lost machine and endless for
    a poisonous prompt. A note is written before an item is worked on; ``run`` sets the notes of one driver apart.
    """

    place: Place
    run: str
    limit: int = 5

    def begin(self, item: int) -> None:
        """Note one more start.

        Raises:
            StageError: the item was begun ``limit`` times and never ended.
        """
        folder = f"{self.run}/{item}"
        begun = len(self.place.names(folder))
        if begun >= self.limit:
            raise StageError(
                f"item {item} was begun {begun} times and took its process with it every time; its rows, or those "
                "worked on beside them, kill the engine"
            )
        self.place.write_bytes(f"{folder}/{begun}", b"")


def check_last(tables: dict[str, pa.Table], done_folder: str) -> None:
    """A shard counts as done when its file is in the last folder, so that folder must be written last."""
    if list(tables)[-1:] != [done_folder]:
        raise StageError(f"the worker returned folders {list(tables)}, expected {done_folder!r} last")


class PoolActor:
    """Adapts a ShardWorker to Ray Data: one row is one item."""

    def __init__(
        self,
        worker: Callable[..., ShardWorker],
        arguments: dict[str, Any],
        done_folder: str | None,
        threads: int,
        starts: Starts | None = None,
    ) -> None:
        _use_threads(threads)
        self._done_folder = done_folder
        self._starts = starts
        self._worker, self._failure = _opened(worker, arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row in, one row out."""
        row = {column: values[0] for column, values in batch.items()}
        done = row if row["failure"] or passed_by(row) else self._work(row)
        return {column: [value] for column, value in done.items()}

    def _work(self, row: Row) -> Row:
        if self._failure is not None:
            return row_of(row["position"], {}, self._failure)
        try:
            if self._starts is not None:
                self._starts.begin(int(row["position"]))
            tables = self._worker(from_ipc(row["tables"][0]))
            if self._done_folder is not None:
                check_last(tables, self._done_folder)
            return row_of(row["position"], tables)
        except EngineLostError as error:
            # Ray starts the actor anew and gives it what it held; this process has nothing left to serve with.
            note("ray", f"{error}; this actor died and is started again")
            os._exit(1)
        except EmbedloomError as error:
            return row_of(row["position"], {}, error)


class PartWorker(Protocol):
    """What a link does with one item; its own output says whether it was done before."""

    def __call__(self, name: str) -> None:
        """Work on the item of this name, whose tables are written."""
        ...


@dataclass(frozen=True, slots=True)
class Link:
    """A further pool of a pipeline: each part goes to it when the pool before is done with it.

    Attributes:
        worker: class of its actors; called with ``arguments``.
        pool: actors and what each reserves.
    """

    worker: Callable[..., PartWorker]
    arguments: dict[str, Any]
    pool: PoolConfig


class LinkActor:
    """Adapts a PartWorker to Ray Data: one row, (position, failure), is one item."""

    def __init__(
        self, worker: Callable[..., PartWorker], arguments: dict[str, Any], names: Sequence[str], threads: int
    ) -> None:
        _use_threads(threads)
        self._names = names
        self._worker, self._failure = _opened(worker, arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row in, one row out."""
        position, failure = int(batch["position"][0]), batch["failure"][0]
        if not failure:
            try:
                if self._failure is not None:
                    raise self._failure
                self._worker(self._names[position])
            except EmbedloomError as error:
                failure = pickle.dumps(error)
        return {"position": [position], "failure": [failure]}


def _opened(worker: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, EmbedloomError | None]:
    """The worker, or why there is none, which is told with the first item: raised here it would be one of Ray's actor deaths."""
    try:
        return worker(**arguments), None
    except EmbedloomError as error:
        return None, error


def _use_threads(threads: int) -> None:
    # Both ways: torch may be there already, or come with the worker, or (a second a start) not be needed.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def row_of(position: int, tables: dict[str, pa.Table], error: EmbedloomError | None = None) -> Row:
    """What passes between the steps; lists are never empty, so every block of rows has the same column types."""
    return {
        "position": position,
        "folders": list(tables) or [""],
        "tables": [to_ipc(table) for table in tables.values()] or [b""],
        "failure": b"" if error is None else pickle.dumps(error),
    }


def passed_by(row: Row) -> bool:
    """Whether the item's tables were stored before."""
    return list(row["folders"]) == [WRITTEN]


def to_ipc(table: pa.Table) -> bytes:
    """A table as bytes, as rows carry it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_ipc(content: bytes) -> pa.Table:
    """The table of such bytes."""
    return pa.ipc.open_stream(content).read_all()
