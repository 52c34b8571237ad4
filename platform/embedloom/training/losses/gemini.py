"""Gemini Embedding's loss: in-batch positives with a duplicate mask, and the query's own negatives (arXiv 2503.07891).

L_i = -log( exp(s(q_i, p_i+)/t) / ( sum_j m_ij exp(s(q_i, p_j+)/t) + sum_k exp(s(q_i, n_ik)/t) ) )

m_ij = 0 for j != i where q_j equals q_i or p_j equals p_i, else 1: few labels make many equal positives in a
classification batch. p_j that is another right answer to q_i counts as equal, and so does a negative that is one. No
same-tower terms. Gemini has one negative a query; here all of its own count.
"""

import torch
from torch import Tensor

from embedloom.training.losses.in_batch import asking_otherwise, loss_of, own_negatives
from embedloom.training.losses.vectors import VectorGroups


def gemini(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; needs the positives of the batch."""
    kept = asking_otherwise(own, batch, first)
    groups = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    positives = own.queries @ batch.documents[:, 0].T
    return loss_of(groups[:, 0], [own_negatives(own, groups), (positives, kept)], temperature)
