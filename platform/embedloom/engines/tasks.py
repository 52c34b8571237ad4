"""A function over many items in Ray tasks: a bounded number at a time, results in order, our errors whole."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from embedloom.errors import EmbedloomError, StageError, one_line

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
) -> Iterator[Result]:
    """Yield ``function(item, *shared)`` of every item, in order.

    Args:
        stage: named in errors.
        function: runs in a task; small and picklable.
        items: one task each.
        shared: further arguments, put into the object store once.
        cpus: what a task reserves.

    Raises:
        UserError: the function raised one.
        StageError: anything else went wrong in it.
    """
    import ray

    remote = ray.remote(num_cpus=cpus, max_retries=_RETRIES)(function)
    stored = [ray.put(one) for one in shared]
    ahead = max(_LEAST_AHEAD, int(ray.cluster_resources().get("CPU", 1) / cpus))
    waiting: list[Any] = []
    try:
        for item in items:
            waiting.append(remote.remote(item, *stored))
            if len(waiting) >= ahead:
                yield ray.get(waiting.pop(0))
        while waiting:
            yield ray.get(waiting.pop(0))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EmbedloomError):
            raise error.cause from error
        raise StageError(f"{stage}: a task failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise StageError(f"{stage}: {type(error).__name__}: {one_line(error)}") from error
