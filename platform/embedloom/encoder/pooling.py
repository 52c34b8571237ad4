"""From token states to one vector per text. ``b`` texts, ``t`` tokens, ``d`` dimensions."""

import torch
from torch import Tensor

from embedloom.errors import ConfigError

POOLINGS = ("mean", "cls", "last_token")


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool token states in float32.

    Args:
        hidden: [b, t, d] states of the last layer.
        mask: [b, t], 1 at real tokens; every row has at least one.
        pooling: ``mean`` over real tokens (arXiv 2511.07025 §2, instruction tokens included), ``cls`` the
            first real token, ``last_token`` the last real one; padding may stand on either side.

    Returns:
        [b, d] float32.

    Raises:
        ConfigError: unknown pooling.
    """
    hidden = hidden.float()
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    if pooling == "cls":
        return hidden[rows, mask.argmax(dim=1)]
    if pooling == "last_token":
        return hidden[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
    raise ConfigError(f"pooling: {pooling!r} is unknown; allowed: {', '.join(POOLINGS)}")


def pool_packed(hidden: Tensor, starts: Tensor, pooling: str) -> Tensor:
    """Pool texts that lie behind one another without padding, in float32.

    Args:
        hidden: [tokens, d] states of the last layer.
        starts: [texts + 1], where each text starts; the last entry is the number of tokens.
        pooling: as for ``pool``.

    Returns:
        [texts, d] float32.

    Raises:
        ConfigError: unknown pooling.
    """
    hidden, starts = hidden.float(), starts.long()
    if pooling == "mean":
        return torch.segment_reduce(hidden, "mean", offsets=starts)
    if pooling == "cls":
        return hidden[starts[:-1]]
    if pooling == "last_token":
        return hidden[starts[1:] - 1]
    raise ConfigError(f"pooling: {pooling!r} is unknown; allowed: {', '.join(POOLINGS)}")
