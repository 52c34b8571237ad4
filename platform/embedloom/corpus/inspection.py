"""A look at somebody's own documents: which format, which columns, how many and how long, as the corpus stage reads them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from embedloom.config.base import validate
from embedloom.config.corpus import CorpusSource, SourceFormat
from embedloom.core.storage import (
    CSV_ENDINGS,
    JSONL_ENDINGS,
    PARQUET_ENDINGS,
    TEXT_ENDINGS,
    files_at,
    json_lines,
)
from embedloom.corpus.sources import csv_reading, open_csv, read_source
from embedloom.documents.reading import kind_of
from embedloom.errors import DataError

ENDINGS: Mapping[SourceFormat, tuple[str, ...]] = {
    "text": TEXT_ENDINGS, "jsonl": JSONL_ENDINGS, "parquet": PARQUET_ENDINGS, "csv": CSV_ENDINGS,
}  # fmt: skip
_ORDER: list[SourceFormat] = ["documents", *ENDINGS]
_BEIR_CORPUS = "corpus.jsonl"
SAMPLE_ROWS = 500
_COUNTED_BYTES = 64 * 2**20  # files that are larger altogether are not read through: their rows are estimated
# What people call the columns, the most telling names first; compared without case.
_QUERY_NAMES = ("query", "question", "anchor")
_TEXT_NAMES = (
    "text",
    "body",
    "content",
    "document",
    "passage",
    "context",
    "answer",
    "positive",
    "abstract",
    "description",
)
_ANSWER_NAMES = ("answer", "positive", "passage", "document", "text", "context", "content", "body")
_TITLE_NAMES = ("title", "heading", "headline", "subject")
_ID_NAMES = ("id", "_id", "doc_id", "docid", "document_id", "uuid")
_SOURCE_NAMES = ("url", "uri", "link")


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns that a person names; None: found by their names and contents."""

    text: str | None = None
    query: str | None = None
    title: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Inspected:
    """One source of a run config, and what a sample of it shows.

    Attributes:
        section: its keys under ``corpus.sources``.
        rows: how many documents or pairs.
        estimated: whether ``rows`` follows from the sizes of files alone.
        characters: lengths of the sample's texts, as they are left where a query is taken out of them.
        texts: of the sample.
        asked: how many of the sample's documents have a query.
    """

    section: Mapping[str, Any]
    rows: int
    estimated: bool
    characters: tuple[int, ...]
    texts: tuple[str, ...]
    asked: int

    @property
    def holds_pairs(self) -> bool:
        """Whether its rows are pairs, rather than documents that a query is taken out of."""
        return "query_from" not in self.section

    def within(self, share: float) -> int:
        """Characters that this share of the sample's texts stays within."""
        ordered = sorted(self.characters)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def inspect(path: str, columns: Columns) -> tuple[list[Inspected], dict[str, int]]:
    """Sources for all that lies at a path, one for each format, and the files that none of them reads, by ending.

    Raises:
        DataError: nothing there, no file of a known format, no column of texts, or what the corpus stage refuses.
    """
    files = files_at(path)
    if not files:
        raise DataError(f"{path}: does not exist or is empty; allowed: a folder, a file or a quoted glob")
    if (Path(path).expanduser() / _BEIR_CORPUS).is_file():
        return [_inspected({"format": "beir", "path": path}, len(_lines(path)), False)], {}
    found, unread = _by_format(files)
    if not found:
        allowed = ", ".join(
            ending for endings in ENDINGS.values() for ending in endings if ending.count(".") == 1
        )
        raise DataError(f"{path}: no file that can be read; found {dict(unread)}, allowed endings: {allowed}")
    return [
        _inspect_format(kind, path, own, columns)
        for kind, own in sorted(found.items(), key=lambda item: _ORDER.index(item[0]))
    ], dict(unread)


def _by_format(files: Sequence[Path]) -> tuple[dict[SourceFormat, list[Path]], Counter[str]]:
    """Files by the format that reads them, and the others by ending.

    Text and Markdown alone are ``text``; with files of other kinds beside them all are ``documents``. JSON beside
    documents says how a site is built (``package.json``, ``_category_.json``); JSON lines are data.
    """
    found: dict[SourceFormat, list[Path]] = {}
    unread: Counter[str] = Counter()
    for file in files:
        name = file.name.lower()
        kind = next((kind for kind, endings in ENDINGS.items() if name.endswith(endings)), None)
        if kind is None and kind_of(name) is not None:
            kind = "documents"
        if kind is None:
            unread[file.suffix.lower() or file.name] += 1
        else:
            found.setdefault(kind, []).append(file)
    if "documents" in found:
        found["documents"] = sorted([*found["documents"], *found.pop("text", [])])
    if {"documents", "text"} & found.keys() and "jsonl" in found:
        settings = [file for file in found["jsonl"] if file.suffix.lower() == ".json"]
        unread[".json"] += len(settings)
        found["jsonl"] = [file for file in found["jsonl"] if file not in settings]
    return {kind: own for kind, own in found.items() if own}, +unread


def _lines(path: str) -> list[Any]:
    return [number for number, _ in json_lines(Path(path).expanduser() / _BEIR_CORPUS)]


