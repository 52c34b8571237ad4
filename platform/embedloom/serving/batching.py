"""Dynamic batches up to a token budget, taken from the waiting requests in turn. Plain asyncio, no Ray.

Ray's own ``@serve.batch`` can count tokens too, but it puts an item that does not fit at the back of its
queue (a long document can starve behind short queries), fails an item above the budget, and recounts the
whole batch for every item. Here each batch takes one text from each waiting request in turn, so a request of
one query is not stuck behind one of two thousand documents, and the first text that does not fit opens the
next batch.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedloom.serving.messages import BatchRecord

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Run = Callable[[Sequence[Sequence[int]]], Vectors]


@dataclass(slots=True, eq=False)
class Waiting:
    """One request in the queue."""

    token_ids: Sequence[Sequence[int]]
    done: "asyncio.Future[Vectors]"
    arrived: float
    next: int = 0  # first text not yet taken
    missing: int = 0  # texts without a vector
    vectors: Vectors | None = None
    started: float | None = None
    batches: list[BatchRecord] = field(default_factory=list)


def take_batch(queue: deque[Waiting], max_tokens: int) -> list[tuple[Waiting, int]]:
    """Take (request, text) pairs off the queue, one text per request in turn, until the budget is full.

    A text longer than the budget gets a batch of its own. Requests whose client has gone are dropped.
    """
    batch: list[tuple[Waiting, int]] = []
    room = max_tokens
    while queue:
        request = queue.popleft()
        if request.done.done():
            continue
        length = len(request.token_ids[request.next])
        if batch and length > room:
            queue.appendleft(request)
            break
        batch.append((request, request.next))
        room -= length
        request.next += 1
        if request.next < len(request.token_ids):
            queue.append(request)
    return batch


class TokenBatcher:
    """Runs the token ids of concurrent requests through a function, batch by batch, in one thread."""

    def __init__(self, run: Run, max_batch_tokens: int, wait_seconds: float) -> None:
        """Build one; it starts working with the first request.

        Args:
            run: turns token ids into float32 [n, dimension].
            max_batch_tokens: real tokens per batch; may be changed at any time.
            wait_seconds: how long a request may wait for company; may be changed at any time.
        """
        self.max_batch_tokens = max_batch_tokens
        self.wait_seconds = wait_seconds
        self._run = run
        self._queue: deque[Waiting] = deque()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, token_ids: Sequence[Sequence[int]]) -> Waiting:
        """Queue one request (at least one text) and wait until all its vectors are there.

        Cancelling the caller takes what is left of the request out of the queue.
        """
        loop = asyncio.get_running_loop()
        request = Waiting(token_ids, loop.create_future(), time.monotonic(), missing=len(token_ids))
        self._queue.append(request)
        self._arrival.set()
        if self._loop_task is None:
            self._loop_task = loop.create_task(self._work())
        await request.done
        return request

    @property
    def waiting(self) -> int:
        """Requests with texts no batch has taken yet."""
        return len(self._queue)

    async def close(self) -> None:
        """Stop working; requests still waiting are cancelled."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        for request in self._queue:
            request.done.cancel()
        self._queue.clear()
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        while True:
            await self._fill()
            batch = take_batch(self._queue, self.max_batch_tokens)
            if batch:
                await self._encode(batch)

    async def _fill(self) -> None:
        """Wait for work, then until the oldest request has waited its time or the budget is full.

        Requests that arrived during the last batch have waited already, so a busy replica never idles here.
        """
        while not self._queue:
            self._arrival.clear()
            await self._arrival.wait()
        deadline = self._queue[0].arrived + self.wait_seconds
        while (left := deadline - time.monotonic()) > 0 and self._tokens_waiting() < self.max_batch_tokens:
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                return

    def _tokens_waiting(self) -> int:
        return sum(len(ids) for request in self._queue for ids in request.token_ids[request.next :])

    async def _encode(self, batch: list[tuple[Waiting, int]]) -> None:
        ids = [request.token_ids[position] for request, position in batch]
        started = time.monotonic()
        for request, _ in batch:
            request.started = request.started or started
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, ids)
        except (
            Exception
        ) as error:  # whatever the model raised belongs to the requests of this batch, not to the loop
            for request, _ in batch:
                if not request.done.done():
                    request.done.set_exception(error)
            return
        seconds = time.monotonic() - started
        batch[0][0].batches.append(BatchRecord(len(ids), sum(map(len, ids)), seconds))
        for row, (request, position) in enumerate(batch):
            if request.vectors is None:
                request.vectors = np.empty((len(request.token_ids), vectors.shape[1]), dtype=np.float32)
            request.vectors[position] = vectors[row]
            request.missing -= 1
            if request.missing == 0 and not request.done.done():
                request.done.set_result(request.vectors)
