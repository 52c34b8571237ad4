"""Model stock (arXiv 2403.19522): how far to go from the base to the average follows from the models' angles."""

from collections.abc import Sequence

import numpy as np

from embedloom.config.merging import MergingConfig
from embedloom.merging.methods.spans import Floats, gram, sum_from_base
from embedloom.merging.operands import BlockFunction, Operands

_LEAST = 1e-6


def prepare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """``t * average + (1 - t) * base``, t by tensor; models count alike."""
    count = len(weights)
    ratio = interpolation(gram(operands, from_base=True))
    return sum_from_base(operands, [ratio / count] * count)


def interpolation(products: Floats) -> float:
    """``t = N cos / (1 + (N - 1) cos)``, cos the mean over pairs of task vectors; 0, the base, where it is undefined."""
    count = len(products)
    lengths = np.sqrt(np.diag(products))
    cosines = products / np.maximum(np.outer(lengths, lengths), np.finfo(float).tiny)
    cosine = float(np.clip(cosines[np.triu_indices(count, k=1)], -1.0, 1.0).mean())
    below = 1 + (count - 1) * cosine
    return 0.0 if abs(below) < _LEAST else count * cosine / below
