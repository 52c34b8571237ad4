"""DARE (arXiv 2311.03099): drop task vectors at random and rescale the rest, then add them up or elect signs.

The coin of an element follows from the seed, the model's place, the tensor's name and the element's position, by a
counter-based generator (Philox): blocks, threads, files and workers cannot change it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from embedloom.config.merging import MergingConfig
from embedloom.merging.methods.consensus import elected_mean
from embedloom.merging.operands import BlockFunction, Operands

_WORDS = 8  # 32-bit words that one step of the generator's counter gives


def prepare(operands: Operands, weights: Sequence[float], config: MergingConfig) -> BlockFunction:
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
