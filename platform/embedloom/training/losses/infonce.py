"""InfoNCE over a query's own positive and its own mined negatives (arXiv 2511.07025, Eq. 1).

L_i = -log( exp(s(q_i, d_i+)/t) / ( exp(s(q_i, d_i+)/t) + sum_k exp(s(q_i, d_ik-)/t) ) )

No in-batch and no same-tower negatives: the loss of a query does not depend on its batch, so nothing is gathered
between workers and the batch size only averages gradients.
"""

import torch
from torch import Tensor

from embedloom.errors import DataError


def infonce(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """Per-query losses [b].

    Args:
        queries: [b, d] unit vectors.
        documents: [b, 1 + k, d] unit vectors, the positive first.
        temperature: divides the cosine similarities (the paper: 0.02).

    Raises:
        DataError: shapes that do not belong together.
    """
    if (
        queries.ndim != 2
        or documents.ndim != 3
        or queries.shape[0] != documents.shape[0]
        or queries.shape[1] != documents.shape[2]
    ):
        raise DataError(
            f"infonce: queries {tuple(queries.shape)} and documents {tuple(documents.shape)} must be [b, d] and [b, 1 + k, d]"
        )
    scores = torch.einsum("bd,bkd->bk", queries, documents) / temperature
    return -torch.log_softmax(scores, dim=1)[:, 0]
