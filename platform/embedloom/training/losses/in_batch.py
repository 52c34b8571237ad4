"""What the losses that look at the whole batch have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor


def other_queries(own: int, batch: int, first: int, device: torch.device) -> Tensor:
    """Bool [own, batch]: whether a column is another query than the row, which stands at ``first + row``."""
    rows = torch.arange(own, device=device)[:, None] + first
    return torch.arange(batch, device=device)[None, :] != rows


def loss_of(positive: Tensor, terms: Sequence[tuple[Tensor, Tensor | None]], temperature: float) -> Tensor:
    """-log softmax of the positive among itself and the kept terms.

    Args:
        positive: similarities [b].
        terms: similarities [b, n] and which of them count; None: all.
        temperature: divides the similarities.

    Returns:
        Losses [b].
    """
    columns = [positive[:, None]] + [
        scores if kept is None else scores.masked_fill(~kept, -torch.inf) for scores, kept in terms
    ]
    return -torch.log_softmax(torch.cat(columns, dim=1) / temperature, dim=1)[:, 0]
