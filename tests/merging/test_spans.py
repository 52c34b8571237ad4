"""The average against float64, and what holds exactly."""

import numpy as np
import pytest
import torch
from embedloom.merging.linear import linear
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.errors import ConfigError


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_close_to_the_float64_mean(seed, weights):
    generator = np.random.default_rng(seed)
    weights = sorted(weights, reverse=True)
    values = generator.standard_normal((len(weights), 5, 7)).astype(np.float32)
    expected = np.average(values.astype(np.float64), axis=0, weights=weights)
    merged = linear([torch.from_numpy(value) for value in values], weights)
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [1, 1, 1], [0.7, 0.2, 0.1, 0.05, 0.05, 0.03]])
def test_equal_tensors_average_to_themselves_to_the_bit(weights):
    tensor = torch.randn(1000) * 10
    assert torch.equal(linear([tensor] * len(weights), weights), tensor)


def test_worked_example_and_bfloat16_is_summed_in_float32():
    # (3 x 1 + 1 x 2) / 4 = 1.25; a bfloat16 sum of 256 + 1 would lose the 1
    assert linear([torch.tensor([1.0]), torch.tensor([2.0])], [3, 1]).item() == 1.25
    large = [torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([258.0], dtype=torch.bfloat16)]
    assert linear(large, [1, 1]).item() == 257.0


def test_inputs_are_left_alone():
    first, second = torch.ones(3), torch.zeros(3)
    linear([first, second], [1, 1])
    assert torch.equal(first, torch.ones(3))


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_cannot_be_normalised_are_refused(weights):
    with pytest.raises(ConfigError, match=r"merging\.weights"):
        linear([torch.ones(1), torch.ones(1)], weights)
