"""Vectors of length 1, whose inner product is the cosine."""

from typing import Any

import numpy as np

from embedloom.encoder.model import Vectors
from embedloom.retrieval.search import check_vectors


def unit_vectors(vectors: Any, source: str) -> Vectors:
    """The same directions at length 1: float32 [n, d], divided in float64.

    Args:
        vectors: [n, d], any float type.
        source: what they are, named in the error.

    Raises:
        DataError: a zero, NaN or infinite vector.
    """
    given: Vectors = np.asarray(vectors, dtype=np.float32)
    check_vectors(given, source)
    wide = given.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True), dtype=np.float32)
