"""Replica-hours and waiting of `embedloom`'s scaling on queueing time beside Ray Serve's own on ongoing requests.

    python benchmarks/autoscaling.py [--quick] [--json]

Nothing is served: load traces (a step, a ramp, a day in four hours, bursts) run through a simulated fleet, second by second.
Replicas compute ``RATE`` tokens a second, take ``START_SECONDS`` to start, and share one queue in the order of arrival. Requests are
queries of 24 tokens and bulk requests of 8,000. Both policies are the real ones, called through Serve's own wrapper
(``_apply_autoscaling_config``) as its controller does, with what they would be told: ours what replicas report each second, Serve's
the requests in hand. Serve's runs with its defaults and 16 requests a replica, and, as the stronger peer, with our intervals and
delays and the target of requests (of 0.25 to 32) that costs the fewest replica-hours at a 99th percentile of waiting no worse than
ours: chosen per trace, afterwards, which no operator can.
"""

import argparse
import itertools
import json
import math
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ray.serve.autoscaling_policy as serves
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingConfig

from embedloom.serving.app import scaling_on_queue
from embedloom.serving.autoscaling import (
    DEMANDED_REQUESTS,
    DEMANDED_TOKENS,
    QUEUED_TOKENS,
    TOKENS_PER_SECOND,
    QueueTimePolicy,
)

RATE = 10_000.0  # tokens a second of a replica
START_SECONDS = 20.0
QUERY_TOKENS, BULK_TOKENS = 24, 8_000
MOST_REPLICAS = 16
KEPT_SECONDS = 40.0  # of what policies are told
Arrivals = tuple[float, float]  # queries and bulk requests a second
Trace = Callable[[float], Arrivals]


def step(now: float) -> Arrivals:
    """Ten minutes of half a replica's worth, then fifteen of four, then of half a one again."""
    return (100.0, 5.0) if 600 <= now < 1500 else (40.0, 0.6)


def ramp(now: float) -> Arrivals:
    """From nothing to six replicas' worth in twenty minutes, and back in as long."""
    share = now / 1200 if now < 1200 else max(0.0, 2 - now / 1200)
    return 200.0 * share, 7.5 * share


def daily(now: float) -> Arrivals:
    """A day in four hours: people ask by day, a batch comes by night."""
    day = 0.5 - 0.5 * math.cos(2 * math.pi * now / 14_400)
    night = 4.0 if 12_000 <= now < 13_200 else 0.0
    return 20 + 800 * day, 2.5 * day + night


def steady(now: float) -> Arrivals:
    """The same for an hour: what changes is chance."""
    return 100.0, 1.6


def bursts(now: float) -> Arrivals:
    """Two minutes in fifteen of bulk requests on top of quiet queries."""
    return 60.0, 4.0 if now % 900 < 120 else 0.1


TRACES: dict[str, tuple[Trace, float]] = {
    "step": (step, 3000.0),
    "ramp": (ramp, 3000.0),
    "daily": (daily, 14_400.0),
    "bursts": (bursts, 5400.0),
    "steady": (steady, 3600.0),
}


@dataclass(frozen=True)
class Outcome:
    """What a policy made of a trace.

    Attributes:
        replica_hours: that were paid for, those that start included.
        waited: seconds in the queue that 99 of 100 requests stayed below.
        turns: from adding replicas to taking them away, or back.
        decided_seconds: from each of the moments asked about to the next scaling up.
        most: replicas at any time.
    """

    replica_hours: float
    waited: float
    turns: int
    decided_seconds: list[float]
    most: int


