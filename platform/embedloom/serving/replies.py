"""What the endpoint answers with: reply models for the OpenAPI document, and vectors as JSON values."""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel


class Embedding(BaseModel):
    """One vector of a reply."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens the model computed, template and special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """Reply of ``POST /v1/embeddings``."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorDetail(BaseModel):
    """What went wrong, and with which parameter."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or above."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """One served model: what its vectors are, and what they may be compared with."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "embedloom"
    fingerprint: str
    contract_hash: str
    dimension: int
    matryoshka_dimensions: list[int]
    max_query_tokens: int
    max_document_tokens: int


class ModelList(BaseModel):
    """Reply of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def encode_vectors(
    vectors: np.ndarray[Any, np.dtype[np.float32]], encoding_format: Literal["float", "base64"]
) -> list[list[float]] | list[str]:
    """Vectors [n, dimension] as JSON values: lists of numbers, or base64 of little-endian float32."""
    if encoding_format == "float":
        numbers: list[list[float]] = vectors.tolist()
        return numbers
    little = np.ascontiguousarray(vectors, dtype="<f4")
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in little]


def shorten(
    vectors: np.ndarray[Any, np.dtype[np.float32]], dimension: int, normalize: bool
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The first ``dimension`` numbers of each vector, at unit length again if the model normalises."""
    cut = vectors[:, :dimension]
    return cut / np.linalg.norm(cut, axis=1, keepdims=True) if normalize else cut


def reply_body(encoded: Sequence[list[float] | str], model: str, tokens: int) -> dict[str, Any]:
    """An ``EmbeddingsResponse`` as plain values: validating megabytes of our own floats only costs time."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(encoded)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
