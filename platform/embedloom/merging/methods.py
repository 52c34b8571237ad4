"""The merge methods by name: how each turns one tensor of every model into blocks of the merged one."""

import hashlib
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedloom.config.merging import MergeMethod, MergingConfig
from embedloom.errors import DataError
from embedloom.merging.tensors import BlockFunction, Operands

# Methods whose result is a weighted sum of the models: inner products first, then one sum.
#
# Slerp, multislerp, the Karcher mean and model stock look at lengths and angles of whole tensors, but what they return
# is always a sum ``c_1 x_1 + ... + c_n x_n``. The ``c`` follow from the n x n inner products alone, so two passes over
# blocks do what needs whole tensors elsewhere, and the small arithmetic between them is done in float64.


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


# The weighted average: the method of arXiv 2511.07025 §3.3, and of model soups (arXiv 2203.05482).


def prepare_linear(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """``sum w_i x_i / sum w_i``, whatever the inputs' types; one pass."""
    return weighted_sum(operands, normalized(weights))


# Task arithmetic (arXiv 2212.04089): the base plus a sum of task vectors, the models' differences from it.


def prepare_task_arithmetic(
    operands: Operands, weights: Sequence[float], config: MergingConfig
) -> BlockFunction:
    """``base + scale * sum w_i (x_i - base)``; weights are used as they are, a negative one forgets a task."""
    return sum_from_base(operands, [config.scale * weight for weight in weights])


# Spherical interpolation of two models along the arc between them (Shoemake 1985), tensor by tensor.


# Below this sine the arc has no direction (parallel or opposite tensors), and the straight line is taken instead.
_LEAST_SINE = 1e-6


def prepare_slerp(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """``sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b`` with t the second weight's share."""
    return weighted_sum(operands, slerp_coefficients(gram(operands), normalized(weights)[1]))


def slerp_coefficients(products: Floats, share: float) -> list[float]:
    """Of the two tensors, from their inner products.

    mergekit goes straight where the cosine is above 0.9995; with angles in float64 the arc is taken down to 1e-6 rad.
    """
    length = math.sqrt(products[0, 0] * products[1, 1])
    cosine = max(-1.0, min(1.0, products[0, 1] / length)) if length else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < _LEAST_SINE:
        return [1 - share, share]
    return [math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)]


# Interpolation of several models on a sphere by the tangent plane at their mean (mergekit's ``multislerp``).


_LEAST_LENGTH = 1e-8


def prepare_multislerp(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """The mean direction times the mean length.

    Raises:
        DataError: directions that cancel out.
    """
    return weighted_sum(operands, multislerp_coefficients(gram(operands), normalized(weights), operands.name))


def multislerp_coefficients(products: Floats, weights: Sequence[float], name: str) -> list[float]:
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


# The Karcher mean: the point of the sphere nearest to all models by the sum of squared angles (arXiv 2603.04972).


# mergekit stops after 10 steps or at 1e-5; a step here costs n x n products, so the mean is taken to the end.
_STEPS = 100
_TOLERANCE = 1e-10


def prepare_karcher(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """The weighted Karcher mean of the directions times the weighted mean of the lengths."""
    return weighted_sum(operands, karcher_coefficients(gram(operands), normalized(weights)))


def karcher_coefficients(products: Floats, weights: Sequence[float]) -> list[float]:
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


# Model stock (arXiv 2403.19522): how far to go from the base to the average follows from the models' angles.


_LEAST = 1e-6


def prepare_model_stock(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
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


# Electing a sign for every weight and averaging the task vectors that agree with it (TIES, arXiv 2306.01708 §4).


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


# TIES (arXiv 2306.01708): trim every task vector to its largest values, elect signs, average what agrees.


# The bits of a non-negative float32 sort like the number itself: 2^15 bins by the upper half, then 2^16 by the lower.
_UPPER_BINS = 2**15
_LOWER_BINS = 2**16
_ROW_BLOCKS = (
    8  # the few values of the second pass are counted together: filling the bins costs as much as a block
)


def prepare_ties(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
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


# DARE (arXiv 2311.03099): drop task vectors at random and rescale the rest, then add them up or elect signs.
#
# The coin of an element follows from the seed, the model's place, the tensor's name and the element's position, by a
# counter-based generator (Philox): blocks, threads, files and workers cannot change it.


_WORDS = 8  # 32-bit words that one step of the generator's counter gives


def prepare_dare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
    """``base + scale * sum w_i d_i``, or ``base + scale * elected mean``; ``d`` kept at rate density, over density.

    Dividing by the density keeps the expectation of every element, as in the paper; mergekit matches the L1 norm.
    """
    keys = [_key(config.seed, index, operands.name) for index in range(len(operands.models))]

    def block(start: int, stop: int) -> Tensor:
        base = operands.reference().read(start, stop)
        deltas = []
        for model, key in zip(operands.models, keys, strict=True):
            delta = model.read(start, stop).sub_(base)
            if config.density < 1:
                delta.mul_(coins(key, start, stop, config.density)).div_(config.density)
            deltas.append(delta)
        if config.method == "dare_ties":
            return base.add_(elected_mean(deltas, weights), alpha=config.scale)
        for delta, weight in zip(deltas, weights, strict=True):
            base.add_(delta, alpha=config.scale * weight)
        return base

    return block


def coins(key: int, start: int, stop: int, density: float) -> Tensor:
    """Which of elements ``start`` to ``stop`` are kept, bool; each with probability ``density``."""
    first = start // _WORDS
    generator = np.random.Philox(key=key, counter=[first, 0, 0, 0])
    words = generator.random_raw(-(-(stop - first * _WORDS) // 2)).astype("<u8", copy=False).view("<u4")
    offset = start - first * _WORDS
    return torch.from_numpy(
        words[offset : offset + stop - start] < np.uint32(min(density * 2**32, 2**32 - 1))
    )


def _key(seed: int, model: int, tensor: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{model}/{tensor}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


Prepare = Callable[[Operands, Sequence[float], MergingConfig], BlockFunction]

PREPARE: dict[MergeMethod, Prepare] = {
    "linear": prepare_linear,
    "slerp": prepare_slerp,
    "multislerp": prepare_multislerp,
    "karcher": prepare_karcher,
    "task_arithmetic": prepare_task_arithmetic,
    "ties": prepare_ties,
    "dare_linear": prepare_dare,
    "dare_ties": prepare_dare,
    "model_stock": prepare_model_stock,
}
