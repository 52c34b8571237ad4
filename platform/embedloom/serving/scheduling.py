"""Admission and batching: which texts are computed next, who may wait, and the concurrent batches they are computed in."""

import asyncio
import contextlib
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from embedloom.serving.messages import BatchRecord, Lane, Vectors

# Which texts are computed next, and who may wait: plain bookkeeping over a clock that is handed in.
#
# Two lanes share the encoder: small requests (queries) and bulk. While both wait, each batch takes from the lane that
# has had the smaller share of tokens so far (start-time fair queuing), so a query waits for about one batch whatever
# the bulk lane holds, and bulk is never starved. Within a lane the oldest request is served first, its longest text
# first: under overload some requests are then answered, where texts taken from each in turn would let all of them expire.
#
# A request is admitted only if it will be answered in time at the measured rate, and those admitted before it still will.
# The rate is that of the encoder's full batches; ``measured`` states one before there was any. An endpoint that has become
# slower than it was when a request was admitted drops it before it is begun, not after it was computed for nobody.
#
# Ray's own ``@serve.batch`` can count tokens too, but it puts an item that does not fit at the back of its queue (a
# long document can starve behind short queries), fails an item above the budget, and recounts the whole batch for
# every item.


Clock = Callable[[], float]
LANES: tuple[Lane, ...] = ("query", "bulk")
_SMOOTHING = 0.2  # weight of the newest batch in the measured rate
_LONGEST_RETRY_SECONDS = 60.0
_LONE_BATCHES = 4  # after which a request does not wait for company
# Shares of the time a request came with that are kept free: as predicted when it is admitted, and whatever requests of the other
# lane come later. For a rate that falls by a tenth, and for what batches round up.
_SPARED_AT_FIRST = 0.3
_SPARED_ALWAYS = 0.2
_BATCH_SHARE = 0.05  # of a request's whole time, the most that one batch may take


@dataclass(slots=True)
class LaneLimits:
    """Sizes that may be changed at any time."""

    max_batch_tokens: int  # real tokens per batch
    wait_seconds: float  # how long a request may wait for company
    max_queued_tokens: int  # of each lane
    query_lane_tokens: int  # a request of at most so many is a small one
    query_lane_share: float  # of the tokens computed while both lanes wait
    request_seconds: float = math.inf  # within which a request is answered


@dataclass(slots=True, eq=False)
class Place:
    """Room in a lane's queue, held from before a request is tokenised until its last text is taken."""

    lane: Lane
    tokens: int
    seconds: float = math.inf  # that the request had when it came
    deadline: float = math.inf  # by the scheduler's clock


