"""Streaming tables through a pool of Ray actors: read in tasks, compute in actors, write in tasks.

Ray Data moves the items; this module hands it functions and brings errors back. Ray carries an exception of a
task to the driver as text with its cause stripped, so an error of ours travels beside the data instead and is
raised again here, whole: a bad row must end the command with its own message, not with Ray's.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.engines.actors import (
    WRITTEN,
    Link,
    LinkActor,
    PoolActor,
    Row,
    ShardWorker,
    Starts,
    check_last,
    from_ipc,
    passed_by,
    row_of,
)
from embedloom.engines.tasks import PLACEMENT_SECONDS, reserved
from embedloom.errors import EmbedloomError, StageError, last_line

_TASK_CPUS = 0.25  # reading and writing wait for disks more than they compute
_FINISH_CPUS = 0.5

Finish = Callable[[dict[str, pa.Table]], dict[str, pa.Table]]


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
        links: further pools of the same pipeline, in order; each is given an item once its tables are written.
    """

    prepare: Callable[[pa.Table], pa.Table] | None = None
    finish: Finish | None = None
    in_flight: int = 1
    starts: Starts | None = None
    watch: Callable[[], None] | None = None
    links: tuple[Link, ...] = ()


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
    name: Callable[[int], str] = str,
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
        name: of an item, as links are told it.

    Raises:
        UserError: the worker, its constructor, ``read`` or ``write`` raised one.
        StageError: anything else went wrong in them.
    """
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = PLACEMENT_SECONDS
    finish = handling.finish
    dataset = ray.data.from_items(list(range(items)), override_num_blocks=items)
    dataset = dataset.map(_reading(read, handling.prepare, written), num_cpus=_TASK_CPUS)
    if worker is not None:
        checked = done_folder if finish is None else None
        arguments = (worker, worker_arguments, checked, pool.compute_threads, handling.starts)
        dataset = dataset.map_batches(
            PoolActor, fn_constructor_args=arguments, **_actors(pool, items, handling.in_flight)
        )
    task_cpus = _TASK_CPUS if finish is None else _FINISH_CPUS
    dataset = dataset.map(_writing(write, finish, done_folder, written), num_cpus=task_cpus)
    dataset = _linked(dataset, handling.links, items, name)
    with _told_by(stage), closing(iter(dataset.iter_rows())) as rows:
        for row in rows:
            if row["failure"]:
                raise pickle.loads(row["failure"])
            yield int(row["position"])
            if handling.watch is not None:
                handling.watch()


@contextmanager
def _told_by(stage: str) -> Iterator[None]:
    """Errors that name the stage; a user's own pass as they are."""
    try:
        yield
    except StageError as error:
        raise StageError(f"{stage}: {error}") from error
    except EmbedloomError:
        raise
    except Exception as error:
        raise StageError(f"{stage}: a worker failed: {_cause(error)}") from error


def _linked(dataset: Any, links: tuple[Link, ...], items: int, name: Callable[[int], str]) -> Any:
    """The dataset with a pool for every link behind it."""
    names = [name(item) for item in range(items)] if links else []
    for link in links:
        arguments = (link.worker, link.arguments, names, link.pool.compute_threads)
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
    read: Callable[[int], pa.Table],
    prepare: Callable[[pa.Table], pa.Table] | None,
    written: Callable[[int], bool],
) -> Callable[[Row], Row]:
    def task(row: Row) -> Row:
        try:
            if written(row["item"]):
                return {**row_of(row["item"], {}), "folders": [WRITTEN]}
            table = read(row["item"])
            return row_of(row["item"], {"": table if prepare is None else prepare(table)})
        except EmbedloomError as error:
            return row_of(row["item"], {}, error)

    return task


def _writing(
    write: Callable[[int, str, pa.Table], None],
    finish: Finish | None,
    done_folder: str,
    written: Callable[[int], bool],
) -> Callable[[Row], Row]:
    def task(row: Row) -> Row:
        failure = row["failure"]
        if not failure and not passed_by(row):
            try:
                if written(row["position"]):
                    return {"position": row["position"], "failure": b""}
                tables = {
                    folder: from_ipc(content)
                    for folder, content in zip(row["folders"], row["tables"], strict=True)
                }
                if finish is not None:
                    tables = finish(tables)
                    check_last(tables, done_folder)
                for folder, table in tables.items():
                    write(row["position"], folder, table)
            except EmbedloomError as error:
                failure = pickle.dumps(error)
        return {"position": row["position"], "failure": failure}

    return task


def _cause(error: BaseException) -> str:
    """The last line of the first traceback in Ray's text, which is the innermost error's own."""
    innermost = str(error).split("The above exception was the direct cause")[0]
    return last_line(innermost.strip() or type(error).__name__)
