"""Records of Parquet and JSON-lines files, for the readers of foreign formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.formats import JSONL_ENDINGS, PARQUET_ENDINGS, files_at, parquet_records, records_of


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
        for number, record in records_of(path):
            yield f"{path.name}:{number}", record


def parquet_columns(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Records of these columns of one Parquet file.

    Raises:
        DataError: not there, not Parquet, or without a column.
    """

    def wanted(names: list[str]) -> list[str]:
        missing = [column for column in columns if column not in names]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}; found {names}")
        return columns

    return (record for _, record in parquet_records(path, wanted))
