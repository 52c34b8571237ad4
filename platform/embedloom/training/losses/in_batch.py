"""What the losses that look at the whole batch have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

from embedloom.training.losses.vectors import VectorGroups


def other_queries(own: int, batch: int, first: int, device: torch.device) -> Tensor:
    """Bool [own, batch]: whether a column is another query than the row, which stands at ``first + row``."""
    rows = torch.arange(own, device=device)[:, None] + first
    return torch.arange(batch, device=device)[None, :] != rows


def is_right(own: VectorGroups, keys: Tensor) -> Tensor:
    """Bool [own, n]: whether documents are right answers to a query, by their keys [n] or [own, n]."""
    rights = own.rights
    columns = keys if keys.ndim == 2 else keys[None, :].expand(len(rights), -1)
    found = torch.zeros(columns.shape, dtype=torch.bool, device=keys.device)
    # Column by column, as [own, r, n] would not fit; nearly all of a query's other answers are outside the batch.
    for column in rights.T[torch.isin(rights.contiguous(), keys.contiguous()).any(dim=0)]:
        found |= columns == column[:, None]
    return found


def own_negatives(own: VectorGroups, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The term of a query's own negatives: their similarities out of ``scores`` [own, 1 + k], less right answers."""
    return scores[:, 1:], ~is_right(own, own.document_keys[:, 1:])


def asking_otherwise(own: VectorGroups, batch: VectorGroups, first: int) -> Tensor:
    """Bool [own, batch]: queries that neither are the row's, which stands at ``first + row``, nor share an answer."""
    others = other_queries(len(own), len(batch), first, own.queries.device)
    others = others & (own.query_keys[:, None] != batch.query_keys[None, :])
    return others & ~is_right(own, batch.document_keys[:, 0])


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
