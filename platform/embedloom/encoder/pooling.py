"""From token states to one vector per text. ``b`` texts, ``t`` tokens, ``d`` dimensions."""

import torch
from torch import Tensor

from embedloom.errors import ConfigError
from embedloom.instructions import POOLINGS, pooling_modes

__all__ = ["POOLINGS", "pool", "pool_packed"]


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool token states in float32.

    Args:
        hidden: [b, t, d] states of the last layer.
        mask: [b, t], 1 at real tokens; every row has at least one. Padding may stand on either side.
        pooling: one of ``POOLINGS``, or several joined by ``+``, whose vectors are put behind one another:
            ``mean`` over real tokens (arXiv 2511.07025 §2, instruction tokens included), ``cls`` the first real token,
            ``last_token`` the last real one, ``max`` the largest value of each dimension, ``mean_sqrt_len`` the sum
            over the square root of the length, ``weighted_mean`` with weights 1, 2, 3, ... (arXiv 2202.08904).

    Returns:
        [b, d x modes] float32.

    Raises:
        ConfigError: unknown pooling.
    """
    hidden = hidden.float()
    found = [_pool_one(hidden, mask, mode) for mode in _modes(pooling)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _pool_one(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    if mode == "cls":
        return hidden[rows, mask.argmax(dim=1)]
    if mode == "last_token":
        return hidden[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if mode == "max":
        return hidden.masked_fill(weights == 0, float("-inf")).amax(dim=1)
    if mode == "weighted_mean":
        weights = weights * mask.cumsum(dim=1).unsqueeze(-1)
    total, size = (hidden * weights).sum(dim=1), weights.sum(dim=1)
    return total / (size.sqrt() if mode == "mean_sqrt_len" else size)


def pool_packed(hidden: Tensor, starts: Tensor, pooling: str) -> Tensor:
    """Pool texts that lie behind one another without padding, in float32.

    Args:
        hidden: [tokens, d] states of the last layer.
        starts: [texts + 1], where each text starts; the last entry is the number of tokens.
        pooling: as for ``pool``.

    Returns:
        [texts, d x modes] float32.

    Raises:
        ConfigError: unknown pooling.
    """
    hidden, starts = hidden.float(), starts.long()
    found = [_pool_one_packed(hidden, starts, mode) for mode in _modes(pooling)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _pool_one_packed(hidden: Tensor, starts: Tensor, mode: str) -> Tensor:
    if mode == "cls":
        return hidden[starts[:-1]]
    if mode == "last_token":
        return hidden[starts[1:] - 1]
    if mode in ("mean", "max"):
        return torch.segment_reduce(hidden, mode, offsets=starts)
    lengths = (starts[1:] - starts[:-1]).to(hidden.dtype).unsqueeze(1)
    if mode == "mean_sqrt_len":
        return torch.segment_reduce(hidden, "sum", offsets=starts) / lengths.sqrt()
    first = torch.repeat_interleave(starts[:-1], starts[1:] - starts[:-1])
    weights = (torch.arange(len(hidden), device=hidden.device) - first + 1).to(hidden.dtype).unsqueeze(1)
    return torch.segment_reduce(hidden * weights, "sum", offsets=starts) / (lengths * (lengths + 1) / 2)


def _modes(pooling: str) -> list[str]:
    try:
        return pooling_modes(pooling)
    except ValueError as error:
        raise ConfigError(str(error)) from error
