"""Vectors as replies state them: lists of numbers, base64, shortened ones, and similarities."""

import base64
from typing import Literal

import numpy as np

from embedloom.retrieval.stored import shorten, unit_length
from embedloom.serving.messages import Vectors


def encode_vectors(
    vectors: Vectors, encoding_format: Literal["float", "base64"]
) -> list[list[float]] | list[str]:
    """Vectors [n, dimension] as JSON values: lists of numbers, or base64 of little-endian float32."""
    if encoding_format == "float":
        numbers: list[list[float]] = vectors.tolist()
        return numbers
    little = np.ascontiguousarray(vectors, dtype="<f4")
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in little]


def finished(vectors: Vectors, dimension: int | None, normalized: bool | None, normalize: bool) -> Vectors:
    """Vectors [n, d] as a request wants them: shortened, and of unit length where it or the model says so."""
    if dimension is not None and dimension < vectors.shape[1]:
        return shorten(vectors, dimension, normalize or bool(normalized))
    if normalized and not normalize:
        return unit_length(vectors)
    return vectors


def similarities(query: Vectors, documents: Vectors, normalize: bool) -> Vectors:
    """Cosines of models that normalise, inner products of others: float32 [n].

    Summed in float64 without BLAS, so that a pair scores alike in whatever company it is asked about.

    Args:
        query: float32 [dimension].
        documents: float32 [n, dimension].
        normalize: whether the model's vectors have unit length; their scores then stay within [-1, 1].
    """
    products = np.einsum("nd,d->n", documents.astype(np.float64), query.astype(np.float64), optimize=False)
    return np.asarray(np.clip(products, -1, 1) if normalize else products, dtype=np.float32)
