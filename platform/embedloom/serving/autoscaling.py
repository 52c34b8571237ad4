"""How many encoder replicas: by how long texts wait at the measured rate, not by how many requests there are.

Sixteen requests are sixteen queries of twenty tokens or sixteen of a hundred thousand, so a number of requests says little about
how late an answer is. Replicas report what they have queued, what they were asked for and how fast they compute
(``EncoderReplica.record_autoscaling_stats``); from it follows how many of them would keep texts waiting no longer than wanted.

Serve's controller runs ``QueueTimePolicy``, which is sent to it by value: this file imports nothing of the project.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a replica reports. The first two are counters since it began; demand counts what it refused too, or an endpoint that
# answers 429 would look as if it kept up.
DEMANDED_TOKENS = "demanded_tokens"
DEMANDED_REQUESTS = "demanded_requests"
QUEUED_TOKENS = "queued_tokens"  # waiting and being computed
TOKENS_PER_SECOND = "tokens_per_second"  # as measured; 0: not yet

REPORT_SECONDS = 1.0  # between two reports of a replica; Serve's own default is 10
WINDOW_SECONDS = 10.0  # over which the demand is taken; a step shows after two or three of them
_UTILISATION = (
    0.75  # of a replica that stays up for the demand: what it has left works off what comes at once
)
_DRAIN_SECONDS = (
    30.0  # in which what waits beyond the target is to be gone: about what a new replica takes to start
)
_TOLERANCE = 0.1  # of a replica, for which none is added
_SLACK = 0.4  # of a replica, that must be left over where one is taken away


@dataclass(frozen=True)
class Load:
    """What all replicas have to do.

    Attributes:
        queued_tokens: waiting for, or in, a computation.
        tokens_per_second: asked for of late.
        rate: tokens a second of one replica; 0 where none has measured any.
        waiting_requests: that no replica has taken yet.
        tokens_per_request: of late; 0 where there was none.
    """

    queued_tokens: float = 0.0
    tokens_per_second: float = 0.0
    rate: float = 0.0
    waiting_requests: float = 0.0
    tokens_per_request: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether nobody asks for anything."""
        return not (self.queued_tokens or self.tokens_per_second or self.waiting_requests)


def wanted_replicas(load: Load, target_seconds: float) -> float:
    """Replicas that keep up with the demand and bring the queue back to what it may be.

    Args:
        load: what there is to do; its rate is known.
        target_seconds: that a text may wait.

    Returns:
        How many, as a fraction; 0 where nobody asks.

    >>> wanted_replicas(Load(tokens_per_second=3000, rate=1000), 1.0)
    4.0
    >>> wanted_replicas(Load(queued_tokens=31000, rate=1000), 1.0)
    1.0
    """
    steady = load.tokens_per_second / (_UTILISATION * load.rate)
    waiting = load.queued_tokens + load.waiting_requests * load.tokens_per_request
    allowed = target_seconds * load.rate * max(1.0, steady)
    return steady + max(0.0, waiting - allowed) / (load.rate * _DRAIN_SECONDS)


@dataclass
class Scaler:
    """Turns a load, looked at again and again, into a number of replicas: up at once, down when it has long been less.

    Going by the most that was wanted within ``down_seconds`` keeps it from flapping: a dip shorter than that changes nothing.

    Attributes:
        target_seconds: that a text may wait.
        down_seconds: that fewer replicas must have been enough before any is taken away.
        zero_seconds: without anything asked for, after which none is left.
    """

    target_seconds: float
    down_seconds: float
    zero_seconds: float
    _wants: deque[tuple[float, float]] = field(
        default_factory=deque
    )  # falling in number, so the first is the most
    _busy_at: float | None = None  # when somebody last asked
    _began: float | None = None

    def decide(self, load: Load, replicas: int, now: float) -> int:
        """How many replicas there are to be.

        Args:
            load: what there is to do.
            replicas: that there are to be already.
            now: seconds, of any clock.
        """
        self._began = now if self._began is None else self._began
        if self._busy_at is None or not load.idle:
            self._busy_at = now
        if load.rate <= 0:  # nobody has computed anything, so nothing follows from tokens
            return max(replicas, 1 if load.waiting_requests else 0)
        want = wanted_replicas(load, self.target_seconds)
        while self._wants and self._wants[-1][1] <= want:
            self._wants.pop()
        self._wants.append((now, want))
        while self._wants[0][0] < now - self.down_seconds:
            self._wants.popleft()
        if now - self._busy_at >= self.zero_seconds:
            return 0
        if (more := math.ceil(want - _TOLERANCE)) > replicas:
            return more
        # What was wanted before this controller, or these settings, looked is not known: as many as there were.
        watched = now - self._began >= self.down_seconds
        return max(1, min(replicas, math.ceil(self._wants[0][1] + _SLACK))) if watched else replicas


def load_of(
    reports: Mapping[str, Mapping[Any, Sequence[Any]]], replicas: Iterable[Any], waiting: float
) -> Load:
    """The load that replicas reported.

    Args:
        reports: by name and replica, samples with ``timestamp`` and ``value``, oldest first (Serve's ``raw_metrics``).
        replicas: those that run.
        waiting: requests that none of them has taken yet.
    """
    running = list(replicas)
    queued = [_last(reports, QUEUED_TOKENS, one) for one in running]
    rates = [rate for one in running if (rate := _last(reports, TOKENS_PER_SECOND, one)) > 0]
    tokens = sum(_per_second(reports.get(DEMANDED_TOKENS, {}).get(one, ())) for one in running)
    requests = sum(_per_second(reports.get(DEMANDED_REQUESTS, {}).get(one, ())) for one in running)
    return Load(
        queued_tokens=sum(queued),
        tokens_per_second=tokens,
        rate=sum(rates) / len(rates) if rates else 0.0,
        waiting_requests=waiting,
        tokens_per_request=tokens / requests if requests else 0.0,
    )


def _last(reports: Mapping[str, Mapping[Any, Sequence[Any]]], name: str, replica: Any) -> float:
    samples = reports.get(name, {}).get(replica, ())
    return float(samples[-1].value) if samples else 0.0


def _per_second(samples: Sequence[Any]) -> float:
    """How fast a counter grew within the window; 0 where it has one sample."""
    recent = [one for one in samples if one.timestamp >= samples[-1].timestamp - WINDOW_SECONDS]
    if len(recent) < 2:
        return 0.0
    seconds = recent[-1].timestamp - recent[0].timestamp
    return max(0.0, float(recent[-1].value - recent[0].value)) / seconds if seconds > 0 else 0.0


class QueueTimePolicy:
    """Serve's custom autoscaling policy over ``Scaler``; Serve makes one for a deployment and asks it ten times a second."""

    def __init__(self, target_seconds: float, down_seconds: float, zero_seconds: float) -> None:
        """Build one; see ``Scaler``."""
        self._scaler = Scaler(target_seconds, down_seconds, zero_seconds)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state of Serve's keeping (``AutoscalingContext``)."""
        waiting = float(context.total_queued_requests or 0.0)
        load = load_of(context.raw_metrics or {}, context.running_replicas, waiting)
        return self._scaler.decide(load, context.target_num_replicas, float(context.current_time)), {}
