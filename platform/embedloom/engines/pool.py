"""Streaming tables through a pool of Ray actors: read in tasks, compute in actors, write in tasks.

Ray Data moves the items; this module hands it functions and brings errors back. Ray carries an exception of a
task to the driver as text with its cause stripped, so an error of ours travels beside the data instead and is
raised again here, whole: a bad row must end the command with its own message, not with Ray's.
"""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.engines.protocol import EngineLostError
from embedloom.errors import EmbedloomError, StageError
from embedloom.storage import Place

# An actor that cannot be placed must say so, not wait for the half hour that is Ray's default.
PLACEMENT_TIMEOUT_SECONDS = 600
_TASK_CPUS = 0.25  # reading and writing wait for disks more than they compute
_FINISH_CPUS = 0.5
_WRITTEN = "written"  # in place of folders: nothing left to do

Row = dict[str, Any]
Finish = Callable[[dict[str, pa.Table]], dict[str, pa.Table]]


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


@dataclass(frozen=True)
class Handling:
    """What happens to items around and inside the actors, where the defaults do not do.

    Attributes:
        prepare: what the worker is given of an item; runs in the reading task.
        finish: from the worker's tables to those that are written; runs in the writing task, on CPUs the actors leave
            free. Names the done folder last in the worker's place.
        in_flight: items an actor works on at once; above 1 its worker is called by several threads.
        starts: counts how often each item was begun, and stops one that keeps killing actors.
        watch: called after every item; what it raises ends the run.
    """

    prepare: Callable[[pa.Table], pa.Table] | None = None
    finish: Finish | None = None
    in_flight: int = 1
    starts: Starts | None = None
    watch: Callable[[], None] | None = None


PLAIN = Handling()


def stream(
    *,
    stage: str,
    items: int,
    read: Callable[[int], pa.Table],
    write: Callable[[int, str, pa.Table], None],
    written: Callable[[int], bool],
    worker: Callable[..., ShardWorker] | None,
    worker_arguments: dict[str, Any],
    done_folder: str,
    pool: PoolConfig,
    handling: Handling = PLAIN,
) -> Iterator[int]:
    """Run items 0 to ``items`` - 1 through the pool and yield each number once its tables are written.

    Args:
        stage: named in errors.
        items: how many; each is one table in.
        read: the table of an item; runs in a task.
        write: stores (item, folder, table); runs in a task, in the order the worker named the folders.
        written: whether an item's last table is stored. When a machine is lost, Ray computes again what it had not yet
            fetched from there, also items whose tables are long on disk; those are passed by.
        worker: class of the actors; called with ``worker_arguments``. None: no actors, ``finish`` does the work.
        done_folder: what the worker must name last.
        pool: actors and what each reserves.
        handling: see Handling.

    Raises:
        UserError: the worker, its constructor, ``read`` or ``write`` raised one.
        StageError: anything else went wrong in them.
    """
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = PLACEMENT_TIMEOUT_SECONDS
    finish = handling.finish
    dataset = ray.data.from_items(list(range(items)), override_num_blocks=items)
    dataset = dataset.map(_reading(read, handling.prepare, written), num_cpus=_TASK_CPUS)
    if worker is not None:
        checked = done_folder if finish is None else None
        arguments = (worker, worker_arguments, checked, pool.compute_threads, handling.starts)
        dataset = dataset.map_batches(
            _PoolActor, fn_constructor_args=arguments, **_actors(pool, items, handling.in_flight)
        )
    task_cpus = _TASK_CPUS if finish is None else _FINISH_CPUS
    dataset = dataset.map(_writing(write, finish, done_folder, written), num_cpus=task_cpus)
    try:
        with closing(iter(dataset.iter_rows())) as rows:
            for row in rows:
                if row["failure"]:
                    raise pickle.loads(row["failure"])
                yield int(row["position"])
                if handling.watch is not None:
                    handling.watch()
    except StageError as error:
        raise StageError(f"{stage}: {error}") from error
    except EmbedloomError:
        raise
    except Exception as error:
        raise StageError(f"{stage}: a worker failed: {_cause(error)}") from error


