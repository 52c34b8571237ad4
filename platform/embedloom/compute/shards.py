"""The Ray loops: tables streamed through actor pools, in exactly-once shards, and a function over many items in Ray tasks."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn, Protocol, TypeVar

import pyarrow as pa

from embedloom.compute.generation import EngineLostError
from embedloom.config.cluster import PoolConfig
from embedloom.core.progress import Progress, note
from embedloom.core.storage import Place
from embedloom.errors import DataError, EmbedloomError, StageError, last_line, one_line

# What stands inside the actors of a pipeline, and the rows that pass between its steps.


CLOSE_SECONDS = (
    10  # that a lost engine may take to end in order, and again its processes once they are killed
)
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
            return row_of(row, {}, self._failure)
        try:
            if self._starts is not None:
                self._starts.begin(int(row["position"]))
            tables = self._worker(from_ipc(row["tables"][0]))
            if self._done_folder is not None:
                check_last(tables, self._done_folder)
            return row_of(row, tables)
        except EngineLostError as error:
            # Ray starts the actor anew and gives it what it held; this process has nothing left to serve with.
            note("ray", f"{error}; this actor died and is started again")
            leave(self._worker)
        except EmbedloomError as error:
            return row_of(row, {}, error)


def leave(worker: Any) -> NoReturn:
    """End this process and every process that it started, so that the actor that Ray starts instead finds the GPU free.

    vLLM's engine on a GPU is a child that does not watch its parent (vllm 0.29, issue 55510): left behind, it would keep the
    memory. Where this process itself is killed, Ray ends its process group (RAY_process_group_cleanup_enabled).

    Args:
        worker: asked to ``close`` first, if it can, in the time that a healthy engine needs.
    """
    import psutil

    ending = Thread(target=getattr(worker, "close", lambda: None), daemon=True)
    ending.start()
    ending.join(CLOSE_SECONDS)
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(children, timeout=CLOSE_SECONDS)
    os._exit(1)


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
        weights: of the models that they load; see ``Handling``.
    """

    worker: Callable[..., PartWorker]
    arguments: dict[str, Any]
    pool: PoolConfig
    weights: "Weights" = ()


