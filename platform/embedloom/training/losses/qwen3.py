"""Qwen3-Embedding's loss: own negatives and four kinds of in-batch terms, with a false-negative mask (arXiv 2506.05176).

Z_i = exp(s(q_i, d_i+)/t) + sum_k m exp(s(q_i, d_ik-)/t) + sum_{j != i} m exp(s(q_i, q_j)/t)
      + sum_{j != i} m exp(s(d_i+, d_j)/t) + sum_{j != i} m exp(s(q_i, d_j)/t),     L_i = -log( exp(s(q_i, d_i+)/t) / Z_i )

m = 0 where that term's own similarity is above s(q_i, d_i+) + 0.1, or where the document equals d_i+; else 1. Any other
right answer to q_i counts as equal to d_i+.

Two things the report leaves open:

- What d_j spans. ``all`` documents of the other queries, positives and negatives, is how arXiv 2511.07025 §6.1 reads
  it, and whose ablation this repeats; ``positives`` is the narrower reading.
- Which document decides for a query term s(q_i, q_j). Here its positive does: where d_j+ equals d_i+, both queries
  ask for the same document and q_j is no negative of q_i; nor is it where both are one text.

The mask is a decision, not a part of the function: no gradient flows through it.
"""

import torch
from torch import Tensor

from embedloom.training.losses.in_batch import (
    asking_otherwise,
    is_right,
    loss_of,
    other_queries,
    own_negatives,
)
from embedloom.training.losses.vectors import VectorGroups

MARGIN = 0.1


def qwen3(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; the documents in ``batch`` are those that d_j spans."""
    spanned = batch.documents.shape[1]
    others = other_queries(len(own), len(batch), first, own.queries.device)
    wide = others.repeat_interleave(spanned, dim=1)
    documents = batch.documents.flatten(0, 1)
    same_document = is_right(own, batch.document_keys.flatten())
    groups = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    limit = groups[:, :1].detach() + MARGIN
    terms = [
        own_negatives(own, groups),
        (own.queries @ batch.queries.T, asking_otherwise(own, batch, first)),
        (own.documents[:, 0] @ documents.T, wide & ~same_document),
        (own.queries @ documents.T, wide & ~same_document),
    ]
    return loss_of(groups[:, 0], [(scores, kept & (scores <= limit)) for scores, kept in terms], temperature)
