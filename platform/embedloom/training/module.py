"""The part that DeepSpeed wraps: groups of token ids in, vectors out."""

import torch
from torch import Tensor, nn

from embedloom.encoder.batching import token_budget_batches
from embedloom.encoder.model import Encoder
from embedloom.training.groups import Group
from embedloom.training.losses.vectors import VectorGroups, key_tensor, padded_keys, text_key

# Without packing, a micro-batch goes through the backbone in this many length-sorted pieces or a few more: enough to lose most
# padding, few enough to keep the matrix products large.
_PIECES = 4


class ContrastiveModule(nn.Module):
    """Backbone + pooling of one micro-batch, in one forward so ZeRO's hooks see it whole."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.backbone = encoder.backbone
        self._encoder = encoder

    def forward(self, groups: list[Group]) -> tuple[Tensor, Tensor]:
        """Queries [b, d] and documents [b, 1 + k, d]; all groups have the same number of documents."""
        texts = [group.query for group in groups] + [
            document for group in groups for document in group.documents
        ]
        vectors = self._vectors(texts)
        return vectors[: len(groups)], vectors[len(groups) :].view(len(groups), -1, vectors.shape[1])

    def _vectors(self, texts: list[list[int]]) -> Tensor:
        if self._encoder.packed:
            return self._encoder.forward(texts)
        lengths = [len(text) for text in texts]
        batches = token_budget_batches(lengths, max(max(lengths), sum(lengths) // _PIECES))
        parts = [self._encoder.forward([texts[position] for position in batch]) for batch in batches]
        order = torch.tensor([position for batch in batches for position in batch], device=parts[0].device)
        return torch.cat(parts)[torch.argsort(order)]


def vector_groups(groups: list[Group], queries: Tensor, documents: Tensor) -> VectorGroups:
    """Vectors of groups together with the keys of their texts."""
    return VectorGroups(
        queries,
        documents,
        key_tensor([_query_key(group) for group in groups], queries.device),
        key_tensor([_document_keys(group) for group in groups], queries.device),
        padded_keys([group.right_keys or _document_keys(group)[:1] for group in groups], queries.device),
    )


def _query_key(group: Group) -> int:
    return text_key(group.query) if group.query_key is None else group.query_key


def _document_keys(group: Group) -> list[int]:
    return (
        [text_key(text) for text in group.documents] if group.document_keys is None else group.document_keys
    )