@dataclass(slots=True, eq=False)
class Waiting:
    """One request in the queue."""

    token_ids: Sequence[Sequence[int]]
    place: Place
    arrived: float
    order: list[int] = field(default_factory=list)  # its texts, longest first
    next: int = 0  # first of ``order`` not yet taken
    missing: int = 0  # texts without a vector
    gone: bool = False  # failed, or its client left
    vectors: Vectors | None = None
    started: float | None = None
    batches: list[BatchRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Order the texts."""
        lengths = [len(ids) for ids in self.token_ids]
        self.order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
        self.missing = len(lengths)


@dataclass(slots=True)
class _Queue:
    requests: deque[Waiting] = field(default_factory=deque)
    tokens: int = 0  # of places held
    served: float = 0.0  # tokens taken over the lane's share
    recent: float = 0.0  # tokens taken lately; halves in about the time a request has
    recent_at: float = 0.0  # when that was so


class Speed:
    """Tokens per second of an encoder, of batches as large as an overload makes them."""

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self._of_full_batches = False

    def state(self, tokens: int, seconds: float) -> None:
        """Replace what is known by one measurement."""
        self.tokens_per_second = tokens / max(seconds, 1e-6)
        self._of_full_batches = False

    def learn(self, tokens: int, seconds: float, full_tokens: float) -> None:
        """Learn from a batch.

        A small one takes longer a token, and says nothing of how long a queue takes; so it counts by its size, and only
        where it was faster than what is known.
        """
        seen, known = tokens / max(seconds, 1e-6), self.tokens_per_second
        fullness = min(1.0, 2 * tokens / full_tokens)
        if known is None or (fullness == 1.0 and not self._of_full_batches):
            self.tokens_per_second = seen
        elif fullness == 1.0 or seen > known:
            self.tokens_per_second = known + _SMOOTHING * fullness * (seen - known)
        self._of_full_batches |= fullness == 1.0


class Scheduler:
    """The two lanes of one encoder."""

    def __init__(self, limits: LaneLimits, clock: Clock) -> None:
        self.limits = limits
        self.speed = Speed()
        self.running_tokens = 0  # of batches that are being computed
        self._clock = clock
        self._queues: dict[Lane, _Queue] = {lane: _Queue() for lane in LANES}
        self._lone_batches = 0  # so many in a row held one request alone

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is computed."""
        return not self.running_tokens and not self.queued_tokens()

    def reserve(self, tokens: int, seconds_left: float | None = None) -> Place | None:
        """Room for a request of about so many tokens, or None where it would not be answered in time.

        Args:
            tokens: of all its texts.
            seconds_left: until it must be answered; None: all that a request has.
        """
        place = self._place(tokens, seconds_left)
        return place if self.resize(place, tokens) else None

    def resize(self, place: Place, tokens: int) -> bool:
        """Correct an estimate; False, and the room is given up, where the true number does not fit."""
        self.release(place)
        lane = self._lane_of(tokens)
        if self._seconds_too_many(lane, tokens, place) > 0:
            return False
        self._queues[lane].tokens += tokens
        place.lane, place.tokens = lane, tokens
        return True

    def release(self, place: Place) -> None:
        """Give up what is left of the room; harmless when repeated."""
        self._queues[place.lane].tokens -= place.tokens
        place.tokens = 0

    def add(self, token_ids: Sequence[Sequence[int]], place: Place) -> Waiting:
        """Queue a request (at least one text) whose room has its true size."""
        request = Waiting(token_ids, place, self._clock())
        queue, other = self._queues[place.lane], self._queues[_other(place.lane)]
        if not queue.requests and other.requests:
            # A lane that had nothing to do does not save up a claim.
            queue.served = max(queue.served, other.served)
        queue.requests.append(request)
        return request

    def withdraw(self, request: Waiting) -> None:
        """Take what is left of a request out of its queue."""
        request.gone = True
        self.release(request.place)
        requests = self._queues[request.place.lane].requests
        if request.next < len(request.order) and request in requests:
            requests.remove(request)

    def withdraw_late(self) -> list[Waiting]:
        """Withdraw requests, next in turn and not begun, that can no longer be answered in time; returns them."""
        rate, found = self.speed.tokens_per_second, []
        for queue in self._queues.values():
            while queue.requests and not queue.requests[0].next:
                request = queue.requests[0]
                seconds = request.place.tokens / rate if rate else 0.0
                if self._clock() + seconds <= request.place.deadline:
                    break
                self.withdraw(request)
                found.append(request)
        return found

    def take(self, most_tokens: int | None = None) -> list[tuple[Waiting, int]]:
        """(Request, text) pairs of the next batch, of at most so many tokens if that is less than a batch may have.

        The first text that does not fit opens the next batch; one above the whole budget has a batch of its own. Its
        tokens are running until ``finished``.
        """
        batch: list[tuple[Waiting, int]] = []
        room = min(self._full_tokens(), most_tokens or math.inf)
        while (lane := self._next_lane()) is not None:
            queue = self._queues[lane]
            request = queue.requests[0]
            position = request.order[request.next]
            length = len(request.token_ids[position])
            if batch and length > room:
                break
            self._count(queue, length, self._share(lane))
            request.place.tokens -= length
            request.next += 1
            if request.next == len(request.order):
                queue.requests.popleft()
            batch.append((request, position))
            room -= length
        if batch:
            alone = all(request is batch[0][0] for request, _ in batch)
            self._lone_batches = self._lone_batches + 1 if alone else 0
        return batch

    def _count(self, queue: _Queue, tokens: int, share: float) -> None:
        queue.served += tokens / share
        queue.tokens -= tokens
        queue.recent = self._recent(queue) + tokens
        queue.recent_at = self._clock()
        self.running_tokens += tokens

    def finished(self, tokens: int) -> None:
        """A batch of so many tokens is no longer being computed."""
        self.running_tokens -= tokens

    def seconds_until_batch(self) -> float | None:
        """How long to wait for more company: 0 when a batch is due, None when nothing waits.

        Requests that arrived during the last batch have waited already, so a busy encoder never idles here; nor does
        one that has long had one request at a time, as a single client's next one would only be late.
        """
        waiting = [request.arrived for queue in self._queues.values() for request in queue.requests]
        if not waiting:
            return None
        if self._lone_batches >= _LONE_BATCHES or self.queued_tokens() >= self._full_tokens():
            return 0.0
        return max(0.0, min(waiting) + self.limits.wait_seconds - self._clock())

    def queued_tokens(self, lane: Lane | None = None) -> int:
        """Tokens that wait, in one lane or both."""
        return sum(queue.tokens for name, queue in self._queues.items() if lane in (None, name))

    def computed(self, tokens: int, seconds: float) -> None:
        """Learn the encoder's speed from one batch."""
        self.speed.learn(tokens, seconds, self._full_tokens())

    def seconds_needed(self, tokens: int) -> float | None:
        """How long so many tokens take where nothing else waits; None while no rate is known."""
        rate = self.speed.tokens_per_second
        return None if rate is None else tokens / rate

    def retry_after_seconds(self, tokens: int, seconds_left: float | None = None) -> float:
        """When a request of so many tokens may fit: the time to compute what stands in its way."""
        excess = self._seconds_too_many(self._lane_of(tokens), tokens, self._place(tokens, seconds_left))
        return min(_LONGEST_RETRY_SECONDS, max(1.0, excess)) if math.isfinite(excess) else 1.0

    def _place(self, tokens: int, seconds_left: float | None) -> Place:
        seconds = self.limits.request_seconds if seconds_left is None else seconds_left
        return Place(self._lane_of(tokens), 0, seconds, self._clock() + seconds)

    def _seconds_too_many(self, lane: Lane, tokens: int, place: Place) -> float:
        """How long after now there would be room for a request; 0 where it may come now, inf where that is unknown."""
        rate = self.speed.tokens_per_second
        excess = self._queues[lane].tokens + tokens - self.limits.max_queued_tokens
        if rate is None:
            return math.inf if excess > 0 else 0.0
        seconds = max(0.0, excess / self._rate_of(lane, rate))
        left = place.deadline - self._clock()
        if not math.isfinite(left):
            return seconds
        needed = self._seconds_until_done(
            lane, self._queues[lane].tokens + tokens, 0, self._use(_other(lane))
        )
        late = needed + _SPARED_AT_FIRST * place.seconds - left
        return max(seconds, late, self._delay_too_many(lane, tokens, rate))

    def _seconds_until_done(self, lane: Lane, tokens: int, more: int, use: float = 0.0) -> float:
        """Until a lane has had so many tokens of its queue computed, at the measured rate.

        As if tokens could be cut at will: a lane gets its share while both wait, and everything when it waits alone.

        Args:
            lane: the lane.
            tokens: of its queue, from the front.
            more: tokens that the other lane gets beside those it has.
            use: share of the encoder that requests yet to come will take in the other lane.
        """
        both = (tokens + self._queues[_other(lane)].tokens + more) / (1.0 - use)
        rate = self.speed.tokens_per_second or math.inf
        return (self.running_tokens + min(tokens / self._share(lane), both)) / rate

    def _delay_too_many(self, lane: Lane, tokens: int, rate: float) -> float:
        """How much too late a request of one lane would make those that wait in the other; 0 where it does not."""
        other = _other(lane)
        worst, ahead, now = 0.0, 0, self._clock()
        for request in self._queues[other].requests:
            ahead += request.place.tokens
            left = request.place.deadline - now
            if ahead / rate > left:
                continue  # lost already, even if nobody else were served
            needed = self._seconds_until_done(other, ahead, tokens)
            worst = max(worst, needed + _SPARED_ALWAYS * request.place.seconds - left)
        return worst

    def _use(self, lane: Lane) -> float:
        """Share of the encoder that a lane took of late, at most what it is due."""
        rate = self.speed.tokens_per_second or math.inf
        lately = self._recent(self._queues[lane]) / (rate * self.limits.request_seconds)
        return min(lately, self._share(lane))

    def _recent(self, queue: _Queue) -> float:
        return queue.recent * math.exp((queue.recent_at - self._clock()) / self.limits.request_seconds)

    def _full_tokens(self) -> float:
        """Tokens of a full batch: as stated, or fewer where it would take too much of a request's time."""
        rate = self.speed.tokens_per_second or math.inf
        return min(self.limits.max_batch_tokens, max(1.0, _BATCH_SHARE * self.limits.request_seconds * rate))

    def _rate_of(self, lane: Lane, rate: float) -> float:
        both = all(queue.requests for queue in self._queues.values())
        return rate * (self._share(lane) if both else 1.0)

    def _lane_of(self, tokens: int) -> Lane:
        return "query" if tokens <= self.limits.query_lane_tokens else "bulk"

    def _next_lane(self) -> Lane | None:
        waiting: list[Lane] = [lane for lane in LANES if self._queues[lane].requests]
        if not waiting:
            return None
        first: Lane = min(waiting, key=self._served)
        return first

    def _served(self, lane: Lane) -> float:
        return self._queues[lane].served

    def _share(self, lane: Lane) -> float:
        share = self.limits.query_lane_share
        return share if lane == "query" else 1.0 - share


def _other(lane: Literal["query", "bulk"]) -> Lane:
    return "bulk" if lane == "query" else "query"


# The encoder's streams, fed batch by batch by the scheduler. Plain asyncio, no Ray.


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


# Batches computed side by side in one process, each by some of its cores.
#
# Between the products of a small model, the threads that share one wait for each other several hundred times a forward;
# while the event loop has one of the cores, the other waits too. Batches that need not wait for each other do not: on two
# cores, 64 clients, two streams of a thread answered 349 short texts a second, one of two threads 296.


class ComputeStreams:
    """Threads that each compute a batch at a time, and how many cores each of them uses."""

    def __init__(self, count: int, cores: int | None = None) -> None:
        """Build them.

        Args:
            count: streams; at least 1.
            cores: of all of them together; None: torch's setting is left alone.
        """
        self.threads: Sequence[ThreadPoolExecutor] = [
            ThreadPoolExecutor(1, thread_name_prefix=f"encode-{number}") for number in range(count)
        ]
        self._cores = cores

    def use_cores(self, alone: bool) -> None:
        """Give the calling thread its share of the cores, or all of them if no other stream computes."""
        if self._cores is None:
            return
        import torch

        wanted = self._cores if alone else max(1, self._cores // len(self.threads))
        # A setting of each thread: OpenMP keeps it by thread.
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
