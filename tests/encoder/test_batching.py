from hypothesis import given
from hypothesis import strategies as st

from embedloom.encoder.batching import TokenCount, token_budget_batches


def test_batches_fill_the_budget_longest_first():
    # sorted: 9 8 | 4 3 3 2 with budget 18: 9x2=18 fits, then 4x4=16 fits.
    assert token_budget_batches([3, 9, 2, 8, 4, 3], 18) == [[1, 3], [4, 0, 5, 2]]


def test_text_above_the_budget_stands_alone():
    assert token_budget_batches([50, 3], 10) == [[0], [1]]


@given(st.lists(st.integers(1, 512), max_size=200), st.integers(1, 2048))
def test_every_text_once_and_within_budget(lengths, budget):
    batches = token_budget_batches(lengths, budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[p] for p in batch) * len(batch) <= budget


def test_padding_share_counts_the_padded_tokens():
    count = TokenCount()
    count.add([10, 5, 5])
    assert count.padding_share == 1 - 20 / 30
