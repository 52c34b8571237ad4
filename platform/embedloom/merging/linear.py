"""The weighted average, the method of arXiv 2511.07025 §3.3. A pure function."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from embedloom.errors import ConfigError


def linear(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted average in float32, whatever the inputs' dtype.

    Summed as ``first + sum w_i (x_i - first)``: candidates of one base lie close together, so the differences
    are small and exact where a sum of whole values would round, and equal tensors average to themselves to the
    bit. Give the heaviest first. Holds three float32 copies of one tensor, however many there are.

    Args:
        tensors: of one shape, read one at a time.
        weights: one each, not negative, with a positive sum; they are normalised.

    Returns:
        A new float32 tensor of the same shape.

    Raises:
        ConfigError: weights that are negative or sum to nothing.
    """
    total = check_weights(weights)
    first: Tensor | None = None
    average: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        value = tensor.to(torch.float32)
        if first is None or average is None:
            first, average = value, value.clone()
        elif weight:
            average.add_(value - first, alpha=weight / total)
    if average is None:
        raise ConfigError("merging: no tensor to average")
    return average


def check_weights(weights: Sequence[float]) -> float:
    """Return the sum of the weights.

    Raises:
        ConfigError: one is negative or not finite, or all are zero.
    """
    total = sum(weights)
    if any(not 0 <= weight < float("inf") for weight in weights) or total <= 0:
        raise ConfigError(f"merging.weights: {list(weights)}; each must be 0 or more, and their sum positive")
    return total
