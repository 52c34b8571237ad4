"""Vectors as they are stored: float32, float16, int8 or packed bits, each with what brings it back to float32.

int8 and binary rows carry their own ``scale`` in a column, so that ``vector ~= scale x values``. A scale per
vector costs four bytes a row, and buys that a row depends on nothing but its own text: shards need no pass over
the corpus before them, and a delta run stores what a fresh run stores. Scales per dimension, as
``sentence_transformers.quantize_embeddings`` takes them from a calibration set, would change with the corpus.
"""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from embedloom.errors import ConfigError, DataError

StoredType = Literal["float32", "float16", "int8", "binary"]
Matrix = np.ndarray[Any, np.dtype[np.float32]]
SCALE_COLUMN = "scale"
_LEVELS = 127  # symmetric: -128 is not used, so that a vector and its negative are stored alike


def shorten(vectors: Matrix, dimensions: int | None, normalize: bool) -> Matrix:
    """The first ``dimensions`` of every vector, of unit length again if ``normalize`` (arXiv 2205.13147).

    Args:
        vectors: float32 [n, d].
        dimensions: how many to keep; None keeps all.
        normalize: whether the model's vectors have unit length.

    Raises:
        ConfigError: more dimensions than the vectors have.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    if dimensions > vectors.shape[1]:
        raise ConfigError(
            f"embedding.dimensions: {dimensions} is above the {vectors.shape[1]} dimensions of the model"
        )
    short = vectors[:, :dimensions]
    if not normalize:
        return np.ascontiguousarray(short)
    lengths = np.linalg.norm(short, axis=1, keepdims=True)
    # A prefix of zeros keeps its zeros: whoever checks the vectors names it.
    return np.asarray(short / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def quantize(vectors: Matrix, dtype: StoredType) -> tuple[np.ndarray[Any, Any], Matrix | None]:
    """Stored values [n, w] and, for int8 and binary, the scale of each row [n].

    int8: ``round(v / scale)`` with ``scale = max|v| / 127``. binary: a bit a dimension, set where ``v > 0``, packed
    into bytes from the highest bit down (as sentence-transformers and FAISS pack them); the scale ``mean|v|`` is
    the one that brings the signs nearest to the vector (arXiv 1603.05279).

    Args:
        vectors: float32 [n, d], finite, none zero.
        dtype: stored type.

    Raises:
        ConfigError: binary, and d is not a multiple of eight.
    """
    if dtype in ("float32", "float16"):
        return vectors.astype(dtype), None
    if dtype == "int8":
        scales = np.abs(vectors).max(axis=1).astype(np.float32) / np.float32(_LEVELS)
        return np.rint(vectors / scales[:, None]).astype(np.int8), scales
    if vectors.shape[1] % 8:
        raise ConfigError(
            f"embedding.dtype: binary packs eight dimensions into a byte, the vectors have {vectors.shape[1]}"
        )
    return np.packbits(vectors > 0, axis=1), np.abs(vectors).mean(axis=1, dtype=np.float32)


def dequantize(values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any] | None) -> Matrix:
    """float32 [n, d] of what ``quantize`` stored; uint8 values are packed bits.

    Args:
        values: [n, w], float32, float16, int8 or uint8.
        scales: [n], where the values are int8 or uint8.
    """
    if values.dtype == np.uint8:
        values = np.unpackbits(values, axis=1).astype(np.int8) * 2 - 1
    vectors = values.astype(np.float32)
    return np.asarray(vectors if scales is None else vectors * scales.astype(np.float32)[:, None])


def vector_columns(vectors: Matrix, dtype: StoredType) -> dict[str, pa.Array]:
    """Arrow columns of vectors: ``vector`` (fixed_size_list) and, where there is one, ``scale`` (float32)."""
    values, scales = quantize(vectors, dtype)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    columns = {"vector": pa.FixedSizeListArray.from_arrays(flat, values.shape[1])}
    return columns if scales is None else {**columns, SCALE_COLUMN: pa.array(scales)}


def stored_vectors(table: pa.Table, source: str) -> Matrix:
    """Vectors of a table as float32 [n, d], whichever type they are stored in.

    Raises:
        DataError: no vectors of a known type, or int8 and binary values without their scales.
    """
    kind: Any = table.schema.field("vector").type if "vector" in table.column_names else pa.null()
    if not pa.types.is_fixed_size_list(kind) or not (
        pa.types.is_floating(kind.value_type) or kind.value_type in (pa.int8(), pa.uint8())
    ):
        raise DataError(
            f"{source}: column 'vector' is {kind}, expected fixed_size_list of float32, float16, int8 or uint8 (packed bits)"
        )
    floating = pa.types.is_floating(kind.value_type)
    if not floating and SCALE_COLUMN not in table.column_names:
        raise DataError(
            f"{source}: column 'vector' is {kind} without the column {SCALE_COLUMN!r} that brings it back to float32"
        )
    for name in ("vector",) if floating else ("vector", SCALE_COLUMN):
        if table.column(name).null_count:
            raise DataError(f"{source}: column {name!r} has {table.column(name).null_count} nulls")
    column = table.column("vector").combine_chunks()
    flat = column.flatten() if isinstance(column, pa.Array) else pa.array([], kind.value_type)
    values = np.asarray(flat).reshape(table.num_rows, kind.list_size)
    return dequantize(values, None if floating else np.asarray(table.column(SCALE_COLUMN)))


def final_table(table: pa.Table, metadata: dict[bytes, bytes]) -> pa.Table:
    """The table with no column nullable and this schema metadata."""
    fields = [pa.field(name, table.schema.field(name).type, False) for name in table.column_names]
    return table.cast(pa.schema(fields, metadata=metadata))
