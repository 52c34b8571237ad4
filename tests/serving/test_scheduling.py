"""The lanes as plain bookkeeping: a clock that tests turn by hand, no asyncio, no threads."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.serving.scheduling import LaneLimits, Scheduler


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def scheduler_of(clock=None, **limits) -> Scheduler:
    values = {
        "max_batch_tokens": 10, "wait_seconds": 0.0, "max_queued_tokens": 1000, "query_lane_tokens": 2,
        "query_lane_share": 0.5, **limits,
    }  # fmt: skip
    return Scheduler(LaneLimits(**values), clock or Clock())


def add(scheduler: Scheduler, *lengths: int):
    place = scheduler.reserve(sum(lengths))
    assert place is not None
    return scheduler.add([[7] * length for length in lengths], place)


def named(batch, **requests):
    names = {id(request): name for name, request in requests.items()}
    return [(names[id(request)], position) for request, position in batch]


def test_the_oldest_request_of_a_lane_is_served_first_its_longest_text_first():
    scheduler = scheduler_of()
    a, b = add(scheduler, 2, 4, 3), add(scheduler, 3)
    assert named(scheduler.take(), a=a, b=b) == [("a", 1), ("a", 2), ("a", 0)]
    assert named(scheduler.take(), a=a, b=b) == [("b", 0)]
    assert scheduler.take() == []


def test_a_text_that_does_not_fit_opens_the_next_batch():
    scheduler = scheduler_of()
    a, long, b = add(scheduler, 6), add(scheduler, 7), add(scheduler, 3)
    assert named(scheduler.take(), a=a) == [("a", 0)]
    assert named(scheduler.take(), long=long, b=b) == [("long", 0), ("b", 0)]


def test_a_text_above_the_budget_runs_alone():
    scheduler = scheduler_of()
    huge, b = add(scheduler, 50), add(scheduler, 3)
    assert named(scheduler.take(), huge=huge) == [("huge", 0)]
    assert named(scheduler.take(), b=b) == [("b", 0)]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_lanes_that_both_wait_get_their_shares(share):
    scheduler = scheduler_of(query_lane_share=share, max_batch_tokens=20, max_queued_tokens=10**6)
    for _ in range(500):
        add(scheduler, 2)
    add(scheduler, *[4] * 500)
    taken = Counter()
    while all(scheduler.queued_tokens(lane) for lane in ("query", "bulk")):
        for request, position in scheduler.take():
            taken[request.place.lane] += len(request.token_ids[position])
    assert taken["query"] / taken.total() == pytest.approx(share, abs=0.03)


def test_a_query_is_in_the_next_batch_whatever_bulk_waits():
    scheduler = scheduler_of()
    bulk = add(scheduler, *[5] * 100)
    scheduler.take()
    query = add(scheduler, 2)
    assert ("query", 0) in named(scheduler.take(), query=query, bulk=bulk)


def test_bulk_is_not_starved_by_a_stream_of_queries():
    """Its texts are as long as a batch: only a claim that is kept from batch to batch ever lets them in."""
    scheduler = scheduler_of()
    bulk = add(scheduler, *[10] * 5)
    batches = 0
    while bulk.next < 5:
        for _ in range(5):
            add(scheduler, 2)
        scheduler.take()
        batches += 1
        assert batches <= 12


def test_an_idle_lane_saves_up_no_claim():
    scheduler = scheduler_of(max_queued_tokens=10**6)
    add(scheduler, *[5] * 200)
    for _ in range(50):
        scheduler.take()
    queries = [add(scheduler, 2) for _ in range(50)]
    lanes = Counter(request.place.lane for _ in range(4) for request, _ in scheduler.take())
    assert lanes["bulk"] >= 3 and lanes["query"] >= 7, (lanes, len(queries))


def test_a_full_lane_refuses_and_the_other_does_not():
    scheduler = scheduler_of(max_queued_tokens=20)
    add(scheduler, 10, 10)
    assert scheduler.reserve(3) is None
    assert scheduler.reserve(2) is not None
    scheduler.take()
    assert scheduler.reserve(3) is not None


def test_one_large_and_many_single_requests_are_refused_at_the_same_point():
    batched, single = scheduler_of(max_queued_tokens=30), scheduler_of(max_queued_tokens=30)
    assert batched.reserve(30) is not None
    for _ in range(10):
        assert single.reserve(3) is not None
    assert batched.reserve(3) is None and single.reserve(3) is None


def test_an_estimate_is_corrected_or_gives_its_room_up():
    scheduler = scheduler_of(max_queued_tokens=20)
    place = scheduler.reserve(15)
    assert scheduler.resize(place, 2)  # and it turns out to be a small one
    assert (scheduler.queued_tokens("query"), scheduler.queued_tokens("bulk")) == (2, 0)
    assert not scheduler.resize(place, 21)
    assert scheduler.queued_tokens() == 0
    scheduler.release(place)
    assert scheduler.queued_tokens() == 0


def test_a_withdrawn_request_frees_its_place():
    scheduler = scheduler_of(max_queued_tokens=20)
    gone, here = add(scheduler, 5, 5, 5), add(scheduler, 4)
    scheduler.take()
    scheduler.withdraw(gone)
    assert scheduler.queued_tokens() == 4
    assert named(scheduler.take(), here=here) == [("here", 0)]
    assert scheduler.take() == []
    assert scheduler.reserve(20) is not None


def test_waits_for_company_until_the_oldest_waited_its_time_or_a_batch_is_full():
    clock = Clock()
    scheduler = scheduler_of(clock, wait_seconds=2.0)
    assert scheduler.seconds_until_batch() is None
    add(scheduler, 3)
    clock.now += 0.5
    add(scheduler, 3)
    assert scheduler.seconds_until_batch() == pytest.approx(1.5)
    clock.now += 1.5
    assert scheduler.seconds_until_batch() == 0
    clock.now -= 1.5
    add(scheduler, 4)
    assert scheduler.seconds_until_batch() == 0


def test_one_client_alone_soon_waits_no_more():
    scheduler = scheduler_of(wait_seconds=2.0)
    for number in range(6):
        add(scheduler, 3)
        assert scheduler.seconds_until_batch() == (2.0 if number < 4 else 0)
        assert len(scheduler.take()) == 1
    add(scheduler, 3), add(scheduler, 3)
    assert len(scheduler.take()) == 2
    add(scheduler, 3)
    assert scheduler.seconds_until_batch() == 2.0


def test_what_waited_already_does_not_wait_for_the_company_of_newcomers():
    clock = Clock()
    scheduler = scheduler_of(clock, wait_seconds=2.0)
    add(scheduler, 6, 5)
    scheduler.take()
    clock.now += 3.0
    add(scheduler, 3)
    scheduler._queues["bulk"].requests.rotate(1)  # whoever is first in turn
    assert scheduler.seconds_until_batch() == 0


def test_retry_after_is_the_time_to_compute_what_is_in_the_way():
    scheduler = scheduler_of(max_queued_tokens=1000)
    assert scheduler.retry_after_seconds(10) == 1
    scheduler.computed(tokens=100, seconds=1.0)
    add(scheduler, *[10] * 100)
    assert scheduler.retry_after_seconds(500) == pytest.approx(5.0)
    assert scheduler.retry_after_seconds(3) == 1  # never less: clients round to seconds
    add(scheduler, 2)
    assert scheduler.retry_after_seconds(500) == pytest.approx(10.0)  # half the rate while both lanes wait
    scheduler.computed(tokens=1, seconds=10.0)
    assert scheduler.retry_after_seconds(1000) <= 60


_REQUESTS = st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(_REQUESTS, st.lists(st.integers(0, 11), max_size=4), st.floats(0.1, 0.9))
def test_every_text_is_taken_once_batches_keep_the_budget_and_no_token_is_lost(lengths, leaving, share):
    scheduler = scheduler_of(query_lane_tokens=8, query_lane_share=share)
    requests = [add(scheduler, *request) for request in lengths]
    gone = [requests[number] for number in leaving if number < len(requests)]
    taken = [(id(request), position) for request, position in scheduler.take()]
    for request in gone:
        scheduler.withdraw(request)
    expected_waiting = sum(len(r.token_ids[p]) for r in requests if not r.gone for p in r.order[r.next :])
    assert scheduler.queued_tokens() == expected_waiting
    while batch := scheduler.take():
        sizes = [len(request.token_ids[position]) for request, position in batch]
        assert sum(sizes) <= 10 or len(sizes) == 1
        assert not any(request.gone for request, _ in batch)
        taken += [(id(request), position) for request, position in batch]
    assert len(taken) == len(set(taken))
    for request in requests:
        if not request.gone:
            assert {p for name, p in taken if name == id(request)} == set(range(len(request.token_ids)))
    assert scheduler.queued_tokens() == 0 and scheduler.seconds_until_batch() is None
