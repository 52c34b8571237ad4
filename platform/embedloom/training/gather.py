"""Vectors of all workers on every worker, with gradients that flow back to where a vector was made."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embedloom.training.losses.vectors import VectorGroups


class _AllGather(torch.autograd.Function):
    """all_gather of parts of different lengths; backward sums the gradients that all workers have for a part.

    ``torch.distributed.nn.all_gather`` needs equal lengths, which balanced ranks do not have.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
        ctx.start, ctx.rows = sum(counts[:rank]), counts[rank]
        padded = local.new_zeros((max(counts), *local.shape[1:]))
        padded[: local.shape[0]] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows], None, None


def all_gather(local: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """The rows of all workers, in the order of their ranks.

    Every worker must call it, and must call backward on what it makes of the result, even where that has weight 0:
    both directions are collective.

    Args:
        local: this worker's rows [counts[rank], ...].
        counts: rows of each worker.
        rank: this worker.

    Returns:
        [sum(counts), ...]. Its gradient arrives at ``local`` summed over all workers, as if one process had
        computed the sum of all workers' losses.
    """
    gathered: Tensor = _AllGather.apply(local, tuple(counts), rank)
    return gathered


def gather_groups(own: VectorGroups, counts: Sequence[int], rank: int) -> tuple[VectorGroups, int]:
    """The groups of all workers in the order of their ranks, and where this worker's own begin."""
    if len(counts) == 1:
        return own, 0
    return VectorGroups(
        all_gather(own.queries, counts, rank),
        all_gather(own.documents, counts, rank),
        all_gather(own.query_keys, counts, rank),
        all_gather(own.document_keys, counts, rank),
    ), sum(counts[:rank])
