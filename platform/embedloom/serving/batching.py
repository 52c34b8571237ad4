"""The encoder's streams, fed batch by batch by the scheduler. Plain asyncio, no Ray."""

import asyncio
import contextlib
import heapq
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from embedloom.serving.messages import BatchRecord, Vectors
from embedloom.serving.scheduling import LaneLimits, Place, Scheduler, Waiting

# Token ids, and whether the batch has the encoder to itself.
Run = Callable[[Sequence[Sequence[int]], bool], Vectors]
Batch = list[tuple[Waiting, int]]

# Below it, two batches cost more than one: MiniLM, one thread, 9.0 ms of CPU for a text of 14 tokens alone, 3.5 a text for
# four together, 3.0 for eight, no less for more.
_LEAST_SHARE_TOKENS = 64


class TooLate(Exception):
    """The encoder became too slow to answer a request that it had admitted."""


class TokenBatcher:
    """Runs the token ids of concurrent requests through a function, batch by batch, in one or several threads."""

    def __init__(self, run: Run, limits: LaneLimits, streams: Sequence[ThreadPoolExecutor]) -> None:
        """Build one; it starts working with the first request.

        Args:
            run: turns token ids into float32 [n, dimension].
            limits: sizes of batches and queues.
            streams: threads that each run a batch at a time.
        """
        self.scheduler = Scheduler(limits, time.monotonic)
        self._run = run
        self._waiters: dict[Waiting, asyncio.Future[None]] = {}
        self._news = asyncio.Event()  # a request arrived, or a stream is free
        self._streams = streams
        self._free = list(range(len(self._streams)))
        self._tasks: set[asyncio.Task[None]] = set()
        self._working = False

    async def submit(self, token_ids: Sequence[Sequence[int]], place: Place) -> tuple[Vectors, Waiting]:
        """Queue one request (at least one text) in its place and wait until all its vectors are there.

        Cancelling the caller takes what is left of the request out of the queue.

        Raises:
            TooLate: its turn came when it could not be answered in time any more.
        """
        request = self.scheduler.add(token_ids, place)
        self._waiters[request] = done = asyncio.get_running_loop().create_future()
        self._news.set()
        if not self._working:
            self._working = True
            self._start(self._work())
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
        for task in self._tasks:
            task.cancel()
        for done in self._waiters.values():
            done.cancel()
        for stream in self._streams:
            stream.shutdown(wait=False)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self) -> None:
        while True:
            seconds = self.scheduler.seconds_until_batch() if self._free else None
            if seconds != 0:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._news.wait()
                continue
            for request in self.scheduler.withdraw_late():
                self._fail(request, TooLate())
            if batch := self.scheduler.take(self._share()):
                # The lowest, so that a batch alone, which may use every core, always runs in the same thread: each that
                # ever does has OpenMP workers of its own.
                stream = heapq.heappop(self._free)
                self._start(self._encode(batch, stream))

    def _share(self) -> int | None:
        """The most tokens that a batch takes, so that the streams have about the same to do; None: what fits."""
        count = len(self._streams)
        if count == 1:
            return None
        tokens = self.scheduler.queued_tokens() + self.scheduler.running_tokens
        return max(_LEAST_SHARE_TOKENS, -(-tokens // count))

    async def _encode(self, batch: Batch, stream: int) -> None:
        try:
            await self._compute(batch, stream)
        finally:
            self.scheduler.finished(_tokens(batch))
            heapq.heappush(self._free, stream)
            self._news.set()

    async def _compute(self, batch: Batch, stream: int) -> None:
        ids = [request.token_ids[position] for request, position in batch]
        alone = len(self._free) == len(self._streams) - 1 and not self.scheduler.queued_tokens()
        started = time.monotonic()
        for request, _ in batch:
            request.started = request.started or started
        try:
            loop = asyncio.get_running_loop()
            vectors = await loop.run_in_executor(self._streams[stream], self._run, ids, alone)
        except (
            Exception
        ) as error:  # whatever the model raised belongs to this batch's requests, not to the loop
            for request, _ in batch:
                self._fail(request, error)
            return
        seconds, tokens = time.monotonic() - started, sum(map(len, ids))
        self.scheduler.computed(tokens, seconds / (len(self._streams) - len(self._free)))
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


def _tokens(batch: Batch) -> int:
    return sum(len(request.token_ids[position]) for request, position in batch)