def _inspect_format(kind: SourceFormat, path: str, files: Sequence[Path], columns: Columns) -> Inspected:
    section: dict[str, Any] = {"format": kind, "path": path}
    if kind in ("text", "documents"):
        return _asking({**section, "query_from": "title"}, len(files), False)
    records = _records(kind, files[0])
    chosen = _choose_columns(records, columns, str(files[0]))
    if "query_column" not in chosen:
        chosen["query_from"] = "title" if "title_column" in chosen else "first_sentence"
    rows, estimated = _count(kind, files, records)
    return _asking({**section, **chosen}, rows, estimated)


def _asking(section: dict[str, Any], rows: int, estimated: bool) -> Inspected:
    """The source as it is, or by first sentences where most titles ask nothing."""
    found = _inspected(section, rows, estimated)
    if section.get("query_from") == "title" and 2 * found.asked < len(found.texts):
        return _inspected({**section, "query_from": "first_sentence"}, rows, estimated)
    return found


def _inspected(section: dict[str, Any], rows: int, estimated: bool) -> Inspected:
    """Read a sample through the corpus stage's own reader."""
    source = validate(CorpusSource, {**section, "limit": SAMPLE_ROWS}, "corpus.sources.0")
    sample = [row for row in read_source(source) if row.text.strip()]
    if not sample:
        raise DataError(
            f"{section['path']}: none of the first {SAMPLE_ROWS} rows holds a text; allowed: one or more"
        )
    return Inspected(
        section,
        rows,
        estimated,
        tuple(len(row.text) for row in sample),
        tuple(row.text for row in sample),
        sum(bool(row.queries) for row in sample),
    )


def _records(kind: SourceFormat, path: Path) -> Sequence[Mapping[str, Any]]:
    """The first rows of a file, all columns.

    Raises:
        DataError: not readable, or empty.
    """
    try:
        if kind == "jsonl":
            found = [record for _, record in islice(json_lines(path), SAMPLE_ROWS)]
        elif kind == "parquet":
            with pa.parquet.ParquetFile(path) as file:
                found = next(file.iter_batches(batch_size=SAMPLE_ROWS), pa.record_batch({})).to_pylist()
        else:
            with open_csv(path, *csv_reading(path)) as reader:
                found = reader.read_next_batch().slice(0, SAMPLE_ROWS).to_pylist()
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise DataError(f"{path}: not readable as {kind}: {' '.join(str(error).split())}") from error
    if not found:
        raise DataError(f"{path}: holds no row; allowed: one or more")
    return found


def _choose_columns(records: Sequence[Mapping[str, Any]], given: Columns, where: str) -> dict[str, str]:
    """Column keys of a source: those that a person names, else by the names that people use, else by the lengths.

    Raises:
        DataError: a column that is not there, or none that holds texts.
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    for key in ("text", "query", "title", "id"):
        name = getattr(given, key)
        if name is not None and name not in names:
            raise DataError(f"{where}: no column {name!r} (--{key}-column); columns found: {names}")
    lengths = {name: size for name in names if (size := _mean_length(records, name)) is not None}
    query = given.query or _named(_QUERY_NAMES, lengths)
    others = {name: size for name, size in lengths.items() if name != query}
    named = given.text or _named(_TEXT_NAMES if query is None else _ANSWER_NAMES, others)
    text = named or max(others, key=lambda name: others[name], default="")
    if not text:
        raise DataError(f"{where}: no column of texts; columns found: {names}; name one by --text-column")
    chosen = {"text_column": text}
    if query is not None:
        chosen["query_column"] = query
    free = {name: size for name, size in others.items() if name != text}
    if title := given.title or _named(_TITLE_NAMES, free):
        chosen["title_column"] = title
    if source := _named(_SOURCE_NAMES, free):
        chosen["source_column"] = source
    # Rows of pairs repeat their texts, so an id of the row is none of the document.
    if own := given.id or (_unique_id(records, names) if query is None else None):
        chosen["id_column"] = own
    return chosen


def _mean_length(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Characters of a column's texts; None if it holds anything else, or nothing."""
    values = [value for record in records if (value := record.get(name)) is not None]
    if not values or not all(isinstance(value, str) for value in values):
        return None
    return sum(map(len, values)) / len(values)


def _named(known: Iterable[str], names: Iterable[str]) -> str | None:
    by_name = {name.lower(): name for name in names}
    return next((by_name[name] for name in known if name in by_name), None)


def _unique_id(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    name = _named(_ID_NAMES, names)
    values = [record.get(name) for record in records] if name is not None else []
    fit = all(isinstance(value, str | int) and value != "" for value in values)
    return name if fit and len(set(values)) == len(values) else None


def _count(
    kind: SourceFormat, files: Sequence[Path], records: Sequence[Mapping[str, Any]]
) -> tuple[int, bool]:
    """Rows of all files, and whether they are estimated from the length of the first ones."""
    if kind == "parquet":
        return sum(pa.parquet.read_metadata(file).num_rows for file in files), False
    size = sum(file.stat().st_size for file in files)
    if size <= _COUNTED_BYTES:
        return sum(_rows(kind, file) for file in files), False
    each = sum(len(str(value).encode()) for record in records for value in record.values()) / len(records)
    return max(len(records), int(size / max(each, 1))), True


def _rows(kind: SourceFormat, file: Path) -> int:
    if kind == "jsonl":
        return sum(1 for _ in json_lines(file))
    with open_csv(file, *csv_reading(file)) as reader:
        return sum(int(batch.num_rows) for batch in reader)
