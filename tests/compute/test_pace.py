"""Pace and account of an endpoint by hand-worked numbers and a clock that the test sets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.compute.pace import Account, Pace, retry_after


def test_a_round_of_answers_adds_one_and_push_back_halves_once():
    pace = Pace(64)
    assert [pace.has_room(n) for n in (0, 7, 8)] == [True, True, False]
    for _ in range(8):
        pace.answered(0, 0)
    assert pace.limit == pytest.approx(9, abs=0.1)
    for sent in (1.0, 1.5, 2.0):  # all in flight together
        pace.pushed_back(sent, now=3.0)
    assert pace.limit == pytest.approx(4.5, abs=0.05)
    pace.pushed_back(3.5, now=4.0)
    assert pace.limit == pytest.approx(2.25, abs=0.05)
    for now in range(5, 20):
        pace.pushed_back(float(now), now + 0.5)
    assert pace.limit == 1 and pace.has_room(0), "one is always tried"


def test_no_more_than_most_are_in_flight():
    pace = Pace(3)
    assert pace.has_room(2) and not pace.has_room(3)
    for _ in range(100):
        pace.answered(0, 0)
    assert not pace.has_room(3)


def test_requests_are_spread_over_the_minute():
    pace = Pace(64, requests_per_minute=120)
    assert [pace.take(10.0, 0) for _ in range(4)] == pytest.approx([0, 0.5, 1.0, 1.5])
    assert pace.take(100.0, 0) == 0


def test_tokens_are_booked_and_corrected():
    pace = Pace(64, tokens_per_minute=600)  # ten a second
    assert pace.take(0.0, 50) == 0
    assert pace.take(0.0, 50) == pytest.approx(5)
    pace.answered(50, 20)  # three seconds less
    assert pace.take(0.0, 50) == pytest.approx(7)


def test_retry_after_holds_all_requests():
    pace = Pace(64)
    pace.pushed_back(1.0, 2.0, pause=30.0)
    pace.pushed_back(1.0, 3.0, pause=5.0)
    assert pace.take(12.0, 0) == pytest.approx(20) and pace.pause_left(31.0) == pytest.approx(1)
    pace.pushed_back(40.0, 40.0, pause=86_400.0)
    assert pace.pause_left(40.0) == 300, "a day is asked again after five minutes"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0.25", 0.25),
        ("-3", 0.0),
        ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        (None, None),
        ("", None),
        ("soon", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float | None):
    assert retry_after(header, wall_clock=1000.0) == seconds


@given(
    budget=st.floats(1, 100),
    earlier=st.floats(0, 50),
    requests=st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 1), st.booleans()), max_size=60),
)
def test_spending_never_exceeds_the_budget_nor_what_was_claimed(budget, earlier, requests):
    """Some requests end at once, the others when all have been sent; a kill at any moment leaves no more spent than claimed."""
    account = Account(budget, earlier)
    written, open_ones = 0.0, []
    for most, share, ends in requests:
        if not account.holds(most):
            continue
        if account.reserve(most):
            written = account.claimed
        assert account.spent + account.reserved <= written + 1e-9
        assert earlier + written <= max(budget, earlier) + 1e-9
        if ends:
            account.settle(most, most * share)
        else:
            open_ones.append((most, most * share))
    for most, cost in open_ones:
        account.settle(most, cost)
    assert account.earlier + account.spent <= max(budget, earlier) + 1e-9
    account.close()
    assert account.claimed == account.spent


def test_without_a_budget_everything_is_held_and_counted():
    account = Account(None)
    assert account.holds(1e9)
    account.reserve(2.0)
    account.settle(2.0, 0.5)
    account.close()
    assert account.claimed == 0.5