def _actors(pool: PoolConfig, items: int, in_flight: int) -> dict[str, Any]:
    """Options of Ray Data for the pool; one row is one batch."""
    from ray.data import ActorPoolStrategy

    strategy = ActorPoolStrategy(
        min_size=min(pool.min_actors, items),
        max_size=min(pool.max_actors, items),
        max_concurrent_calls_per_actor=in_flight,
        enable_true_multi_threading=in_flight > 1,
    )
    return {
        "batch_size": 1,
        "compute": strategy,
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus or None,
        "memory": int(pool.memory_gib * 2**30) or None,
    }


def _reading(
    read: Callable[[int], pa.Table],
    prepare: Callable[[pa.Table], pa.Table] | None,
    written: Callable[[int], bool],
) -> Callable[[Row], Row]:
    def task(row: Row) -> Row:
        try:
            if written(row["item"]):
                return {**_row(row["item"], {}), "folders": [_WRITTEN]}
            table = read(row["item"])
            return _row(row["item"], {"": table if prepare is None else prepare(table)})
        except EmbedloomError as error:
            return _row(row["item"], {}, error)

    return task


def _writing(
    write: Callable[[int, str, pa.Table], None],
    finish: Finish | None,
    done_folder: str,
    written: Callable[[int], bool],
) -> Callable[[Row], Row]:
    def task(row: Row) -> Row:
        failure = row["failure"]
        if not failure and not _passed_by(row):
            try:
                if written(row["position"]):
                    return {"position": row["position"], "failure": b""}
                tables = {
                    folder: _from_ipc(content)
                    for folder, content in zip(row["folders"], row["tables"], strict=True)
                }
                if finish is not None:
                    tables = finish(tables)
                    _check_last(tables, done_folder)
                for folder, table in tables.items():
                    write(row["position"], folder, table)
            except EmbedloomError as error:
                failure = pickle.dumps(error)
        return {"position": row["position"], "failure": failure}

    return task


def _check_last(tables: dict[str, pa.Table], done_folder: str) -> None:
    """A shard counts as done when its file is in the last folder, so that folder must be written last."""
    if list(tables)[-1:] != [done_folder]:
        raise StageError(f"the worker returned folders {list(tables)}, expected {done_folder!r} last")


class _PoolActor:
    """Adapts a ShardWorker to Ray Data: one row is one item."""

    def __init__(
        self,
        worker: Callable[..., ShardWorker],
        arguments: dict[str, Any],
        done_folder: str | None,
        threads: int,
        starts: Starts | None = None,
    ) -> None:
        # Both ways: torch may be there already, or come with the worker, or (a second a start) not be needed.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(threads)
        self._done_folder = done_folder
        self._starts = starts
        self._failure: EmbedloomError | None = None
        try:
            self._worker = worker(**arguments)
        except EmbedloomError as error:
            # Raised here it would be one of Ray's actor deaths; it is reported with the first item instead.
            self._failure = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        row = {column: values[0] for column, values in batch.items()}
        done = row if row["failure"] or _passed_by(row) else self._work(row)
        return {column: [value] for column, value in done.items()}

    def _work(self, row: Row) -> Row:
        if self._failure is not None:
            return _row(row["position"], {}, self._failure)
        try:
            if self._starts is not None:
                self._starts.begin(int(row["position"]))
            tables = self._worker(_from_ipc(row["tables"][0]))
            if self._done_folder is not None:
                _check_last(tables, self._done_folder)
            return _row(row["position"], tables)
        except EngineLostError as error:
            # Ray starts the actor anew and gives it what it held; this process has nothing left to serve with.
            sys.stderr.write(f"{error}; this actor ends and is started again\n")
            sys.stderr.flush()
            os._exit(1)
        except EmbedloomError as error:
            return _row(row["position"], {}, error)


def _row(position: int, tables: dict[str, pa.Table], error: EmbedloomError | None = None) -> Row:
    """What passes between the steps; lists are never empty, so every block of rows has the same column types."""
    return {
        "position": position,
        "folders": list(tables) or [""],
        "tables": [_to_ipc(table) for table in tables.values()] or [b""],
        "failure": b"" if error is None else pickle.dumps(error),
    }


def _passed_by(row: Row) -> bool:
    return list(row["folders"]) == [_WRITTEN]


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _from_ipc(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def _cause(error: BaseException) -> str:
    """The last line of the first traceback in Ray's text, which is the innermost error's own."""
    innermost = str(error).split("The above exception was the direct cause")[0]
    lines = innermost.strip().splitlines()
    return lines[-1] if lines else type(error).__name__
