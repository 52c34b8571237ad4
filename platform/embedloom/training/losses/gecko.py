"""Gecko's loss: in-batch positives, the other queries, and the query's own negatives (arXiv 2403.20327, Eq. 3).

L_i = -log( exp(s(q_i, p_i+)/t) / ( sum_j [ exp(s(q_i, p_j+)/t) + [j != i] exp(s(q_i, q_j)/t) ] + sum_k exp(s(q_i, n_ik)/t) ) )

Gecko has one negative a query; here all of its own count. Nothing is masked, as in the paper.
"""

import torch
from torch import Tensor

from embedloom.training.losses.in_batch import loss_of, other_queries
from embedloom.training.losses.vectors import VectorGroups


def gecko(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; needs the positives of the batch."""
    others = other_queries(len(own), len(batch), first, own.queries.device)
    groups = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    positives = own.queries @ batch.documents[:, 0].T
    queries = own.queries @ batch.queries.T
    return loss_of(
        groups[:, 0],
        [(groups[:, 1:], None), (positives, others), (queries, others)],
        temperature,
    )
