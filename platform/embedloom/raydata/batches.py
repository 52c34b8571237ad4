"""Batches as Ray Data hands them to a callable: a ``pyarrow.Table``, or columns as numpy arrays by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.errors import DataError, one_line

Batch = Any  # pa.Table | dict[str, np.ndarray]; pyarrow ships no types


def columns_of(batch: Any) -> dict[str, Any]:
    """The columns of a batch by name: Arrow's, or arrays.

    Raises:
        DataError: a batch of another format.
    """
    if isinstance(batch, pa.Table):
        return dict(zip(batch.column_names, batch.columns, strict=True))
    if isinstance(batch, Mapping):
        return dict(batch)
    raise DataError(f"batch_format: a batch is {type(batch).__name__}; allowed: 'pyarrow', 'numpy'")


def strings_of(columns: Mapping[str, Any], name: str) -> list[str | None]:
    """A column of texts; null, and what pandas writes for it, is None.

    Raises:
        DataError: no such column, or a value that is no text.
    """
    if name not in columns:
        raise DataError(f"no column {name!r}; columns found: {list(columns)}")
    column = columns[name]
    values = column.to_pylist() if isinstance(column, pa.ChunkedArray) else column.tolist()
    found = [None if value is None or value != value else value for value in values]
    for row, value in enumerate(found):
        if not isinstance(value, str | None):
            shown = one_line(repr(value), 40)
            raise DataError(
                f"column {name!r} holds {type(value).__name__} {shown} (row {row} of a batch); allowed: text or null"
            )
    return found


def filtered(batch: Batch, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> Batch:
    """The rows that are kept [n]."""
    if isinstance(batch, pa.Table):
        return batch.filter(pa.array(kept))
    return {name: column[kept] for name, column in batch.items()}


def with_columns(batch: Batch, new: Mapping[str, pa.Array]) -> Batch:
    """The batch with further columns; among numpy columns, lists without nulls are one array [n, d]."""
    if not isinstance(batch, pa.Table):
        return {**batch, **{name: _as_numpy(column) for name, column in new.items()}}
    for name, column in new.items():
        batch = batch.append_column(name, column)
    return batch


def _as_numpy(column: pa.Array) -> np.ndarray[Any, Any]:
    if pa.types.is_fixed_size_list(column.type) and not column.null_count:
        flat: np.ndarray[Any, Any] = column.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), column.type.list_size)
    found: np.ndarray[Any, Any] = column.to_numpy(zero_copy_only=False)
    return found
