"""File formats that hold texts: JSON lines and plain text or Markdown, one record at a time, and where they lie."""

import csv
import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from embedloom.errors import DataError, one_line

_BATCH_ROWS = 1024
_PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
PARQUET_ENDINGS = (".parquet", ".pq")
JSONL_ENDINGS = tuple(f"{ending}{packed}" for ending in (".jsonl", ".ndjson", ".json") for packed in _PACKED)
TEXT_ENDINGS = (".txt", ".md", ".markdown", ".rst")
_MARKDOWN = (".md", ".markdown")
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")
_GLOB_CHARACTERS = set("*?[")


def files_at(path: str) -> list[Path]:
    """Files behind a path, sorted: the file itself, all below a folder, or what a glob matches; none hidden."""
    text = str(Path(path).expanduser())
    if _GLOB_CHARACTERS & set(text):
        found = [Path(name) for name in glob.glob(text, recursive=True)]  # noqa: PTH207 - absolute patterns
    elif Path(text).is_dir():
        found = list(Path(text).rglob("*"))
    else:
        found = [Path(text)]
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def named_below(path: str, files: Sequence[Path]) -> dict[str, Path]:
    """Files by their paths below the folder that ``path`` is, or below the one that those of a glob share."""
    root = Path(path).expanduser()
    if files and not root.is_dir():
        root = Path(os.path.commonpath([file.parent for file in files]))
    return {file.relative_to(root).as_posix(): file for file in files}


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty; plain or compressed.

    Raises:
        DataError: not UTF-8, or a line that is not a JSON object.
    """
    number = 0
    try:
        with fsspec.open(str(path), "rt", encoding="utf-8-sig", compression="infer") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    seen = f"line {number} holds a {type(record).__name__}"
                    raise DataError(f"{path}: {seen}; allowed: one JSON object a line")
                yield number, record
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {number} is not JSON ({error}); allowed: one JSON object a line"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 after line {number}: {error.reason}; allowed: UTF-8") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: not readable as JSON lines: {one_line(error)}") from error


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        DataError: not there, not JSON, or another value than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def parquet_records(
    path: Path, columns: Callable[[list[str]], list[str]] = list
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, record) of one Parquet file, a batch at a time.

    Args:
        path: the file.
        columns: from the names of the file's columns to those that are read; raises where it misses one.

    Raises:
        DataError: not there, or not Parquet.
    """
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns(file.schema_arrow.names)):
                for record in batch.to_pylist():
                    yield number, record
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {one_line(error)}") from error


def records_of(
    path: Path, columns: Callable[[list[str]], list[str]] = list
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of a Parquet or JSON-lines file; of the latter with all its keys."""
    return parquet_records(path, columns) if path.name.lower().endswith(PARQUET_ENDINGS) else json_lines(path)


def beir_entries(path: Path) -> Iterator[tuple[str, str | None, str]]:
    """(id, title, text) of every line of a BEIR file of documents or queries.

    A title alone is the text, as BEIR and mteb read it: they join the two.

    Raises:
        DataError: a line without an id or without both texts, or with one that is no text.
    """
    for number, record in json_lines(path):
        where = f"{path}: line {number}"
        title, text = record.get("title"), record.get("text")
        if "_id" not in record or ("text" not in record and not title):
            missing = "text" if "_id" in record else "_id"
            raise DataError(f"{where} has no key {missing!r}; keys found: {list(record)}")
        wrong = next((value for value in (title, text) if not isinstance(value, str | None)), None)
        if wrong is not None:
            raise DataError(
                f"{where}: a title or text is {type(wrong).__name__} {str(wrong)[:40]!r}; allowed: text or null"
            )
        yield (
            (str(record["_id"]), None, title)
            if title and not text
            else (str(record["_id"]), title, text or "")
        )


def judgements(path: Path) -> Iterator[tuple[str, str, float]]:
    """(query id, document id, grade) of a BEIR file of judgements: three columns between tabs, perhaps a header.

    Grades may be written ``1`` or ``1.0``; blank lines are passed over.

    Raises:
        DataError: not UTF-8, or a line that does not fit.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = enumerate(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE), start=1)
            for number, fields in lines:
                if not any(field.strip() for field in fields):
                    continue
                try:
                    query_id, document_id, grade = (field.strip() for field in fields)
                    if not _is_number(grade):
                        raise ValueError(grade)
                except ValueError as error:
                    if number == 1 and len(fields) == 3 and not _is_number(fields[2]):
                        continue  # a header
                    expected = "expected query-id, corpus-id and a number between tabs"
                    raise DataError(f"{path}: line {number} is {fields}; {expected}") from error
                yield query_id, document_id, float(grade)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason}; allowed: UTF-8") from error


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def read_text(path: Path) -> tuple[str, str]:
    """Title and body of a text file: the first Markdown heading, else the file's name without its ending.

    Raises:
        DataError: not readable, or not UTF-8.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); allowed: text in UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from error
    title, text = split_title(content) if path.suffix.lower() in _MARKDOWN else (None, content)
    return title or path.stem, text


def split_title(markdown: str) -> tuple[str | None, str]:
    """First heading outside a code fence, and the text; a text that starts with the heading loses it."""
    lines = markdown.splitlines()
    fenced = False
    for number, line in enumerate(lines):
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.match(line)
        if heading:
            leads = not any(earlier.strip() for earlier in lines[:number])
            return heading[1], "\n".join(lines[number + 1 :]) if leads else markdown
    return None, markdown
