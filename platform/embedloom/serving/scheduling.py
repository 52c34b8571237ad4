"""Which texts are computed next, and who may wait: plain bookkeeping over a clock that is handed in.

Two lanes share the encoder: small requests (queries) and bulk. While both wait, each batch takes from the lane that
has had the smaller share of tokens so far (start-time fair queuing), so a query waits for about one batch whatever
the bulk lane holds, and bulk is never starved. Within a lane every request gives one text in turn, its longest
first: texts of like length share a batch, which matters to encoders that pad.

Ray's own ``@serve.batch`` can count tokens too, but it puts an item that does not fit at the back of its queue (a
long document can starve behind short queries), fails an item above the budget, and recounts the whole batch for
every item.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from embedloom.serving.messages import BatchRecord, Lane, Vectors

Clock = Callable[[], float]
LANES: tuple[Lane, ...] = ("query", "bulk")
_SMOOTHING = 0.2  # weight of the newest batch in the measured rate
_LONGEST_RETRY_SECONDS = 60.0
_LONE_BATCHES = 4  # after which a request does not wait for company


@dataclass(slots=True)
class LaneLimits:
    """Sizes that may be changed at any time."""

    max_batch_tokens: int  # real tokens per batch
    wait_seconds: float  # how long a request may wait for company
    max_queued_tokens: int  # of each lane
    query_lane_tokens: int  # a request of at most so many is a small one
    query_lane_share: float  # of the tokens computed while both lanes wait


@dataclass(slots=True, eq=False)
class Place:
    """Room in a lane's queue, held from before a request is tokenised until its last text is taken."""

    lane: Lane
    tokens: int


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


class Scheduler:
    """The two lanes of one encoder."""

    def __init__(self, limits: LaneLimits, clock: Clock) -> None:
        self.limits = limits
        self._clock = clock
        self._queues: dict[Lane, _Queue] = {lane: _Queue() for lane in LANES}
        self._tokens_per_second: float | None = None
        self._lone_batches = 0  # so many in a row held one request alone

    def reserve(self, tokens: int) -> Place | None:
        """Room for a request of about so many tokens, or None where its lane is full."""
        place = Place(self._lane_of(tokens), 0)
        return place if self.resize(place, tokens) else None

    def resize(self, place: Place, tokens: int) -> bool:
        """Correct an estimate; False, and the room is given up, where the true number does not fit."""
        self.release(place)
        lane = self._lane_of(tokens)
        queue = self._queues[lane]
        if queue.tokens + tokens > self.limits.max_queued_tokens:
            return False
        queue.tokens += tokens
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

    def take(self, most_tokens: int | None = None) -> list[tuple[Waiting, int]]:
        """(Request, text) pairs of the next batch, of at most so many tokens if that is less than a batch may have.

        The first text that does not fit opens the next batch; one above the whole budget has a batch of its own.
        """
        batch: list[tuple[Waiting, int]] = []
        room = min(self.limits.max_batch_tokens, most_tokens or self.limits.max_batch_tokens)
        while (lane := self._next_lane()) is not None:
            queue = self._queues[lane]
            request = queue.requests[0]
            position = request.order[request.next]
            length = len(request.token_ids[position])
            if batch and length > room:
                break
            queue.requests.popleft()
            queue.served += length / self._share(lane)
            queue.tokens -= length
            request.place.tokens -= length
            request.next += 1
            if request.next < len(request.order):
                queue.requests.append(request)
            batch.append((request, position))
            room -= length
        if batch:
            alone = all(request is batch[0][0] for request, _ in batch)
            self._lone_batches = self._lone_batches + 1 if alone else 0
        return batch

    def seconds_until_batch(self) -> float | None:
        """How long to wait for more company: 0 when a batch is due, None when nothing waits.

        Requests that arrived during the last batch have waited already, so a busy encoder never idles here; nor does
        one that has long had one request at a time, as a single client's next one would only be late.
        """
        waiting = [request.arrived for queue in self._queues.values() for request in queue.requests]
        if not waiting:
            return None
        if self._lone_batches >= _LONE_BATCHES or self.queued_tokens() >= self.limits.max_batch_tokens:
            return 0.0
        return max(0.0, min(waiting) + self.limits.wait_seconds - self._clock())

    def queued_tokens(self, lane: Lane | None = None) -> int:
        """Tokens that wait, in one lane or both."""
        return sum(queue.tokens for name, queue in self._queues.items() if lane in (None, name))

    def computed(self, tokens: int, seconds: float) -> None:
        """Learn the encoder's speed from one batch."""
        rate = tokens / max(seconds, 1e-6)
        before = self._tokens_per_second
        self._tokens_per_second = rate if before is None else before + _SMOOTHING * (rate - before)

    def retry_after_seconds(self, tokens: int) -> float:
        """When a request of so many tokens may fit: the time to compute what stands in its way."""
        lane = self._lane_of(tokens)
        excess = self._queues[lane].tokens + tokens - self.limits.max_queued_tokens
        if self._tokens_per_second is None or excess <= 0:
            return 1.0
        both = all(queue.requests for queue in self._queues.values())
        rate = self._tokens_per_second * (self._share(lane) if both else 1.0)
        return min(_LONGEST_RETRY_SECONDS, max(1.0, excess / rate))

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
