"""What a loss is given: the vectors of some queries and their documents, and which of the texts are equal."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedloom.errors import DataError


@dataclass(frozen=True, slots=True)
class VectorGroups:
    """``b`` queries with ``1 + k`` documents each, of ``d`` dimensions."""

    queries: Tensor  # [b, d]
    documents: Tensor  # [b, 1 + k, d], the positive first
    query_keys: Tensor  # [b] int64, equal where the texts are
    document_keys: Tensor  # [b, 1 + k] int64
    right_keys: Tensor | None = (
        None  # [b, r] int64: all right answers to a query, filled up with -1; None: its positive
    )

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            DataError: shapes that do not belong together.
        """
        queries, documents = self.queries, self.documents
        if (
            queries.ndim != 2
            or documents.ndim != 3
            or queries.shape[0] != documents.shape[0]
            or queries.shape[1] != documents.shape[2]
        ):
            raise DataError(
                f"loss: queries {tuple(queries.shape)} and documents {tuple(documents.shape)} must be [b, d] and [b, 1 + k, d]"
            )
        if self.query_keys.shape != queries.shape[:1] or self.document_keys.shape != documents.shape[:2]:
            raise DataError(
                f"loss: keys {tuple(self.query_keys.shape)} and {tuple(self.document_keys.shape)} do not fit documents {tuple(documents.shape)}"
            )

    def __len__(self) -> int:
        """Number of queries."""
        return int(self.queries.shape[0])

    @property
    def rights(self) -> Tensor:
        """Keys of all right answers to each query: [b, r]."""
        return self.document_keys[:, :1] if self.right_keys is None else self.right_keys

    def rows(self, positions: Tensor | slice) -> "VectorGroups":
        """Some of the queries, with their documents."""
        return VectorGroups(
            self.queries[positions],
            self.documents[positions],
            self.query_keys[positions],
            self.document_keys[positions],
            self.rights[positions],
        )

    def with_vectors(self, queries: Tensor, documents: Tensor) -> "VectorGroups":
        """Other vectors of the same texts."""
        return VectorGroups(queries, documents, self.query_keys, self.document_keys, self.right_keys)


def text_key(token_ids: Sequence[int]) -> int:
    """63-bit key of a text as the model sees it: two texts that differ only behind the token limit are equal.

    Among 10 million texts two different ones share a key with a chance of about 10^-5.
    """
    digest = hashlib.blake2b(np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def key_tensor(keys: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Keys as int64 on a device."""
    return torch.tensor(keys, dtype=torch.int64, device=device)


def padded_keys(keys: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Lists of keys as one tensor [len(keys), longest], filled up with -1, which is no key."""
    longest = max(map(len, keys), default=0)
    return key_tensor([[*own, *[-1] * (longest - len(own))] for own in keys], device).view(len(keys), longest)


def joined_keys(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several ``padded_keys`` in one."""
    longest = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, longest - part.shape[1]), value=-1) for part in parts])
