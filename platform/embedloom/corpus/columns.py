"""Columns to rows: what Parquet, JSONL, CSV and Hugging Face sources share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedloom.config.data import CorpusSource
from embedloom.corpus.rows import SourceRow
from embedloom.corpus.state import source_files
from embedloom.errors import DataError
from embedloom.instructions import DEFAULT_INSTRUCTIONS


def files_of(source: CorpusSource, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of a source in name order; of a folder only those with one of ``suffixes``, none hidden.

    Raises:
        DataError: no such file.
    """
    files = source_files(source)
    root = Path(source.path or "").expanduser()
    if not root.is_dir():
        return files
    fitting = [path for path in files if path.name.lower().endswith(suffixes)]
    fitting = [path for path in fitting if not any(p.startswith(".") for p in path.relative_to(root).parts)]
    if not fitting:
        raise DataError(
            f"corpus.sources: folder {source.path!r} holds no {source.format} file; "
            f"allowed endings: {', '.join(suffixes)}"
        )
    return fitting


def label_of(source: CorpusSource, path: Path) -> str:
    """What the ``source`` column of a file's rows starts with: the path, or the source's own name for it."""
    if source.name is None:
        return str(path)
    root = Path(source.path or "").expanduser()
    if root == path:
        return source.name
    return f"{source.name}/{path.relative_to(root).as_posix() if root.is_dir() else path.name}"


def used_columns(source: CorpusSource) -> dict[str, str]:
    """The config's column keys that are set → the columns they name."""
    named = {
        "text_column": source.text_column,
        "title_column": source.title_column,
        "id_column": source.id_column,
        "query_column": source.query_column,
        "source_column": source.source_column,
        **{f"where.{column}": column for column in source.where},
    }
    return {key: column for key, column in named.items() if column is not None}


def check_columns(source: CorpusSource, found: Sequence[str], where: str) -> list[str]:
    """Names of the columns to read.

    Raises:
        DataError: one of them is not among ``found``.
    """
    for key, column in used_columns(source).items():
        if column not in found:
            key = f"corpus.sources.{key}"
            raise DataError(f"{where}: no column {column!r} ({key}); columns found: {list(found)}")
    return list(dict.fromkeys(used_columns(source).values()))


def rows_of(
    source: CorpusSource, records: Iterable[Mapping[str, Any]], where: str, label: str
) -> Iterator[SourceRow]:
    """Turn records into rows.

    Args:
        source: names the columns.
        records: mappings that hold at least these columns.
        where: file or dataset, named in errors.
        label: start of the ``source`` column; the row number, from 1, follows.

    Raises:
        DataError: a text or title that is not text, or a missing id.
    """
    for number, record in enumerate(records, start=1):
        if any(str(record[column]) != value for column, value in source.where.items()):
            continue
        place = f"{where}: row {number}"
        title, query = source.title_column, source.query_column
        origin = (
            _text(record[source.source_column], source.source_column, place) if source.source_column else ""
        )
        yield SourceRow(
            text=_text(record[source.text_column], source.text_column, place),
            title=_text(record[title], title, place) if title else None,
            id=_id(record[source.id_column], source.id_column, place) if source.id_column else "",
            lang=source.lang,
            source=origin or f"{label}:{number}",
            queries=(_text(record[query], query, place),) if query else (),
            instruction=(source.instruction or DEFAULT_INSTRUCTIONS["retrieval"]) if query else "",
        )


def one_document_a_text(rows: Iterable[SourceRow]) -> list[SourceRow]:
    """Rows of pairs with each text once, where it first stood, and all its queries; holds them in memory."""
    found: dict[tuple[str | None, str], SourceRow] = {}
    queries: dict[tuple[str | None, str], dict[str, None]] = {}
    for row in rows:
        key = (row.title, row.text)
        found.setdefault(key, row)
        queries.setdefault(key, {}).update(dict.fromkeys(row.queries))
    return [replace(row, queries=tuple(queries[key])) for key, row in found.items()]


def _text(value: Any, column: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        seen = f"{type(value).__name__} {str(value)[:40]!r}"
        raise DataError(f"{place}: column {column!r} holds {seen}; allowed: text or null")
    return value


def _id(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str | int) or value == "":
        seen = repr(value)[:40]
        raise DataError(f"{place}: column {column!r} holds {seen}; allowed: a text or whole number as id")
    return str(value)
