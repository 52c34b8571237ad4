from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.errors import DataError
from embedloom.training.order import ExampleOrder, Share, balanced_ranks, imbalance, micro_batches, quotas


def test_quotas_split_by_largest_remainder():
    # 10 by 1:1:1 is 3.33 each; the one left over goes to the first name among equal remainders.
    assert quotas({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}
    assert quotas({"public": 0.73, "synthetic": 0.27}, 100) == {"public": 73, "synthetic": 27}


@given(st.dictionaries(st.text("abc", min_size=1), st.floats(0.01, 10), min_size=1), st.integers(0, 1000))
def test_quotas_sum_to_the_total_and_stay_within_one(shares, total):
    parts = quotas(shares, total)
    assert sum(parts.values()) == total
    for name, share in shares.items():
        assert abs(parts[name] - total * share / sum(shares.values())) < 1


WEIGHTED = [Share("public", 0, 60, weight=0.75), Share("synthetic", 60, 10, weight=0.25)]


def names_of(rows):
    return Counter("public" if row < 60 else "synthetic" for row in rows)


def test_an_epoch_keeps_the_shares_and_uses_no_row_twice():
    order = ExampleOrder(WEIGHTED, seed=7)
    # 10 synthetic rows are a quarter of 40.
    assert order.epoch_size == 40
    for number in range(3):
        epoch = order.epoch(number)
        assert names_of(epoch) == {"public": 30, "synthetic": 10}
        assert len(set(epoch.tolist())) == 40


def test_no_row_comes_again_before_all_of_its_source_were_used():
    order = ExampleOrder(WEIGHTED, seed=7)
    first_two = [row for row in order.window(0, 80).tolist() if row < 60]
    assert sorted(first_two) == list(range(60))
    # The third and fourth epoch go through them again, in another order.
    second = [row for row in order.window(80, 160).tolist() if row < 60]
    assert sorted(second) == list(range(60)) and second != first_two


def test_caps_choose_the_same_rows_in_every_epoch():
    order = ExampleOrder([Share("a", 0, 50, cap=20), Share("b", 50, 5)], seed=1)
    assert order.epoch_size == 25
    assert sorted(order.epoch(0)) == sorted(order.epoch(3))
    assert order.epoch(0).tolist() != order.epoch(3).tolist()
    other = ExampleOrder([Share("a", 0, 50, cap=20), Share("b", 50, 5)], seed=2)
    assert sorted(order.epoch(0)) != sorted(other.epoch(0))


def test_an_epoch_is_the_same_whatever_was_asked_before():
    asked, fresh = ExampleOrder(WEIGHTED, seed=3), ExampleOrder(WEIGHTED, seed=3)
    for number in (5, 0, 2):
        asked.epoch(number)
    assert np.array_equal(asked.epoch(4), fresh.epoch(4))
    assert not np.array_equal(ExampleOrder(WEIGHTED, seed=4).epoch(4), fresh.epoch(4))


def test_the_order_does_not_depend_on_the_order_of_the_sources():
    turned = ExampleOrder(WEIGHTED[::-1], seed=3)
    assert np.array_equal(turned.epoch(1), ExampleOrder(WEIGHTED, seed=3).epoch(1))


@given(st.integers(0, 200), st.integers(0, 90), st.integers(0, 5))
def test_any_window_is_the_slice_of_all_epochs(start, length, seed):
    order = ExampleOrder(WEIGHTED, seed)
    whole = np.concatenate([ExampleOrder(WEIGHTED, seed).epoch(number) for number in range(8)])
    assert np.array_equal(order.window(start, start + length), whole[start : start + length])


def test_a_cap_above_its_rows_is_refused_by_name():
    with pytest.raises(DataError, match=r"'b': cap is 12, but it has 5 examples"):
        ExampleOrder([Share("a", 0, 50), Share("b", 50, 5, cap=12)], seed=0)


def test_a_source_without_rows_is_refused_by_name():
    with pytest.raises(DataError, match="'synthetic' has no example"):
        ExampleOrder([Share("public", 0, 5, weight=1), Share("synthetic", 5, 0, weight=1)], seed=0)


COSTS = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(COSTS, st.integers(1, 7))
def test_balanced_ranks_partition_and_stay_within_one_longest(costs, world_size):
    ranks = balanced_ranks(costs, world_size)
    assert sorted(position for rank in ranks for position in rank) == list(range(len(costs)))
    loads = [sum(costs[position] for position in rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(costs)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(2, 3))
def test_the_slowest_rank_stays_within_grahams_bound_of_the_best(costs, world_size):
    loads = [sum(costs[position] for position in rank) for rank in balanced_ranks(costs, world_size)]
    best = min(
        max(sum(c for c, rank in zip(costs, ranks, strict=True) if rank == r) for r in range(world_size))
        for ranks in product(range(world_size), repeat=len(costs))
    )
    assert max(loads) <= (4 / 3 - 1 / (3 * world_size)) * best + 1e-9


def test_balancing_by_cost_waits_less_than_dealing_out_in_turn():
    lengths = np.random.default_rng(0).lognormal(4, 1, size=128).astype(int) + 1
    costs = lengths.tolist()
    dealt = [list(range(rank, 128, 8)) for rank in range(8)]
    assert imbalance(costs, balanced_ranks(costs, 8)) < 0.01 < 0.2 < imbalance(costs, dealt)


def test_imbalance_is_the_share_of_time_the_average_rank_waits():
    assert imbalance([4, 2], [[0], [1]]) == pytest.approx(0.25)
    assert imbalance([3, 3], [[0], [1]]) == 0.0


def test_micro_batches_respect_the_budget():
    assert micro_batches([4, 4, 4, 9, 2], budget=8) == [[0, 1], [2], [3], [4]]
    dealt = micro_batches([5, 4, 3, 2], budget=0, count=2)
    assert sorted(map(sorted, dealt)) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("shares", [WEIGHTED, [Share("public", 0, 60, cap=7), Share("synthetic", 60, 10)]])
def test_what_is_drawn_is_counted_as_the_windows_hand_it_out(shares):
    order = ExampleOrder(shares, seed=3)
    for examples in (0, 1, order.epoch_size, 2 * order.epoch_size + 5, 3 * order.epoch_size - 1):
        seen = names_of(order.window(0, examples)) if examples else Counter()
        assert order.drawn(examples) == {name: seen[name] for name in ("public", "synthetic")}


@pytest.mark.parametrize(("rows", "batch"), [(50, 16), (33, 16), (7, 3), (100, 7)])
def test_a_batch_over_two_epochs_holds_no_row_twice_and_nothing_else_moves(rows, batch):
    plain, parted = ExampleOrder([Share("a", 0, rows)], seed=5), ExampleOrder([Share("a", 0, rows)], 5, batch)
    moved = 0
    for step in range(40 * rows // batch):
        window = parted.window(step * batch, (step + 1) * batch)
        assert len(set(window.tolist())) == batch
    for epoch in range(40):
        before, after = plain.epoch(epoch), parted.epoch(epoch)
        assert sorted(after.tolist()) == list(range(rows))
        changed = before != after
        first = -epoch * rows % batch  # rows of the batch that began in the epoch before
        assert changed[:first].sum() == changed[first:].sum()
        moved += int(changed.sum())
    assert moved > 0, "no epoch began with a row of the tail before it"
    # Resumed in the middle, without the epochs before, the order is the same.
    assert np.array_equal(ExampleOrder([Share("a", 0, rows)], 5, batch).epoch(39), parted.epoch(39))


def test_a_batch_larger_than_half_an_epoch_leaves_the_order_alone():
    plain, parted = ExampleOrder([Share("a", 0, 5)], seed=5), ExampleOrder([Share("a", 0, 5)], 5, 8)
    assert np.array_equal(plain.window(0, 80), parted.window(0, 80))
