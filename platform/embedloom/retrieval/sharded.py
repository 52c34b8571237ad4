"""Exact search over a cluster: the document matrix in shares over actors, partial results merged as they come.

Each actor keeps its share in memory (on its GPU's node, or streamed from disk where it does not fit) and sees every
block of queries; so the matrix is read once, not once per block. The result is that of one process, bit for bit,
because a pair's score depends on the pair alone and ties are broken by id.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from embedloom.config.resources import PoolConfig
from embedloom.engines.tasks import in_flight, reserved, stage_errors
from embedloom.retrieval.exact import Matrix, Positions
from embedloom.retrieval.search import TopK, merge_top_k
from embedloom.retrieval.vectors import MEMORY_BYTES, VectorCatalogue, VectorStore

_AHEAD = 3  # query blocks in flight, so that no actor waits for the others' merge
_RESTARTS = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """One block of queries: vectors [n, d], and pairs (query row, document position) to score besides."""

    queries: Matrix
    rows: Positions
    positions: Positions


class SearchTask(Protocol):
    """What is asked and what becomes of the answers; put into the object store once, used in many tasks."""

    def read(self, number: int) -> Asked:
        """The block of queries of a number."""
        ...

    def finish(self, number: int, found: TopK, scores: Matrix) -> None:
        """Store a block's top k and pair scores (NaN where the document is unknown)."""
        ...


class _Share:
    """Actor that searches one share of the blocks."""

    def __init__(self, catalogue: VectorCatalogue, share: tuple[int, int], memory: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._store = VectorStore(catalogue, memory, share)

    def search(self, asked: Asked, k: int) -> tuple[TopK, Matrix]:
        return self._store.search_and_score(asked.queries, k, asked.rows, asked.positions)


def merge_shares(parts: list[tuple[TopK, Matrix]], k: int) -> tuple[TopK, Matrix]:
    """Top k and pair scores of all shares: a pair's score comes from the one share that has its document."""
    best = merge_top_k([top for top, _ in parts], k)
    scores = np.stack([scores for _, scores in parts])
    found = ~np.isnan(scores)
    return best, np.where(
        found.any(axis=0), np.take_along_axis(scores, found.argmax(axis=0)[None], axis=0)[0], np.nan
    )


def _read(task: SearchTask, number: int) -> Asked:
    return task.read(number)


def _conclude(task: SearchTask, number: int, k: int, *parts: tuple[TopK, Matrix]) -> int:
    task.finish(number, *merge_shares(list(parts), k))
    return number


def search_sharded(
    *,
    stage: str,
    catalogue: VectorCatalogue,
    items: int,
    task: SearchTask,
    k: int,
    pool: PoolConfig,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[int]:
    """Search blocks of queries over the pool's actors and yield each block's number once it is finished.

    Args:
        stage: named in errors.
        catalogue: the documents.
        items: number of query blocks.
        task: gives the blocks and stores the results, in Ray tasks.
        k: documents wanted per query; 0 only scores the pairs.
        pool: actors and what each reserves.
        memory_bytes: vectors an actor keeps; the rest of its share is read again for every block.

    Raises:
        UserError: bad vectors, or one that the task raised.
        StageError: anything else went wrong in an actor or a task.
    """
    import ray

    shares = max(1, min(pool.max_actors, len(catalogue.names)))
    actor = ray.remote(**reserved(pool), max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(_Share)
    shared = ray.put(catalogue)
    actors = [actor.remote(shared, (n, shares), memory_bytes, pool.compute_threads) for n in range(shares)]
    light = ray.remote(num_cpus=0.25, max_retries=_RESTARTS)
    reading, concluding, work = light(_read), light(_conclude), ray.put(task)

    def submitted() -> Iterator[Any]:
        for number in range(items):
            asked = reading.remote(work, number)
            yield concluding.remote(work, number, k, *(each.search.remote(asked, k) for each in actors))

    try:
        with stage_errors(stage):
            yield from in_flight(submitted(), _AHEAD, stage)
    finally:
        for each in actors:
            ray.kill(each)