class LinkActor:
    """Adapts a PartWorker to Ray Data: one row, (position, name, failure), is one item."""

    def __init__(self, worker: Callable[..., PartWorker], arguments: dict[str, Any], threads: int) -> None:
        _use_threads(threads)
        self._worker, self._failure = _opened(worker, arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row in, one row out."""
        position, name, failure = int(batch["position"][0]), str(batch["name"][0]), batch["failure"][0]
        if not failure:
            try:
                if self._failure is not None:
                    raise self._failure
                self._worker(name)
            except EmbedloomError as error:
                failure = pickle.dumps(error)
        return {"position": [position], "name": [name], "failure": [failure]}


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


def row_of(row: Row, tables: dict[str, pa.Table], error: EmbedloomError | None = None) -> Row:
    """What passes between the steps; lists are never empty, so every block of rows has the same column types."""
    return {
        "position": row["position"],
        "item": row["item"],
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


# Functions over many items in Ray tasks: a bounded number at a time, our errors whole.


PLACEMENT_SECONDS = (
    600  # between two looks at whether a task has a place, where no pool says how long it may take
)

Item = TypeVar("Item")
Result = TypeVar("Result")
_RETRIES = 5  # of a task whose machine was lost; a task that raises is not tried again
_LEAST_AHEAD = 4


def run_tasks(
    stage: str,
    function: Callable[..., Result],
    items: Sequence[Item],
    *shared: Any,
    cpus: float = 0.5,
    pool: PoolConfig | None = None,
    beside_driver: bool = False,
) -> Iterator[Result]:
    """Yield ``function(item, *shared)`` of every item: in order, or with ``pool`` as they are done.

    Without ``pool`` as many tasks wait as run, so that a cluster which can grow sees what to grow for.

    Args:
        stage: named in errors.
        function: runs in a task; small and picklable.
        items: one task each.
        shared: further arguments, put into the object store once.
        cpus: what a task reserves.
        pool: what a task reserves instead, and how many run at once.
        beside_driver: on the driver's machine, for what only it has.

    Raises:
        UserError: the function raised one.
        StageError: anything else went wrong in it, or no task of the pool could be placed.
    """
    import ray

    options: dict[str, Any] = {"num_cpus": cpus} if pool is None else reserved(pool)
    if beside_driver:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    remote = ray.remote(function).options(**options, max_retries=_RETRIES)
    stored = [ray.put(one) for one in shared]
    submitted = (remote.remote(item, *stored) for item in items)

    def at_once() -> int:
        if pool is not None:
            return pool.max_actors
        return max(_LEAST_AHEAD, int(2 * ray.cluster_resources().get("CPU", 1) / max(cpus, _TASK_CPUS)))

    with stage_errors(stage):
        yield from in_flight(submitted, at_once, stage, pool)


def run_here(
    stage: str, function: Callable[..., Result], items: Sequence[Item], *shared: Any, **_: Any
) -> Iterator[Result]:
    """``run_tasks`` without Ray: in this process, one after another."""
    return (function(item, *shared) for item in items)


Tasks = Callable[..., Iterator[Any]]  # run_tasks or run_here


def reserved(pool: PoolConfig) -> dict[str, Any]:
    """What each actor or task of a pool reserves, as options of Ray."""
    return {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus or None,
        "memory": int(pool.memory_gib * 2**30) or None,
    }


@contextmanager
def stage_errors(stage: str) -> Iterator[None]:
    """Errors of Ray tasks and actors: ours as they were raised, others as a StageError that names the stage."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EmbedloomError):
            raise error.cause from error
        raise StageError(f"{stage}: a task failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise StageError(f"{stage}: {type(error).__name__}: {one_line(error)}") from error


def in_flight(
    references: Iterator[Any],
    at_once: int | Callable[[], int],
    stage: str,
    pool: PoolConfig | None = None,
    watch: tuple[Callable[[], None], float] | None = None,
) -> Iterator[Any]:
    """Yield the results of Ray tasks, ``at_once`` of them submitted; what is left at an error is cancelled.

    Args:
        references: submits a task when its next item is taken.
        at_once: tasks in flight; a function is asked anew for each, as a cluster may grow meanwhile.
        stage: named in errors.
        pool: None: results come in order. Else as they are done, and a task that has no place in the cluster is an error.
        watch: called whenever so many seconds pass without a result; what it raises ends the wait.
    """
    import ray

    waiting: list[Any] = []
    look, seconds = watch or (None, PLACEMENT_SECONDS if pool is None else pool.start_budget)

    def result() -> Any:
        while True:
            candidates = waiting[:1] if pool is None else waiting
            done, _ = ray.wait(candidates, num_returns=1, timeout=seconds)
            if done:
                waiting.remove(done[0])
                return ray.get(done[0])
            if look is not None:
                look()
            if pool is not None:
                _check_placement(stage, pool, ray.cluster_resources())

    try:
        for reference in references:
            waiting.append(reference)
            while len(waiting) >= (at_once() if callable(at_once) else at_once):
                yield result()
        while waiting:
            yield result()
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _check_placement(stage: str, pool: PoolConfig, total: dict[str, float]) -> None:
    """A long task is waited for; one that has no place in the cluster is not."""
    if total.get("CPU", 0.0) < pool.cpus or total.get("GPU", 0.0) < pool.gpus:
        raise no_place(stage, "no task", pool, total)


def no_place(
    stage: str, what: str, pool: PoolConfig, total: dict[str, float], free: dict[str, float] | None = None
) -> StageError:
    """What to raise where tasks or actors of a pool were not placed in time.

    Args:
        stage: named in the message.
        what: subject of "could be placed", as "no task".
        pool: what each asked for.
        total: what the cluster has.
        free: what of it nobody reserves; None: not said.
    """
    unused = "" if free is None else f", of which are free {free}"
    return StageError(
        f"{stage}: {what} could be placed in {pool.start_budget} s (start_seconds); each needs {pool.cpus:g} CPUs, "
        f"{pool.gpus:g} GPUs and {pool.memory_gib:g} GiB; the cluster has {total}{unused}"
    )


# Weights on the nodes before a pool starts: what an actor's constructor takes is then loading alone.


LOAD_BYTES_A_SECOND = (
    100e6  # the slowest that weights are read at, from a node's disk or a shared file system
)
Weights = tuple[Callable[[], Path], ...]  # each gives a model's local folder where it is called


def fetch_weights(stage: str, weights: Weights, pool: PoolConfig) -> int:
    """Have every node that may hold an actor of the pool fetch what the actors load; returns the bytes of all.

    The first task reserves what an actor does, so that a node is bought where none is up; the others run on the nodes that are up
    then. One that joins later fetches when its first actor opens the model.

    Raises:
        UserError: a model that cannot be had there.
        StageError: the first task found no place in the pool's ``start_budget``.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not weights:
        return 0
    one = pool.model_copy(update={"min_actors": 1, "max_actors": 1})
    ((first, size),) = run_tasks(stage, _fetched, [weights], pool=one)
    others = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != first
        and node["Resources"].get("CPU", 0) >= pool.cpus
        and node["Resources"].get("GPU", 0) >= pool.gpus
    ]
    task = ray.remote(num_cpus=0, max_retries=_RETRIES)(_fetched)
    references = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote(weights)
        for node in others
    ]
    with stage_errors(stage):
        for _ in in_flight(iter(references), max(1, len(references)), stage):
            pass
    return int(size)


def elsewhere(weights: Weights) -> Weights:
    """Weights that this machine has already: nothing where it is all of the cluster."""
    import ray

    if not weights or not ray.is_initialized():
        return ()
    return weights if sum(node["Alive"] for node in ray.nodes()) > 1 else ()


def _fetched(weights: Weights) -> tuple[str, int]:
    """This node, and the bytes of the models' files."""
    import ray

    files = [path for folder in weights for path in folder().rglob("*") if path.is_file()]
    return ray.get_runtime_context().get_node_id(), sum(path.stat().st_size for path in files)


# Streaming tables through a pool of Ray actors: read in tasks, compute in actors, write in tasks.
#
# Ray Data moves the items; this module hands it functions and brings errors back. Ray carries an exception of a
# task to the driver as text with its cause stripped, so an error of ours travels beside the data instead and is
# raised again here, whole: a bad row must end the command with its own message, not with Ray's.


_TASK_CPUS = 0.25  # reading and writing wait for disks more than they compute
_FINISH_CPUS = 0.5

Finish = Callable[[dict[str, pa.Table]], dict[str, pa.Table]]


@dataclass(frozen=True)
class Handling:
    """What happens to items around and inside the actors, where the defaults do not do.

    Attributes:
        prepare: what the worker is given of an item; runs in the reading task.
        prepare_cpus: what that task reserves, where preparing is more than reading.
        finish: from the worker's tables to those that are written; runs in the writing task, on CPUs the actors leave
            free. Names the done folder last in the worker's place.
        in_flight: items an actor works on at once; above 1 its worker is called by several threads.
        starts: counts how often each item was begun, and stops one that keeps killing actors.
        watch: called after every item; what it raises ends the run.
        weights: of the models that actors load; fetched on each node before the pool starts.
        links: further pools of the same pipeline, in order; each is given an item once its tables are written.
    """

    prepare: Callable[[pa.Table], pa.Table] | None = None
    prepare_cpus: float = _TASK_CPUS
    finish: Finish | None = None
    in_flight: int = 1
    starts: Starts | None = None
    watch: Callable[[], None] | None = None
    weights: Weights = ()
    links: tuple[Link, ...] = ()


PLAIN = Handling()


def stream(
    *,
    stage: str,
    items: Sequence[Any],
    read: Callable[[Any], pa.Table],
    write: Callable[[Any, str, pa.Table], None],
    written: Callable[[Any], bool],
    worker: Callable[..., ShardWorker] | None,
    worker_arguments: dict[str, Any],
    done_folder: str,
    pool: PoolConfig,
    handling: Handling = PLAIN,
    name: Callable[[Any], str] = str,
) -> Iterator[int]:
    """Run items through the pool and yield the place of each among them once its tables are written.

    Args:
        stage: named in errors.
        items: picklable; each says all that is to be known of one table, so that what tasks share stays small.
        read: the table of an item; runs in a task, and so holds nothing that grows with the items.
        write: stores (item, folder, table); runs in a task, in the order the worker named the folders.
        written: whether an item's last table is stored. When a machine is lost, Ray computes again what it had not yet
            fetched from there, also items whose tables are long on disk; those are passed by.
        worker: class of the actors; called with ``worker_arguments``. None: no actors, ``finish`` does the work.
        done_folder: what the worker must name last.
        pool: actors and what each reserves.
        handling: see Handling.
        name: of an item, as links are told it.

    Raises:
        UserError: the worker, its constructor, ``read`` or ``write`` raised one.
        StageError: anything else went wrong in them.
    """
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = _prepared(stage, None if worker is None else pool, handling)
    finish = handling.finish
    rows = [{"position": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset = dataset.map(_reading(read, handling.prepare, written), num_cpus=_reading_cpus(handling, pool))
    if worker is not None:
        checked = done_folder if finish is None else None
        arguments = (worker, worker_arguments, checked, pool.compute_threads, handling.starts)
        dataset = dataset.map_batches(
            PoolActor, fn_constructor_args=arguments, **_actors(pool, len(items), handling.in_flight)
        )
    task_cpus = _TASK_CPUS if finish is None else _FINISH_CPUS
    dataset = dataset.map(_writing(write, finish, done_folder, written, name), num_cpus=task_cpus)
    dataset = _linked(dataset, handling.links, len(items))
    with _told_by(stage, context.wait_for_min_actors_s), closing(iter(dataset.iter_rows())) as results:
        for row in results:
            if row["failure"]:
                raise pickle.loads(row["failure"])
            yield int(row["position"])
            if handling.watch is not None:
                handling.watch()


def _reading_cpus(handling: Handling, pool: PoolConfig) -> float:
    """What a reading task reserves; never what an actor does: such steps Ray Data runs in one process, the actor's."""
    cpus = handling.prepare_cpus
    return cpus - 0.001 if cpus == pool.cpus else cpus


def _prepared(stage: str, pool: PoolConfig | None, handling: Handling) -> int:
    """Have the weights of all pools on their nodes; returns the seconds that actors may then take to start."""
    pools = [] if pool is None else [(handling.weights, pool)]
    pools += [(link.weights, link.pool) for link in handling.links]
    budgets = [
        one.start_budget + fetch_weights(stage, weights, one) / LOAD_BYTES_A_SECOND for weights, one in pools
    ]
    return round(max(budgets, default=PLACEMENT_SECONDS))


@contextmanager
def _told_by(stage: str, start_seconds: int) -> Iterator[None]:
    """Errors that name the stage; a user's own pass as they are."""
    try:
        yield
    except StageError as error:
        raise StageError(f"{stage}: {error}") from error
    except EmbedloomError:
        raise
    except Exception as error:
        if "Timed out while starting actors" in str(error):  # Ray's words
            raise StageError(
                f"{stage}: its actors were not placed and loaded within {start_seconds} s; allowed: a larger start_seconds of "
                "the stage's pool or of the profile, or a pool that the cluster has room for"
            ) from error
        raise StageError(f"{stage}: a worker failed: {_cause(error)}") from error


def _linked(dataset: Any, links: tuple[Link, ...], items: int) -> Any:
    """The dataset with a pool for every link behind it."""
    for link in links:
        arguments = (link.worker, link.arguments, link.pool.compute_threads)
        dataset = dataset.map_batches(
            LinkActor, fn_constructor_args=arguments, **_actors(link.pool, items, 1)
        )
    return dataset


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
        **reserved(pool),
    }


def _reading(
    read: Callable[[Any], pa.Table],
    prepare: Callable[[pa.Table], pa.Table] | None,
    written: Callable[[Any], bool],
) -> Callable[[Row], Row]:
    def task(row: Row) -> Row:
        item = pickle.loads(row["item"])
        try:
            if written(item):
                return {**row_of(row, {}), "folders": [WRITTEN]}
            table = read(item)
            return row_of(row, {"": table if prepare is None else prepare(table)})
        except EmbedloomError as error:
            return row_of(row, {}, error)

    return task


def _writing(
    write: Callable[[Any, str, pa.Table], None],
    finish: Finish | None,
    done_folder: str,
    written: Callable[[Any], bool],
    name: Callable[[Any], str],
) -> Callable[[Row], Row]:
    def task(row: Row) -> Row:
        item, failure = pickle.loads(row["item"]), row["failure"]
        done = {"position": row["position"], "name": name(item)}
        if not failure and not passed_by(row):
            try:
                if written(item):
                    return {**done, "failure": b""}
                tables = {
                    folder: from_ipc(content)
                    for folder, content in zip(row["folders"], row["tables"], strict=True)
                }
                if finish is not None:
                    tables = finish(tables)
                    check_last(tables, done_folder)
                for folder, table in tables.items():
                    write(item, folder, table)
            except EmbedloomError as error:
                failure = pickle.dumps(error)
        return {**done, "failure": failure}

    return task


def _cause(error: BaseException) -> str:
    """The last line of the first traceback in Ray's text, which is the innermost error's own."""
    innermost = str(error).split("The above exception was the direct cause")[0]
    return last_line(innermost.strip() or type(error).__name__)


# Exactly-once shards: the one way a data stage streams rows through an actor pool.
#
# A table on disk is cut into shards by row number alone, so the cut never depends on the number of actors.
# Ray Data reads a shard (a task), an actor turns it into one or more tables (the engine), a task writes them
# under the shard's number, each by rename. A shard is done when its file in the *last* output folder is
# there, so after ``kill -9`` of anything a rerun computes just the missing shards and ends with the same files.
# No id set is kept in memory and no finished shard is read again (Ray Data's own checkpointing does both).


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
    return pa.concat_tables([place.read_rows(piece.file, piece.start, piece.stop) for piece in shard.pieces])


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
            items=missing,
            read=partial(read_shard, source),
            write=lambda shard, folder, table: output.write_table(f"{folder}/{shard.part}", table),
            written=lambda shard: output.exists(f"{done_folder}/{shard.part}"),
            worker=worker,
            worker_arguments=worker_arguments() if callable(worker_arguments) else worker_arguments,
            done_folder=done_folder,
            pool=pool,
            handling=handling,
            name=lambda shard: shard.part,
        ):
            progress.advance(missing[item].rows)
    return [f"{done_folder}/{shard.part}" for shard in shards]
