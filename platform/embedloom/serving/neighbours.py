"""How far a new version of the model has drifted: do both find the same neighbours? Plain numpy."""

from dataclasses import dataclass

import numpy as np

from embedloom.serving.messages import Vectors

NEIGHBOURS = 10
MIN_TEXTS = 64  # in the store; among fewer, two random orders agree too often
_MOST_TEXTS = 512  # 8 MB at 4,096 dimensions
_ROWS_COMPARED = 8  # of one request, so that a bulk request costs no more than a query


@dataclass(frozen=True, slots=True)
class Compared:
    """What one request's texts say."""

    texts: int  # with neighbours
    overlap_sum: float
    cosines: int
    cosine_sum: float


class NeighbourStore:
    """Vectors of recent texts, in which neighbours are looked up; a ring.

    ``same_space``: the new version's queries must work on vectors that the live version made, so its neighbours are
    looked up among those. Else each version looks among its own vectors of the same texts.
    """

    def __init__(self, same_space: bool) -> None:
        self.same_space = same_space
        self._live: list[Vectors] = []
        self._candidate: list[Vectors] = []
        self._next = 0

    def __len__(self) -> int:
        """Texts held."""
        return len(self._live)

    def add(self, live: Vectors, candidate: Vectors | None = None) -> None:
        """Keep vectors [n, dimension] of texts by the live version and, unless ``same_space``, by the new one."""
        others = live if self.same_space or candidate is None else candidate
        if not self.same_space and candidate is None:
            return
        for own, other in zip(live[:_ROWS_COMPARED], others[:_ROWS_COMPARED], strict=False):
            if len(self._live) < _MOST_TEXTS:
                self._live.append(own)
                self._candidate.append(other)
            else:
                self._live[self._next], self._candidate[self._next] = own, other
                self._next = (self._next + 1) % _MOST_TEXTS

    def compare(self, live: Vectors, candidate: Vectors) -> Compared:
        """Both versions' vectors of the same texts, [n, dimension] each."""
        live, candidate = live[:_ROWS_COMPARED], candidate[:_ROWS_COMPARED]
        cosines = 0.0
        if self.same_space:
            lengths = np.linalg.norm(live, axis=1) * np.linalg.norm(candidate, axis=1)
            cosines = float(((live * candidate).sum(axis=1) / np.maximum(lengths, 1e-12)).sum())
        count = len(live) if self.same_space else 0
        if len(self) < MIN_TEXTS:
            return Compared(0, 0.0, count, cosines)
        one, other = _nearest(live, self._live), _nearest(candidate, self._candidate)
        shares = [
            len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(one.tolist(), other.tolist(), strict=True)
        ]
        return Compared(len(live), sum(shares), count, cosines)


def _nearest(vectors: Vectors, stored: list[Vectors]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Rows of the nearest stored vectors by cosine: [n, NEIGHBOURS], unordered."""
    matrix = np.stack(stored)
    matrix = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    # Queries need no normalising: their length does not change the order.
    return np.argpartition(-(vectors @ matrix.T), NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
