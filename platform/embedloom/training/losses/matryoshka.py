"""Any loss over prefixes of the vectors too (Matryoshka representation learning, arXiv 2205.13147)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from embedloom.training.losses.vectors import VectorGroups


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The lengths that must work alone; ``normalize`` where similarities are cosines."""

    dimensions: tuple[int, ...]
    weights: tuple[float, ...]
    normalize: bool

    def views(self, groups: VectorGroups) -> list[tuple[float, VectorGroups]]:
        """(weight, the groups with their vectors cut to a length, and brought back to norm 1)."""
        return [
            (weight, groups.with_vectors(self._cut(groups.queries, size), self._cut(groups.documents, size)))
            for weight, size in zip(self.weights, self.dimensions, strict=True)
        ]

    def _cut(self, vectors: Tensor, size: int) -> Tensor:
        cut = vectors[..., :size]
        return torch.nn.functional.normalize(cut, dim=-1) if self.normalize else cut
