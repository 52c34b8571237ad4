"""Records of Parquet and JSON-lines files, for the readers of foreign formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError, one_line
from embedloom.formats import JSONL_ENDINGS, PARQUET_ENDINGS, files_at, json_lines

_BATCH_ROWS = 1024


def source_files(source: TrainingSource, endings: tuple[str, ...]) -> list[Path]:
    """The source's files with one of these endings, sorted.

    Raises:
        DataError: none.
    """
    found = [path for path in files_at(source.path or "") if path.name.lower().endswith(endings)]
    if not found:
        raise DataError(
            f"source {source.name!r}: {source.path!r} ({source.format}) has no file ending in {', '.join(endings)}"
        )
    return found


def records(source: TrainingSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name:row number, record) of Parquet and JSON-lines files."""
    for path in source_files(source, (*PARQUET_ENDINGS, *JSONL_ENDINGS)):
        rows = parquet_rows(path) if path.suffix in PARQUET_ENDINGS else json_lines(path)
        for number, record in rows:
            yield f"{path.name}:{number}", record


def parquet_rows(path: Path, columns: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, record) of one Parquet file, a batch at a time.

    Raises:
        DataError: not there, not Parquet, or without a column.
    """
    number = 0
    try:
        with pa.parquet.ParquetFile(path) as file:
            missing = [column for column in columns or () if column not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: no column {missing[0]!r}; found {file.schema_arrow.names}")
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    yield number, record
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {one_line(error)}") from error
