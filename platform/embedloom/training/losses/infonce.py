"""InfoNCE over a query's own positive and its own mined negatives (arXiv 2511.07025, Eq. 1).

L_i = -log( exp(s(q_i, d_i+)/t) / ( exp(s(q_i, d_i+)/t) + sum_k exp(s(q_i, d_ik-)/t) ) )

No in-batch and no same-tower negatives: the loss of a query does not depend on its batch, so nothing is gathered
between workers and the batch size only averages gradients. A negative that is a right answer is left out.
"""

import torch
from torch import Tensor

from embedloom.training.losses.in_batch import loss_of, own_negatives
from embedloom.training.losses.vectors import VectorGroups


def infonce(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; ``batch`` and ``first`` are not looked at."""
    scores = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    return loss_of(scores[:, 0], [own_negatives(own, scores)], temperature)
