"""Readers of Parquet, JSON lines and CSV: one file, a glob, or every fitting file below a folder."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from embedloom.config.data import CorpusSource
from embedloom.corpus.columns import check_columns, files_of, label_of, rows_of, used_columns
from embedloom.corpus.rows import SourceRow
from embedloom.errors import DataError, one_line
from embedloom.formats import JSONL_ENDINGS, PARQUET_ENDINGS, json_lines, parquet_records

CSV_ENDINGS = tuple(f"{ending}{packed}" for ending in (".csv", ".tsv") for packed in (".gz", ".bz2", ""))
_CSV_BLOCK_BYTES = 16 * 2**20  # no row may be longer than a block


def read_parquet(source: CorpusSource) -> Iterator[SourceRow]:
    """Rows of Parquet files, a batch at a time.

    Raises:
        DataError: not Parquet, or a column that is not there.
    """
    for path in files_of(source, PARQUET_ENDINGS):
        found = parquet_records(path, partial(check_columns, source, where=str(path)))
        yield from rows_of(source, (record for _, record in found), str(path), label_of(source, path))


def read_jsonl(source: CorpusSource) -> Iterator[SourceRow]:
    """Rows of JSON-lines files, plain or compressed; empty lines are passed over.

    A title that is absent from a line is no title; one absent from a whole file is an error.

    Raises:
        DataError: a line that is not a JSON object, or lacks a column.
    """
    for path in files_of(source, JSONL_ENDINGS):
        yield from rows_of(source, _json_records(path, source), str(path), label_of(source, path))


def read_csv(source: CorpusSource) -> Iterator[SourceRow]:
    """Rows of CSV files with a header line (``.tsv``: separated by tabs); quoted cells may span lines.

    Raises:
        DataError: not CSV in UTF-8, or a column that is not there.
    """
    for path in files_of(source, CSV_ENDINGS):
        yield from rows_of(source, _csv_records(path, source), str(path), label_of(source, path))


def _json_records(path: Path, source: CorpusSource) -> Iterator[Mapping[str, Any]]:
    title = source.title_column
    empty = True
    titled = title is None
    for number, record in json_lines(path):
        empty = False
        if title is not None:
            titled = titled or title in record
            record.setdefault(title, None)
        for key, column in used_columns(source).items():
            if column not in record:
                found = [name for name in record if name != title or record[name] is not None]
                raise DataError(
                    f"{path}: line {number} has no key {column!r} (corpus.sources.{key}); keys found: {found}"
                )
        yield record
    if not titled and not empty:
        raise DataError(f"{path}: no line has the key {title!r} (corpus.sources.title_column)")


def csv_reading(path: Path) -> tuple[pa.csv.ReadOptions, pa.csv.ParseOptions]:
    """How a CSV file is read, by its name."""
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return pa.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES), parse


def _csv_records(path: Path, source: CorpusSource) -> Iterator[Mapping[str, Any]]:
    read, parse = csv_reading(path)
    try:
        with pa.csv.open_csv(path, read, parse) as reader:
            columns = check_columns(source, reader.schema.names, str(path))
        # Every cell as text: "007" stays an id, and "NA" a word.
        convert = pa.csv.ConvertOptions(
            include_columns=columns,
            column_types={column: pa.string() for column in columns},
            strings_can_be_null=False,
        )
        with pa.csv.open_csv(path, read, parse, convert) as reader:
            for batch in reader:
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as CSV: {one_line(error)}") from error
