"""Electing a sign for every weight and averaging the task vectors that agree with it (TIES, arXiv 2306.01708 §4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST_SHARE = 1e-30  # nobody agrees: the sum is 0 as well, and stays it


def elected_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean, element by element, of the task vectors whose sign is that of their weighted sum.

    A sum of zero elects plus, as in mergekit. Zeros agree with nobody, so a trimmed value does not pull the mean
    towards the base.

    Args:
        deltas: trimmed task vectors of one length, float32; overwritten.
        weights: one each, not negative.

    Returns:
        A float32 tensor; zero where nobody agrees.
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += delta.mul_(weight)
    # Selecting (where, masked_fill) takes ten times as long here as arithmetic, so signs are factors.
    sign = torch.copysign(torch.ones_like(total), total)
    agreeing, share = total.zero_(), torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing += delta.mul_(sign).clamp_(min=0)
        share.add_(delta.sign_(), alpha=weight)
    return agreeing.div_(share.clamp_(min=_LEAST_SHARE)).mul_(sign)
