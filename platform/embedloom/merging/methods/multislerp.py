"""Interpolation of several models on a sphere by the tangent plane at their mean (mergekit's ``multislerp``)."""

import math
from collections.abc import Sequence

import numpy as np

from embedloom.config.merging import MergingConfig
from embedloom.errors import DataError
from embedloom.merging.methods.spans import Floats, gram, normalized, weighted_sum
from embedloom.merging.operands import BlockFunction, Operands

_LEAST_LENGTH = 1e-8


def prepare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """The mean direction times the mean length.

    Raises:
        DataError: directions that cancel out.
    """
    return weighted_sum(operands, coefficients(gram(operands), normalized(weights), operands.name))


def coefficients(products: Floats, weights: Sequence[float], name: str) -> list[float]:
    """Of the tensors, from their inner products.

    The published method maps the unit tensors ``u_i`` to the tangent plane at the mean direction ``m`` by subtracting
    ``(u_i . m) m``, averages there and maps back. That average is zero, as ``m`` is along ``sum w_i u_i`` itself; so
    the result is ``m`` times the weighted mean of the lengths. Two opposite tensors are joined by the straight line.
    """
    lengths = np.sqrt(np.diag(products))
    units = np.divide(weights, lengths, out=np.zeros(len(weights)), where=lengths > 0)
    mean = math.sqrt(max(0.0, float(units @ products @ units)))
    if not lengths.any():
        return list(weights)
    if mean < _LEAST_LENGTH:
        if len(weights) == 2:
            return list(weights)
        raise DataError(
            f"merging: tensor {name!r}: the models' directions cancel out; other weights are needed"
        )
    return [float(c) for c in units / mean * (lengths @ np.asarray(weights))]
