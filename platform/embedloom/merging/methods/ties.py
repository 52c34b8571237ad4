"""TIES (arXiv 2306.01708): trim every task vector to its largest values, elect signs, average what agrees."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedloom.config.merging import MergingConfig
from embedloom.merging.methods.consensus import elected_mean
from embedloom.merging.operands import BlockFunction, Operands

# The bits of a non-negative float32 sort like the number itself: 2^15 bins by the upper half, then 2^16 by the lower.
_UPPER_BINS = 2**15
_LOWER_BINS = 2**16
_ROW_BLOCKS = (
    8  # the few values of the second pass are counted together: filling the bins costs as much as a block
)


def prepare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """``base + scale * elected mean``; three passes, memory of a block whatever the tensor's size."""
    kept = min(operands.elements, max(1, int(config.density * operands.elements)))
    below = [0.0] * len(operands.models)
    if kept < operands.elements:
        # hardshrink drops what is not above its limit; what equals the threshold stays.
        below = [
            float(np.nextafter(np.float32(t), np.float32(0))) for t in magnitude_thresholds(operands, kept)
        ]

    def block(start: int, stop: int) -> Tensor:
        base = operands.reference().read(start, stop)
        deltas = []
        for model, limit in zip(operands.models, below, strict=True):
            delta = model.read(start, stop).sub_(base)
            deltas.append(torch.hardshrink(delta, limit, out=delta))
        return base.add_(elected_mean(deltas, weights), alpha=config.scale)

    return block


def magnitude_thresholds(operands: Operands, kept: int) -> list[float]:
    """The ``kept``-th largest magnitude of each task vector, exactly.

    Two counting passes over the bits of the magnitudes instead of a sort: the first finds the upper half of the
    threshold's bits, the second the lower half. Values equal to the threshold are all kept, as by the authors' code.
    """
    count = len(operands.models)
    tops = [0] * count
    uppers = _counts(operands, _UPPER_BINS, lambda bits, _: bits >> 16)
    remaining = [kept] * count
    for index, row in enumerate(uppers):
        tops[index], remaining[index] = _bin_of(row, kept)

    def lower(bits: Tensor, index: int) -> Tensor:
        return bits[(bits >> 16) == tops[index]] & 0xFFFF

    lowers = _counts(operands, _LOWER_BINS, lower)
    bits = [
        (top << 16) | _bin_of(row, left)[0] for top, row, left in zip(tops, lowers, remaining, strict=True)
    ]
    return [float(value) for value in np.array(bits, dtype=np.int32).view(np.float32)]


def _bin_of(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Bin of the ``rank``-th largest value, and its rank within that bin."""
    above = np.cumsum(counts[::-1])
    position = int(np.searchsorted(above, rank))
    before = int(above[position - 1]) if position else 0
    return len(counts) - 1 - position, rank - before


def _counts(operands: Operands, bins: int, select: Callable[[Tensor, int], Tensor]) -> NDArray[np.int64]:
    """Histogram of ``select(bits, model)`` for every model, int64 [models, bins]; integers, so in any order."""
    totals = np.zeros((len(operands.models), bins), dtype=np.int64)
    lock = threading.Lock()

    def count(index: int, pieces: list[Tensor]) -> None:
        counts = torch.bincount(torch.cat(pieces) if len(pieces) > 1 else pieces[0], minlength=bins).numpy()
        with lock:
            totals[index] += counts

    def row(start: int, stop: int) -> None:
        for index, model in enumerate(operands.models):
            pieces: list[Tensor] = []
            for first, last in operands.split(start, stop):
                delta = model.read(first, last).sub_(operands.reference().read(first, last))
                pieces.append(select(delta.abs_().view(torch.int32), index))
                if sum(piece.numel() for piece in pieces) >= bins or last == stop:
                    count(index, pieces)
                    pieces = []

    for _ in operands.each(row, _ROW_BLOCKS):
        pass
    return totals
