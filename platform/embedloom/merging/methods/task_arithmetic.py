"""Task arithmetic (arXiv 2212.04089): the base plus a sum of task vectors, the models' differences from it."""

from collections.abc import Sequence

from embedloom.config.merging import MergingConfig
from embedloom.merging.methods.spans import sum_from_base
from embedloom.merging.operands import BlockFunction, Operands


def prepare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """``base + scale * sum w_i (x_i - base)``; weights are used as they are, a negative one forgets a task."""
    return sum_from_base(operands, [config.scale * weight for weight in weights])
