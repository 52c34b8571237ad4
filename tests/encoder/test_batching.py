import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedloom.encoder.model import (
    MemoryLimit,
    TokenCount,
    is_out_of_memory,
    run_batches,
    token_budget_batches,
)
from embedloom.errors import DataError


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


def out_of_memory() -> RuntimeError:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1 bytes. Error code 12 (Cannot allocate memory)"
    )


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 100), st.integers(40, 2000))
def test_batches_shrink_until_they_fit_and_every_text_is_done_once(lengths, memory, budget):
    limit, done = MemoryLimit(), []

    def work(batch):
        if max(lengths[position] for position in batch) * len(batch) > memory:
            raise out_of_memory()
        done.extend(batch)

    run_batches(lengths, budget, limit, work)
    assert sorted(done) == list(range(len(lengths)))


def test_the_smaller_budget_is_remembered():
    limit, attempts = MemoryLimit(), []

    def work(batch):
        attempts.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    run_batches([10] * 8, 80, limit, work)
    # 8 texts fail; a limit of 40 tokens gives batches of 4, the first of which fails; then 20 tokens hold 2.
    assert attempts == [8, 4, 2, 2, 2, 2]
    assert limit.tokens == 20
    run_batches([10] * 2, 80, limit, work)
    assert attempts[6:] == [2]


def test_a_text_that_does_not_fit_alone_is_named():
    def work(batch):
        raise MemoryError

    with pytest.raises(DataError, match="a text of 1,200 tokens does not fit into memory even alone"):
        run_batches([7, 1200], 4096, MemoryLimit(), work)


def test_other_errors_pass_through():
    def work(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        run_batches([1], 10, MemoryLimit(), work)


def test_what_torch_really_raises_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
