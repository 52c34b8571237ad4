"""Functions over many items in Ray tasks: a bounded number at a time, our errors whole."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from embedloom.config.resources import PoolConfig
from embedloom.errors import EmbedloomError, StageError, one_line

# What cannot be placed must say so, not wait for the half hour that is Ray's default.
PLACEMENT_SECONDS = 600

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
) -> Iterator[Result]:
    """Yield ``function(item, *shared)`` of every item: in order, or with ``pool`` as they are done.

    Args:
        stage: named in errors.
        function: runs in a task; small and picklable.
        items: one task each.
        shared: further arguments, put into the object store once.
        cpus: what a task reserves.
        pool: what a task reserves instead, and how many run at once.

    Raises:
        UserError: the function raised one.
        StageError: anything else went wrong in it, or no task of the pool could be placed.
    """
    import ray

    options = {"num_cpus": cpus} if pool is None else reserved(pool)
    remote = ray.remote(function).options(**options, max_retries=_RETRIES)
    stored = [ray.put(one) for one in shared]
    at_once = max(_LEAST_AHEAD, int(ray.cluster_resources().get("CPU", 1) / cpus))
    submitted = (remote.remote(item, *stored) for item in items)
    with stage_errors(stage):
        yield from in_flight(submitted, at_once if pool is None else pool.max_actors, stage, pool)


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
    references: Iterator[Any], at_once: int, stage: str, pool: PoolConfig | None = None
) -> Iterator[Any]:
    """Yield the results of Ray tasks, ``at_once`` of them submitted; what is left at an error is cancelled.

    Args:
        references: submits a task when its next item is taken.
        at_once: tasks in flight.
        stage: named in errors.
        pool: None: results come in order. Else as they are done, and a task that has no place in the cluster is an error.
    """
    import ray

    waiting: list[Any] = []

    def result() -> Any:
        while True:
            candidates = waiting[:1] if pool is None else waiting
            done, _ = ray.wait(candidates, num_returns=1, timeout=PLACEMENT_SECONDS)
            if done:
                waiting.remove(done[0])
                return ray.get(done[0])
            if pool is not None:
                _check_placement(stage, pool, ray.cluster_resources())

    try:
        for reference in references:
            waiting.append(reference)
            if len(waiting) >= at_once:
                yield result()
        while waiting:
            yield result()
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _check_placement(stage: str, pool: PoolConfig, total: dict[str, float]) -> None:
    """A long task is waited for; one that has no place in the cluster is not."""
    if total.get("CPU", 0.0) < pool.cpus or total.get("GPU", 0.0) < pool.gpus:
        raise no_place(stage, "task", pool, total)


def no_place(stage: str, what: str, pool: PoolConfig, total: dict[str, float]) -> StageError:
    """What to raise where no task or actor of a pool was placed in time."""
    return StageError(
        f"{stage}: no {what} could be placed in {PLACEMENT_SECONDS} s; each needs {pool.cpus:g} CPUs, "
        f"{pool.gpus:g} GPUs and {pool.memory_gib:g} GiB; the cluster has {total}"
    )
