from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.errors import DataError
from embedloom.training.order import balanced_ranks, example_order, micro_batches, one_pass, quotas


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


def test_order_keeps_shares_and_uses_every_row_before_repeating():
    datasets = ["public"] * 6 + ["synthetic"] * 3
    order = example_order(datasets, {"public": 0.5, "synthetic": 0.5}, 12, seed=7)
    counts = Counter(datasets[row] for row in order)
    assert counts == {"public": 6, "synthetic": 6}
    rows = Counter(order.tolist())
    assert [rows[row] for row in range(6)] == [1] * 6
    assert [rows[row] for row in range(6, 9)] == [2] * 3


def test_order_depends_on_the_seed_only():
    datasets = ["public"] * 50
    first = example_order(datasets, {"public": 1}, 50, seed=1)
    assert np.array_equal(first, example_order(datasets, {"public": 1}, 50, seed=1))
    assert not np.array_equal(first, example_order(datasets, {"public": 1}, 50, seed=2))


def test_share_without_rows_is_refused_by_name():
    with pytest.raises(DataError, match=r"'synthetic' has a share of 0\.5.*\['public'\]"):
        example_order(["public"], {"public": 0.5, "synthetic": 0.5}, 4, seed=0)


def test_one_pass_never_uses_a_row_twice():
    assert one_pass(["public"] * 6 + ["synthetic"] * 2, {"public": 0.5, "synthetic": 0.5}) == 4
    assert one_pass(["public"] * 6, {"public": 1.0, "synthetic": 0.0}) == 6


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 7))
def test_balanced_ranks_partition_and_stay_within_one_longest(costs, world_size):
    ranks = balanced_ranks(costs, world_size)
    assert sorted(position for rank in ranks for position in rank) == list(range(len(costs)))
    loads = [sum(costs[position] for position in rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(costs)


def test_micro_batches_respect_the_budget():
    assert micro_batches([4, 4, 4, 9, 2], budget=8) == [[0, 1], [2], [3], [4]]
    dealt = micro_batches([5, 4, 3, 2], budget=0, count=2)
    assert sorted(map(sorted, dealt)) == [[0, 3], [1, 2]]