class Fleet:
    """Replicas over one queue, and what policies are told of them."""

    def __init__(self, trace: Trace, seed: int, first: int = 1) -> None:
        self.now = 0.0
        self.target = first
        self.up = first
        self.history: list[tuple[float, int]] = []
        self.waits: list[tuple[float, float]] = []  # seconds and requests
        self._trace = trace
        self._random = random.Random(seed)
        self._starting: list[float] = []
        self._queue: deque[list[float]] = deque()  # arrival, tokens, requests
        self.queued_tokens = self.queued_requests = 0.0
        self._demanded = [0.0, 0.0]
        self._told: deque[tuple[float, float, float, float, float]] = deque()

    def tick(self) -> None:
        """One second: who has started serves, what arrives waits, what fits is computed."""
        self.now += 1.0
        self.up += sum(ready <= self.now for ready in self._starting)
        self._starting = [ready for ready in self._starting if ready > self.now]
        for rate, tokens in zip(self._trace(self.now), (QUERY_TOKENS, BULK_TOKENS), strict=True):
            count = float(self._poisson(rate))
            if count:
                self._queue.append([self.now, count * tokens, count])
                self.queued_tokens += count * tokens
                self.queued_requests += count
                self._demanded[0] += count * tokens
                self._demanded[1] += count
        in_service = min(self.queued_requests, float(self.up))
        self._compute(self.up * RATE)
        ongoing = self.queued_requests + in_service
        self._told.append((self.now, *self._demanded, self.queued_tokens, ongoing))
        while self._told[0][0] < self.now - KEPT_SECONDS:
            self._told.popleft()

    def _poisson(self, mean: float) -> int:
        if mean > 50:
            return max(0, round(self._random.gauss(mean, math.sqrt(mean))))
        limit, product, count = math.exp(-mean), self._random.random(), 0
        while product > limit:
            product *= self._random.random()
            count += 1
        return count

    def _compute(self, tokens: float) -> None:
        while self._queue and tokens > 0:
            arrived, own, requests = self._queue[0]
            done = min(own, tokens)
            share = requests * done / own
            self.waits.append((max(0.0, self.now - arrived), share))
            tokens -= done
            self.queued_tokens -= done
            self.queued_requests -= share
            if done == own:
                self._queue.popleft()
            else:
                self._queue[0] = [arrived, own - done, requests - share]

    def scale(self, target: int) -> None:
        """Begin replicas, or end them: those that have not started first."""
        if target != self.target:
            self.history.append((self.now, target))
        self.target = target
        while self.up + len(self._starting) > target:
            if self._starting:
                self._starting.pop()
            else:
                self.up -= 1
        self._starting += [self.now + START_SECONDS] * (target - self.up - len(self._starting))

    def ongoing(self, seconds: float, behind: float) -> float:
        """Requests in hand on average of the last seconds, as told so long ago."""
        last = self.now - behind
        found = [told[4] for told in self._told if last - seconds < told[0] <= last]
        return sum(found) / len(found) if found else 0.0

    def reports(self) -> dict[str, dict[str, list[Any]]]:
        """What replicas report, as Serve hands it on: here all of them through the first one."""
        recent = [told for told in self._told if self.now - 20 <= told[0] < self.now]  # sent a second ago
        series = {DEMANDED_TOKENS: 1, DEMANDED_REQUESTS: 2, QUEUED_TOKENS: 3}
        found = {
            name: {"r0": [TimeStampedValue(told[0], told[place]) for told in recent]}
            for name, place in series.items()
        }
        return found | {TOKENS_PER_SECOND: {"r0": [TimeStampedValue(self.now, RATE)]}}


def context(fleet: Fleet, config: AutoscalingConfig, state: dict[str, Any], ongoing: float) -> Any:
    """What Serve's controller tells a policy."""
    return SimpleNamespace(
        current_num_replicas=fleet.up,
        target_num_replicas=fleet.target,
        running_replicas=["r0"],
        total_num_requests=ongoing,
        total_queued_requests=0.0,
        raw_metrics=fleet.reports(),
        policy_state=dict(state),
        current_time=fleet.now,
        config=config,
    )


