"""Writing the files of a merge: one after another in this process, or spread over Ray tasks."""

from collections.abc import Iterator, Sequence
from typing import Any

from embedloom.config.resources import PoolConfig
from embedloom.errors import EmbedloomError, StageError, last_line
from embedloom.merging.layout import WeightFile
from embedloom.merging.plan import MergePlan
from embedloom.merging.writer import write_file
from embedloom.progress import Progress
from embedloom.storage import Place

_PLACEMENT_SECONDS = 600.0


def write_here(
    plan: MergePlan, files: Sequence[WeightFile], place: Place, threads: int, progress: Progress
) -> None:
    """Write files without Ray, each with all threads."""
    for file in files:
        write_file(plan, file, place, threads, progress.advance)


def write_with_ray(
    plan: MergePlan, files: Sequence[WeightFile], place: Place, pool: PoolConfig, progress: Progress
) -> None:
    """Write files in Ray tasks, at most ``pool.max_actors`` at a time; a task whose worker dies is run again.

    Raises:
        EmbedloomError: whatever a task raised.
        StageError: a task could not be placed, or died too often.
    """
    import ray
    from ray.exceptions import RayError

    task = ray.remote(_task).options(
        num_cpus=pool.cpus, num_gpus=pool.gpus or None, memory=int(pool.memory_gib * 2**30) or None
    )
    shared = ray.put(plan)
    waiting: Iterator[WeightFile] = iter(files)
    running: dict[Any, WeightFile] = {}
    try:
        while True:
            while len(running) < pool.max_actors and (file := next(waiting, None)) is not None:
                running[task.remote(shared, file, place.absolute(), pool.compute_threads)] = file
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1, timeout=_PLACEMENT_SECONDS)
            if not done:
                _check_placement(pool, ray.cluster_resources())
                continue
            file = running.pop(done[0])
            failure = ray.get(done[0])
            if failure is not None:
                raise failure
            progress.advance(sum(info.nbytes for info in file.infos))
    except RayError as error:
        raise StageError(f"merge: a task failed: {last_line(error)}") from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _task(plan: MergePlan, file: WeightFile, place: Place, threads: int) -> EmbedloomError | None:
    """Ray carries exceptions as text; an error of ours travels as a value and is raised again by the driver."""
    try:
        write_file(plan, file, place, threads)
    except EmbedloomError as error:
        return error
    return None


def _check_placement(pool: PoolConfig, total: dict[str, float]) -> None:
    """A long task is waited for; one that has no place in the cluster is not."""
    if total.get("CPU", 0.0) < pool.cpus or total.get("GPU", 0.0) < pool.gpus:
        raise StageError(
            f"merge: no task could be placed in {_PLACEMENT_SECONDS:.0f} s; each needs {pool.cpus:g} CPUs and "
            f"{pool.gpus:g} GPUs; the cluster has {total}"
        )
