"""Vectors as replies state them: lists of numbers, 8-bit numbers, packed bits, each also as base64 of its bytes.

As Cohere's ``embedding_types`` and Voyage's ``output_dtype`` and ``encoding_format`` define them (docs.cohere.com/reference/embed,
docs.voyageai.com/docs/flexible-dimensions-and-quantization): ubinary packs eight dimensions into a byte from the highest bit down, a
bit is set where the number is above 0; binary is the same less 128 (offset binary); base64 is of float32, or of the bytes of the type
that is asked for. How numbers become 8 bits they leave to the model: here each vector has a scale of its own, as in stored vectors, so a
vector depends on nothing but its own text.
"""

import base64
from typing import Any

import numpy as np

from embedloom.retrieval.stored import quantize
from embedloom.serving.messages import Vectors
from embedloom.serving.refusals import ApiError
from embedloom.serving.schemas import Encoding, VectorType

Values = list[list[float]] | list[list[int]] | list[str]
OFFSET = 128  # between a signed and an unsigned 8-bit type


def typed(vectors: Vectors, kind: VectorType) -> tuple[np.ndarray[Any, Any], Vectors | None]:
    """Vectors in a type, and the scale of each where it has one: vector ≈ scale x value, less ``OFFSET`` in uint8.

    Args:
        vectors: float32 [n, d]; d is a multiple of eight for packed bits.
        kind: the type.

    Returns:
        Values [n, d], or [n, d / 8] of packed bits; scales [n] of int8 and uint8, else None.
    """
    if kind == "float":
        return vectors, None
    if kind in ("binary", "ubinary"):
        bits, _ = quantize(vectors, "binary")
        return (bits.astype(np.int16) - OFFSET).astype(np.int8) if kind == "binary" else bits, None
    values, scales = quantize(vectors, "int8")
    return (values.astype(np.int16) + OFFSET).astype(np.uint8) if kind == "uint8" else values, scales


def encode_vectors(vectors: Vectors, encoding: Encoding, as_base64: bool = False) -> Values:
    """Vectors [n, d] as JSON values: lists of numbers, or base64 of the type's bytes, float32 in little-endian order."""
    return encoded(vectors, encoding, as_base64)[0]


def encoded(
    vectors: Vectors, encoding: Encoding, as_base64: bool = False
) -> tuple[Values, list[float] | None]:
    """``encode_vectors``, and the scale of each vector where its type has one."""
    kind: VectorType = "float" if encoding == "base64" else encoding
    values, scales = typed(vectors, kind)
    told = None if scales is None else scales.tolist()
    if encoding != "base64" and not as_base64:
        numbers: list[list[float]] = values.tolist()
        return numbers, told
    little = np.ascontiguousarray(values, dtype="<f4" if kind == "float" else values.dtype)
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in little], told


def check_packable(dimension: int, kinds: set[Encoding], field: str) -> None:
    """Refuse packed bits of a number of dimensions that fills no whole byte.

    Raises:
        ApiError: 400, naming the field.
    """
    if dimension % 8 and kinds & {"binary", "ubinary"}:
        raise ApiError(
            400,
            f"{field}: binary packs eight dimensions into a byte, these vectors have {dimension}; allowed: float, base64, int8, "
            "uint8",
            param=field,
            code="dimensions_not_available",
        )