def simulate(
    name: str,
    config: AutoscalingConfig,
    policy: Callable[[Any], Any],
    marks: tuple[float, ...] = (),
    seed: int = 0,
) -> Outcome:
    """Run a trace under a policy, as Serve's controller asks it; ``marks``: when to see how long a decision takes."""
    trace, seconds = TRACES[name]
    fleet, hours, most, state = Fleet(trace, seed), 0.0, 1, dict[str, Any]()
    decide = serves._apply_autoscaling_config(policy)
    with mock.patch.object(serves, "time", SimpleNamespace(time=lambda: fleet.now)):
        while fleet.now < seconds:
            fleet.tick()
            # What was sent last is on average half an interval old.
            ongoing = fleet.ongoing(config.look_back_period_s, config.metrics_interval_s / 2)
            wanted, state = decide(context(fleet, config, state, ongoing))
            fleet.scale(min(config.max_replicas, max(config.min_replicas, math.ceil(wanted))))
            hours += fleet.target / 3600
            most = max(most, fleet.target)
    return Outcome(hours, _percentile(fleet.waits, 0.99), _turns(fleet), list(_delays(fleet, marks)), most)


def _turns(fleet: Fleet) -> int:
    """Changes of direction."""
    numbers = [1, *(number for _, number in fleet.history)]
    ways = [later > earlier for earlier, later in itertools.pairwise(numbers)]
    return sum(one != other for one, other in itertools.pairwise(ways))


def _percentile(waits: list[tuple[float, float]], share: float) -> float:
    total, seen = sum(count for _, count in waits), 0.0
    for seconds, count in sorted(waits):
        seen += count
        if seen >= share * total:
            return seconds
    return 0.0


def _delays(fleet: Fleet, marks: tuple[float, ...]) -> Iterator[float]:
    for mark in marks:
        later = [when for when, _ in fleet.history if when >= mark]
        yield later[0] - mark if later else math.inf


def ours(minimum: int = 1) -> tuple[AutoscalingConfig, Callable[[Any], Any]]:
    """The endpoint's own settings and policy."""
    config = scaling_on_queue(minimum, MOST_REPLICAS)
    return config, QueueTimePolicy(**config.policy.policy_kwargs)


def serves_default(target: float = 16.0, **changes: float) -> tuple[AutoscalingConfig, Callable[[Any], Any]]:
    """Serve's own policy, with its own settings or others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=1, max_replicas=MOST_REPLICAS, target_ongoing_requests=target, **changes
        )
    return config, serves.replica_queue_length_autoscaling_policy


def serves_best(name: str, waited: float, seed: int = 0) -> tuple[float, Outcome] | None:
    """The target of requests, with our intervals and delays, of fewest replica-hours that waits no longer; None: none does."""
    fast = {
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 180.0,
        "look_back_period_s": 10.0,
        "metrics_interval_s": 1.0,
    }
    found = []
    for power in range(-2, 6):
        outcome = simulate(name, *serves_default(2.0**power, **fast), seed=seed)
        if outcome.waited <= waited:
            found.append((outcome.replica_hours, 2.0**power, outcome))
    if not found:
        return None
    _, target, outcome = min(found)
    return target, outcome


def main() -> None:
    """Print the table, or its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without the day")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    given = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in [one for one in TRACES if one != "daily" or not given.quick]:
        own, default = simulate(name, *ours()), simulate(name, *serves_default())
        best = serves_best(name, own.waited)
        rows[name] = {
            "ours": [round(own.replica_hours, 2), own.waited, own.turns],
            "serve's defaults": [round(default.replica_hours, 2), default.waited, default.turns],
            "serve's best": None if best is None else [round(best[1].replica_hours, 2), best[1].waited, best[1].turns, best[0]],
        }  # fmt: skip
        print(f"{name:8}", rows[name], flush=True)
    hours = {who: sum(row[who][0] for row in rows.values()) for who in ("ours", "serve's defaults")}
    result = {
        "name": "autoscaling",
        "ours": round(hours["ours"], 2),
        "peer": round(hours["serve's defaults"], 2),
        "peer_name": "Ray Serve's policy on ongoing requests, its defaults",
        "ratio": round(hours["serve's defaults"] / hours["ours"], 2),
        "unit": "replica-hours",
        "equal": all(row["ours"][1] <= row["serve's defaults"][1] for row in rows.values()),
        "work": rows,
    }
    if given.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
