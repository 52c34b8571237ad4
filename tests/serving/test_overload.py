"""Overload in simulation: an encoder of a known rate behind the scheduler, and time that only the simulation moves."""

import heapq
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.serving.scheduling import LaneLimits, Scheduler, Waiting

SECONDS = 20.0  # that a request has


@dataclass
class Simulation:
    """Requests (arrival, lengths of texts) at an encoder with streams; what became of each."""

    requests: list[tuple[float, list[int]]]
    tokens_per_second: float = 2000.0
    kept: float = 1.0  # share of the stated rate that the encoder keeps
    streams: int = 1
    share: float = 0.5
    limits: dict = field(default_factory=dict)
    now: float = 0.0
    answered: list[tuple[float, float, str, int]] = field(
        default_factory=list
    )  # arrival, seconds, lane, tokens
    refused: list[float] = field(default_factory=list)
    late: int = 0  # dropped before they were begun
    expired: int = 0

    def run(self) -> "Simulation":
        limits = LaneLimits(4096, 0.005, 600_000, 512, self.share, SECONDS)
        self.scheduler = Scheduler(limits, lambda: self.now)
        self.scheduler.speed.state(int(self.tokens_per_second), 1.0)
        self.free = self.streams
        self.events: list[tuple[float, int, object]] = []
        for number, (at, lengths) in enumerate(self.requests):
            self.events.append((at, number, lengths))
        heapq.heapify(self.events)
        self.number = len(self.events)
        self.done: dict[int, int] = {}
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            if isinstance(event, list):
                self._arrive(event)
            elif event is not None:
                self._finish(*event)
            self._start()
        return self

    def _at(self, time: float, event: object) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, event))

    def _arrive(self, lengths: list[int]) -> None:
        place = self.scheduler.reserve(sum(lengths))
        if place is None:
            self.refused.append(self.now)
            return
        request = self.scheduler.add([[1] * length for length in lengths], place)
        self.done[id(request)] = sum(lengths)

    def _start(self) -> None:
        while self.free:
            seconds = self.scheduler.seconds_until_batch()
            if seconds is None:
                return
            if seconds > 1e-9:
                return self._at(self.now + seconds, None)
            self.late += len(self.scheduler.withdraw_late())
            share = None
            if self.streams > 1:
                waiting = self.scheduler.queued_tokens() + self.scheduler.running_tokens
                share = max(64, -(-waiting // self.streams))
            batch = self.scheduler.take(share)
            if not batch:
                return
            tokens = sum(len(request.token_ids[position]) for request, position in batch)
            busy = tokens / (self.tokens_per_second * self.kept / self.streams)
            self.free -= 1
            self._at(self.now + busy, (batch, tokens, busy))

    def _finish(self, batch: list[tuple[Waiting, int]], tokens: int, busy: float) -> None:
        self.scheduler.computed(tokens, busy / (self.streams - self.free))
        self.scheduler.finished(tokens)
        self.free += 1
        for request, _ in batch:
            request.missing -= 1
            if request.missing == 0:
                seconds = self.now - request.arrived
                self.expired += seconds > SECONDS
                self.answered.append((request.arrived, seconds, request.place.lane, self.done[id(request)]))


def bulk(tokens: int, length: int = 250) -> list[int]:
    return [length] * (tokens // length) or [tokens]


def test_thirteen_requests_of_six_thousand_tokens_and_a_limit_of_twenty_seconds():
    """Each takes 3 s alone: 13 at once take 39 s. Six end within 18 s; the seventh would need 21."""
    seen = Simulation([(0.0, bulk(6000))] * 13).run()
    assert (seen.expired, seen.late) == (0, 0)
    assert 4 <= len(seen.answered) <= 6 and len(seen.answered) + len(seen.refused) == 13
    assert set(seen.refused) == {0.0}  # at once


def test_within_the_bound_the_oldest_is_answered_first():
    seen = Simulation([(0.001 * n, bulk(2000)) for n in range(8)]).run()
    assert [arrived for arrived, *_ in seen.answered] == sorted(arrived for arrived, *_ in seen.answered)
    assert not seen.refused


def test_a_request_that_can_never_be_answered_in_time_is_refused_and_one_that_can_is_not():
    assert Simulation([(0.0, bulk(42_000))]).run().refused == [0.0]
    assert Simulation([(0.0, bulk(27_000))]).run().answered


@dataclass(frozen=True)
class Load:
    """From a trickle to thirty times what the encoder can do; queries, bulk, and both."""

    seed: int
    factor: float
    queries: float  # share of the requests
    largest: int

    def requests(self) -> list[tuple[float, list[int]]]:
        generator = random.Random(self.seed)
        found, at = [], 0.0
        while at < 60.0 and len(found) < 1500:
            lengths = bulk(generator.randrange(513, self.largest), generator.choice([60, 250, 500]))
            if generator.random() < self.queries:
                lengths = [generator.randrange(5, 500)]
            found.append((at, lengths))
            at += generator.expovariate(1.0) * sum(lengths) / (2000.0 * self.factor)
        return found


def loads(*largest: int) -> st.SearchStrategy[Load]:
    return st.builds(
        Load, st.integers(0, 10**6), st.floats(0.3, 30.0), st.floats(0.0, 1.0), st.sampled_from(largest)
    )


SHARES = st.sampled_from([0.3, 0.5, 0.7])


@settings(deadline=None, max_examples=60)
@given(loads(2_000, 12_000, 30_000), st.floats(0.9, 1.3), st.sampled_from([1, 2]), SHARES)
def test_no_admitted_request_expires_while_the_rate_is_kept_within_a_tenth(load, kept, streams, share):
    requests = load.requests()
    seen = Simulation(requests, kept=kept, streams=streams, share=share).run()
    assert (seen.expired, seen.late) == (0, 0)
    assert seen.answered and len(seen.answered) + len(seen.refused) == len(requests)


@settings(deadline=None, max_examples=30)
@given(loads(2_000), st.floats(0.2, 0.9))
def test_an_encoder_that_became_slower_still_answers_some_in_time(load, kept):
    """What is too late by then is dropped before it is begun, so what is computed is computed for somebody."""
    seen = Simulation(load.requests(), kept=kept).run()
    in_time = sum(seconds <= SECONDS for _, seconds, *_ in seen.answered)
    assert in_time
    assert seen.expired <= 0.2 * len(seen.answered) + 2


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_two_overloaded_lanes_come_to_their_shares_and_neither_is_shut_out(share):
    """Bulk was there first, and had filled all the time there is; ten times too much of either."""
    load = [(0.05 * n, bulk(1000, 250)) for n in range(8000)]
    load += [(30.0 + 0.02 * n, [400]) for n in range(18_500)]
    seen = Simulation(load, share=share).run()
    assert (seen.expired, seen.late) == (0, 0)

    def computed(lane: str, since: float, until: float) -> int:
        return sum(t for at, s, name, t in seen.answered if name == lane and since <= at + s < until)

    early = computed("query", 30, 60) / (computed("query", 30, 60) + computed("bulk", 30, 60))
    steady = computed("query", 250, 390) / (computed("query", 250, 390) + computed("bulk", 250, 390))
    assert early > 0.1
    assert steady == pytest.approx(share, abs=0.1)


def test_one_slow_batch_does_not_shut_the_endpoint():
    """Small batches are slow a token, and do not count; full ones that are fast again raise what one slow one lowered."""
    scheduler = Scheduler(LaneLimits(4096, 0.0, 600_000, 512, 0.5, SECONDS), lambda: 0.0)
    scheduler.speed.state(512, 0.256)
    for _ in range(1000):
        scheduler.computed(14, 0.01)
    assert scheduler.speed.tokens_per_second == 2000
    scheduler.computed(4096, 20.48)
    assert scheduler.speed.tokens_per_second == pytest.approx(200)
    for _ in range(20):
        scheduler.computed(4096, 2.048)
    assert scheduler.speed.tokens_per_second == pytest.approx(2000, rel=0.02)
