"""The weighted average: the method of arXiv 2511.07025 §3.3, and of model soups (arXiv 2203.05482)."""

from collections.abc import Sequence

from embedloom.config.merging import MergingConfig
from embedloom.merging.methods.spans import normalized, weighted_sum
from embedloom.merging.operands import BlockFunction, Operands


def prepare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """``sum w_i x_i / sum w_i``, whatever the inputs' types; one pass."""
    return weighted_sum(operands, normalized(weights))
