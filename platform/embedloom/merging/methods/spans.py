"""Methods whose result is a weighted sum of the models: inner products first, then one sum.

Slerp, multislerp, the Karcher mean and model stock look at lengths and angles of whole tensors, but what they return
is always a sum ``c_1 x_1 + ... + c_n x_n``. The ``c`` follow from the n x n inner products alone, so two passes over
blocks do what needs whole tensors elsewhere, and the small arithmetic between them is done in float64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedloom.merging.operands import BlockFunction, Operands

Floats = NDArray[np.float64]


def gram(operands: Operands, *, from_base: bool = False) -> Floats:
    """Inner products of all pairs of models, float64 [models, models].

    Args:
        operands: the tensor; read once.
        from_base: of the differences from the base instead.
    """

    def block(start: int, stop: int) -> Tensor:
        origin = operands.reference().read(start, stop) if from_base else None
        rows = torch.empty((len(operands.models), stop - start), dtype=torch.float64)
        for row, model in zip(rows, operands.models, strict=True):
            value = model.read(start, stop)
            row.copy_(value if origin is None else value - origin)
        return rows @ rows.T

    total = np.zeros((len(operands.models),) * 2)
    for part in operands.each(block):
        total += part.numpy()
    return total


def weighted_sum(operands: Operands, coefficients: Sequence[float]) -> BlockFunction:
    """``sum c_i x_i`` in float32, as ``(sum c) x_r + sum c_i (x_i - x_r)``.

    Models of one base lie close together, so the differences are small and exact where a sum of whole values would
    round, and equal tensors average to themselves to the bit. ``x_r`` is the model with the largest coefficient.
    """
    order = sorted(range(len(coefficients)), key=lambda index: -abs(coefficients[index]))
    reference, *others = [index for index in order if coefficients[index] or index == order[0]]
    scale = float(sum(coefficients))

    def block(start: int, stop: int) -> Tensor:
        first = operands.models[reference].read(start, stop)
        total = first * scale
        for index in others:
            value = operands.models[index].read(start, stop).sub_(first)
            total.add_(value, alpha=coefficients[index])
        return total

    return block


def sum_from_base(operands: Operands, coefficients: Sequence[float]) -> BlockFunction:
    """``base + sum c_i (x_i - base)`` in float32."""
    used = [index for index, coefficient in enumerate(coefficients) if coefficient]

    def block(start: int, stop: int) -> Tensor:
        base = operands.reference().read(start, stop)
        total = base.clone()
        for index in used:
            value = operands.models[index].read(start, stop).sub_(base)
            total.add_(value, alpha=coefficients[index])
        return total

    return block


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights over their sum."""
    total = sum(weights)
    return [weight / total for weight in weights]
