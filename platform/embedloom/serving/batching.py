"""The encoder's one thread, fed batch by batch by the scheduler. Plain asyncio, no Ray."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from embedloom.serving.messages import BatchRecord, Vectors
from embedloom.serving.scheduling import LaneLimits, Place, Scheduler, Waiting

Run = Callable[[Sequence[Sequence[int]]], Vectors]


class TokenBatcher:
    """Runs the token ids of concurrent requests through a function, batch by batch, in one thread."""

    def __init__(self, run: Run, limits: LaneLimits, thread: ThreadPoolExecutor | None = None) -> None:
        """Build one; it starts working with the first request.

        Args:
            run: turns token ids into float32 [n, dimension].
            limits: sizes of batches and queues.
            thread: where it runs; None: a thread of its own.
        """
        self.scheduler = Scheduler(limits, time.monotonic)
        self._run = run
        self._waiters: dict[Waiting, asyncio.Future[None]] = {}
        self._arrival = asyncio.Event()
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, token_ids: Sequence[Sequence[int]], place: Place) -> tuple[Vectors, Waiting]:
        """Queue one request (at least one text) in its place and wait until all its vectors are there.

        Cancelling the caller takes what is left of the request out of the queue.
        """
        loop = asyncio.get_running_loop()
        request = self.scheduler.add(token_ids, place)
        self._waiters[request] = done = loop.create_future()
        self._arrival.set()
        if self._loop_task is None:
            self._loop_task = loop.create_task(self._work())
        try:
            await done
        finally:
            del self._waiters[request]
            self.scheduler.withdraw(request)
        if request.vectors is None:
            raise RuntimeError("a request was called done without vectors")
        return request.vectors, request

    async def close(self) -> None:
        """Stop working; requests still waiting are cancelled."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        for done in self._waiters.values():
            done.cancel()
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        while True:
            while (seconds := self.scheduler.seconds_until_batch()) != 0:
                self._arrival.clear()
                try:
                    await asyncio.wait_for(self._arrival.wait(), seconds)
                except TimeoutError:
                    break
            batch = self.scheduler.take()
            if batch:
                await self._encode(batch)

    async def _encode(self, batch: list[tuple[Waiting, int]]) -> None:
        ids = [request.token_ids[position] for request, position in batch]
        started = time.monotonic()
        for request, _ in batch:
            request.started = request.started or started
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, ids)
        except (
            Exception
        ) as error:  # whatever the model raised belongs to this batch's requests, not to the loop
            for request, _ in batch:
                self._fail(request, error)
            return
        seconds, tokens = time.monotonic() - started, sum(map(len, ids))
        self.scheduler.computed(tokens, seconds)
        batch[0][0].batches.append(BatchRecord(len(ids), tokens, seconds))
        for row, (request, position) in enumerate(batch):
            self._deliver(request, position, vectors[row])

    def _deliver(self, request: Waiting, position: int, vector: Vectors) -> None:
        if request.gone:
            return
        if request.vectors is None:
            request.vectors = np.empty((len(request.token_ids), len(vector)), dtype=np.float32)
        request.vectors[position] = vector
        request.missing -= 1
        done = self._waiters.get(request)
        if request.missing == 0 and done is not None and not done.done():
            done.set_result(None)

    def _fail(self, request: Waiting, error: Exception) -> None:
        self.scheduler.withdraw(request)
        done = self._waiters.get(request)
        if done is not None and not done.done():
            done.set_exception(error)
