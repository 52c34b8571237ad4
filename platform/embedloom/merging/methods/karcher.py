"""The Karcher mean: the point of the sphere nearest to all models by the sum of squared angles (arXiv 2603.04972)."""

import math
from collections.abc import Sequence

import numpy as np

from embedloom.config.merging import MergingConfig
from embedloom.merging.methods.spans import Floats, gram, normalized, weighted_sum
from embedloom.merging.operands import BlockFunction, Operands

# mergekit stops after 10 steps or at 1e-5; a step here costs n x n products, so the mean is taken to the end.
_STEPS = 100
_TOLERANCE = 1e-10


def prepare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """The weighted Karcher mean of the directions times the weighted mean of the lengths."""
    return weighted_sum(operands, coefficients(gram(operands), normalized(weights)))


def coefficients(products: Floats, weights: Sequence[float]) -> list[float]:
    """Of the tensors, from their inner products; zero tensors count for the length only.

    Gradient descent on the sphere: average the logarithms of all directions at the current mean, follow the
    exponential map. Everything stays a sum of the inputs, so the iteration runs on their coefficients.
    """
    lengths = np.sqrt(np.diag(products))
    used = lengths > 0
    if not used.any():
        return list(weights)
    shares = np.where(used, weights, 0.0)
    shares = shares / shares.sum() if shares.sum() else used / used.sum()
    units = np.diag(np.divide(1.0, lengths, out=np.zeros(len(lengths)), where=used))
    mean = _unit(shares @ units, products, otherwise=units[int(np.argmax(used))])
    for _ in range(_STEPS):
        tangent = np.zeros(len(weights))
        for share, unit in zip(shares, units, strict=True):
            cosine = float(np.clip(mean @ products @ unit, -1.0, 1.0))
            angle = math.acos(cosine)
            factor = angle / math.sin(angle) if math.sin(angle) > _TOLERANCE else 1.0
            tangent += share * factor * (unit - cosine * mean)
        size = _length(tangent, products)
        if size < _TOLERANCE:
            break
        step = math.cos(size) * mean + math.sin(size) / size * tangent
        mean = _unit(step, products, otherwise=mean)
    return [float(c) for c in mean * float(lengths @ np.asarray(weights))]


def _unit(vector: Floats, products: Floats, otherwise: Floats) -> Floats:
    """The vector of these coefficients at length 1, ``otherwise`` if it has none."""
    size = _length(vector, products)
    return vector / size if size > _TOLERANCE else otherwise


def _length(vector: Floats, products: Floats) -> float:
    return math.sqrt(max(0.0, float(vector @ products @ vector)))
