"""Spherical interpolation of two models along the arc between them (Shoemake 1985), tensor by tensor."""

import math
from collections.abc import Sequence

from embedloom.config.merging import MergingConfig
from embedloom.merging.methods.spans import Floats, gram, normalized, weighted_sum
from embedloom.merging.operands import BlockFunction, Operands

# Below this sine the arc has no direction (parallel or opposite tensors), and the straight line is taken instead.
_LEAST_SINE = 1e-6


def prepare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """``sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b`` with t the second weight's share."""
    return weighted_sum(operands, coefficients(gram(operands), normalized(weights)[1]))


def coefficients(products: Floats, share: float) -> list[float]:
    """Of the two tensors, from their inner products.

    mergekit goes straight where the cosine is above 0.9995; with angles in float64 the arc is taken down to 1e-6 rad.
    """
    length = math.sqrt(products[0, 0] * products[1, 1])
    cosine = max(-1.0, min(1.0, products[0, 1] / length)) if length else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < _LEAST_SINE:
        return [1 - share, share]
    return [math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)]
