"""Gecko's loss: in-batch positives, the other queries, and the query's own negatives (arXiv 2403.20327, Eq. 3).

L_i = -log( exp(s(q_i, p_i+)/t) / ( sum_j [ exp(s(q_i, p_j+)/t) + [j != i] exp(s(q_i, q_j)/t) ] + sum_k exp(s(q_i, n_ik)/t) ) )

Gecko has one negative a query; here all of its own count. The paper masks nothing; here, as for Gemini's loss, another
query is left out with its positive where it is the same text or its positive is a right answer to q_i, as is a
negative that is one: a batch with two rows of one query would else teach both to be wrong.
"""

import torch
from torch import Tensor

from embedloom.training.losses.in_batch import asking_otherwise, loss_of, own_negatives
from embedloom.training.losses.vectors import VectorGroups


def gecko(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; needs the positives of the batch."""
    others = asking_otherwise(own, batch, first)
    groups = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    positives = own.queries @ batch.documents[:, 0].T
    queries = own.queries @ batch.queries.T
    return loss_of(
        groups[:, 0],
        [own_negatives(own, groups), (positives, others), (queries, others)],
        temperature,
    )
