"""Vectors as they are stored: float32, float16, int8 or packed bits, each with what brings it back to float32.

int8 and binary rows carry their own ``scale`` in a column, so that ``vector ~= scale x values``. A scale per
vector costs four bytes a row, and buys that a row depends on nothing but its own text: shards need no pass over
the corpus before them, and a delta run stores what a fresh run stores. Scales per dimension, as
``sentence_transformers.quantize_embeddings`` takes them from a calibration set, would change with the corpus.
"""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    return unit_length(short) if normalize else np.ascontiguousarray(short)


def unit_length(vectors: Matrix) -> Matrix:
    """Vectors [n, d] at unit length; one of zeros keeps its zeros, and whoever checks the vectors names it."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


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
    vectors = values.astype(np.float32, copy=False)
    return np.asarray(vectors if scales is None else vectors * scales.astype(np.float32)[:, None])


def vector_columns(vectors: Matrix, dtype: StoredType) -> dict[str, pa.Array]:
    """Arrow columns of vectors: ``vector`` (fixed_size_list) and, where there is one, ``scale`` (float32)."""
    values, scales = quantize(vectors, dtype)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    columns = {"vector": pa.FixedSizeListArray.from_arrays(flat, values.shape[1])}
    return columns if scales is None else {**columns, SCALE_COLUMN: pa.array(scales)}


def stored_vectors(table: pa.Table, source: str) -> Matrix:
    """Vectors of a table as float32 [n, d], whichever type they are stored in; without a copy if they are float32.

    Raises:
        DataError: no vectors of a known type, nulls, lists of different lengths (named by id), or int8 and binary
            values without their scales.
    """
    if "vector" not in table.column_names:
        raise DataError(
            f"{source}: no column 'vector'; a vectors table has id and vector, found {table.column_names}"
        )
    column = table.column("vector")
    kind = column.type
    fixed = pa.types.is_fixed_size_list(kind)
    floating = (fixed or pa.types.is_list(kind)) and pa.types.is_floating(kind.value_type)
    if not floating and not (fixed and kind.value_type in (pa.int8(), pa.uint8())):
        raise DataError(
            f"{source}: column 'vector' is {kind}, expected fixed_size_list of float32, float16, int8 or uint8 (packed bits)"
        )
    scales = None if floating else _scales(table, source)
    width = _common_length(table, source)
    blocks = [np.asarray(chunk.flatten().to_numpy(zero_copy_only=False)) for chunk in column.chunks]
    if len(blocks) != 1:
        blocks = [np.concatenate([np.empty(0, kind.value_type.to_pandas_dtype()), *blocks])]
    return dequantize(blocks[0].reshape(table.num_rows, width), scales)


def stored_dimension(kind: pa.DataType) -> int | None:
    """Dimension of vectors of a column type; None where only its rows say it."""
    if not pa.types.is_fixed_size_list(kind):
        return None
    return int(kind.list_size) * (8 if kind.value_type == pa.uint8() else 1)


def _scales(table: pa.Table, source: str) -> np.ndarray[Any, Any]:
    if SCALE_COLUMN not in table.column_names:
        raise DataError(
            f"{source}: column 'vector' is {table.schema.field('vector').type} without the column {SCALE_COLUMN!r} that brings it back to float32"
        )
    if table.column(SCALE_COLUMN).null_count:
        raise DataError(
            f"{source}: column {SCALE_COLUMN!r} has {table.column(SCALE_COLUMN).null_count} nulls"
        )
    return np.asarray(table.column(SCALE_COLUMN))


def _common_length(table: pa.Table, source: str) -> int:
    """Length of every list; a null counts as empty."""
    column = table.column("vector")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if not len(lengths):
        return int(getattr(column.type, "list_size", 0))
    expected = int(lengths[0])
    wrong = np.flatnonzero((lengths != expected) | (lengths == 0))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{source}: the vector of id {table.column('id')[row].as_py()!r} has {lengths[row]} dimensions, the first has {expected}"
        )
    return expected


def final_table(table: pa.Table, metadata: dict[bytes, bytes]) -> pa.Table:
    """The table with no column nullable and this schema metadata."""
    fields = [pa.field(name, table.schema.field(name).type, False) for name in table.column_names]
    return table.cast(pa.schema(fields, metadata=metadata))
