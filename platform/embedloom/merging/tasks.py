"""Writing the files of a merge: one after another in this process, or spread over Ray tasks."""

from collections.abc import Sequence

from embedloom.config.resources import PoolConfig
from embedloom.engines.tasks import run_tasks
from embedloom.merging.layout import WeightFile
from embedloom.merging.plan import MergePlan
from embedloom.merging.writer import write_file
from embedloom.progress import Progress
from embedloom.storage import Place


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
    shared = (plan, place.absolute(), pool.compute_threads)
    for nbytes in run_tasks("merge", _write, files, *shared, pool=pool):
        progress.advance(nbytes)


def _write(file: WeightFile, plan: MergePlan, place: Place, threads: int) -> int:
    write_file(plan, file, place, threads)
    return sum(info.nbytes for info in file.infos)
