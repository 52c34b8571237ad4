"""Sources of documents: one reader per format, all giving the same rows, and the state of a source for fingerprints. Readers
stream, they never hold a whole file.
"""

import hashlib
import importlib.util
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from embedloom.config.corpus import CorpusSource
from embedloom.core.contents import Contents, digest, path_contents
from embedloom.core.progress import note
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS
from embedloom.core.storage import (
    CSV_ENDINGS,
    JSONL_ENDINGS,
    PARQUET_ENDINGS,
    TEXT_ENDINGS,
    beir_entries,
    compression_of,
    files_at,
    json_lines,
    judgements,
    located,
    parquet_records,
    parquet_source,
)
from embedloom.corpus.clean import Rejects, SourceRow
from embedloom.corpus.pseudo_queries import with_query
from embedloom.corpus.python_docs import read_python_docs
from embedloom.documents.listing import Listing, how_to_read, list_documents, list_files
from embedloom.documents.outline import packed
from embedloom.documents.reading import ENDINGS, Reading, read_path, read_text
from embedloom.errors import DataError, one_line

# The state of a corpus source, for fingerprints: a changed file or package makes the corpus stale.


def source_files(source: CorpusSource) -> list[Path]:
    """Files behind a path source, sorted: the file itself, a folder's files, or what a glob matches.

    Raises:
        DataError: nothing there.
    """
    files = files_at(source.path or "")
    if not files:
        raise DataError(
            f"corpus.sources: {source.path!r} ({source.format}) does not exist or is empty; "
            "give a file, a folder or a glob"
        )
    return files


def source_settings(source: CorpusSource) -> dict[str, Any]:
    """What of a source's section decides its documents: what files hold does, where they lie does not.

    But for text files without a name of their own: each is a group, by its path, and groups fall into splits.
    """
    settings = source.model_dump(mode="json")
    if source.format in ("huggingface", "python_docs") or (
        source.format in ("text", "documents") and source.name is None
    ):
        return settings
    return {**settings, "path": None}


def source_contents(source: CorpusSource) -> Contents | None:
    """What the files of a source hold, by path below its folder; None where it is not read from files.

    Raises:
        DataError: a path that does not exist.
    """
    if source.format in ("huggingface", "python_docs"):
        return None
    source_files(source)
    return path_contents(source.path or "")


def source_state(source: CorpusSource) -> dict[str, Any]:
    """What the files of a source hold, or the version of every package.

    Raises:
        DataError: a path that does not exist, or a package that is not installed.
    """
    if source.format == "huggingface":
        return {"dataset": source.path}
    if source.format == "python_docs":
        return {package: _package_state(package) for package in source.packages}
    return {"contents": digest(source_contents(source) or {})}


def _package_state(package: str) -> str:
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise DataError(
            f"corpus.sources: package {package!r} is not installed, so it has no documentation to read"
        )
    # Asking which distribution owns a package scans every installed one (seconds); the version, or the
    # package's first file where the two names differ (sklearn), tells releases apart as well.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        origin = Path(found.origin) if found.origin else None
        content = origin.read_bytes() if origin is not None and origin.is_file() else b""
        return f"python {platform.python_version()} {hashlib.sha256(content).hexdigest()[:12]}"


Bad = Callable[[str, DataError], None]  # told of a row that cannot be read, by its place in the file

# Columns to rows: what Parquet, JSONL, CSV and Hugging Face sources share.


def files_of(source: CorpusSource, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of a source in name order; of a folder only those with one of ``suffixes``, none hidden.

    Raises:
        DataError: no such file.
    """
    source_files(source)
    listing = _listing(source, suffixes)
    if not listing.files:
        seen = f"; found: {listing}" if listing.passed else ""
        raise DataError(
            f"corpus.sources: folder {source.path!r} holds no {source.format} file; "
            f"allowed endings: {', '.join(suffixes)}{seen}"
        )
    return list(listing.files)


def _listing(source: CorpusSource, suffixes: tuple[str, ...]) -> Listing:
    path = source.path or ""
    if source.format == "documents":
        return list_documents(path, source.read_as)
    return list_files(path, lambda name: name.lower().endswith(suffixes))


def note_passed_over(source: CorpusSource, suffixes: tuple[str, ...]) -> None:
    """Say which files of a source's folder are not read, by kind, and how they would be."""
    listing = _listing(source, suffixes)
    if listing.passed:
        note(
            "corpus",
            f"{source.path} ({source.format}): {len(listing.files):,} files are read, passed over: {listing}; "
            f"{how_to_read(listing.passed, source.format)}",
        )


def label_of(source: CorpusSource, path: Path) -> str:
    """What the ``source`` column of a file's rows starts with: the path, or the source's own name for it."""
    if source.name is None:
        return str(path)
    root = located(source.path or "")
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
        # A field inside a column is looked for by its rows.
        if column not in found and column.split(".")[0] not in found and key != "title_column":
            key = f"corpus.sources.{key}"
            raise DataError(f"{where}: no column {column!r} ({key}); columns found: {list(found)}")
    named = dict.fromkeys(used_columns(source).values())
    wanted = (column if column in found else column.split(".")[0] for column in named)
    return [column for column in dict.fromkeys(wanted) if column in found]


def field_of(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or with dots in its name of a field inside one; None where it is not there."""
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def rows_of(
    source: CorpusSource,
    records: Iterable[Mapping[str, Any]],
    where: str,
    label: str,
    first: int = 1,
    bad: Bad | None = None,
) -> Iterator[SourceRow]:
    """Turn records into rows.

    Args:
        source: names the columns.
        records: mappings that hold at least these columns.
        where: file or dataset, named in errors.
        label: start of the ``source`` column; the row number follows.
        first: number of the first row.
        bad: is told of a row that does not fit; None: it is raised.

    Raises:
        DataError: a text or title that is not text, or a missing id.
    """
    for number, record in enumerate(records, start=first):
        if any(str(field_of(record, column)) != value for column, value in source.where.items()):
            continue
        try:
            yield _row(source, record, f"{where}: row {number}", f"{label}:{number}")
        except DataError as error:
            if bad is None:
                raise
            bad(f"row {number}", error)


def _row(source: CorpusSource, record: Mapping[str, Any], place: str, name: str) -> SourceRow:
    title, query = source.title_column, source.query_column
    origin = ""
    if source.source_column:
        origin = _text(field_of(record, source.source_column), source.source_column, place)
    return SourceRow(
        text=_text(field_of(record, source.text_column), source.text_column, place),
        title=_text(field_of(record, title), title, place) if title else None,
        id=_id(field_of(record, source.id_column), source.id_column, place) if source.id_column else "",
        lang=source.lang,
        source=origin or name,
        queries=(_text(field_of(record, query), query, place),) if query else (),
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
    if isinstance(value, bytes):  # how Spark and Impala store texts, where they are not told to say so
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: column {column!r} holds bytes that are not UTF-8; allowed: text or null"
            ) from error
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n\n".join(value)  # paragraphs, or sentences
    if not isinstance(value, str):
        seen = f"{type(value).__name__} {str(value)[:40]!r}"
        raise DataError(f"{place}: column {column!r} holds {seen}; allowed: text or null")
    return value


def _id(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str | int) or value == "":
        seen = repr(value)[:40]
        raise DataError(f"{place}: column {column!r} holds {seen}; allowed: a text or whole number as id")
    return str(value)


# Reader of BEIR folders: ``corpus.jsonl``, and the judged train queries as natural pairs.
#
# Dev and test judgements are left alone: they are the benchmark's own measure.


_CORPUS, _QUERIES, _JUDGEMENTS = "corpus.jsonl", "queries.jsonl", "qrels/train.tsv"


def read_beir(source: CorpusSource, rejects: Rejects | None = None) -> Iterator[SourceRow]:
    """Rows with the benchmark's own ids; a row carries every train query that it was judged relevant to.

    Args:
        source: its section.
        rejects: takes note of judgements whose query or document is not there; of documents only where all are read.

    Raises:
        DataError: no ``corpus.jsonl``, or a line of one of the files that does not fit.
    """
    root = located(source.path or "")
    corpus = root / _CORPUS
    if not corpus.is_file():
        found = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else "no such folder"
        raise DataError(f"corpus.sources: {source.path!r} (beir) has no {_CORPUS}; found: {found}")
    rejects = Rejects() if rejects is None else rejects
    judged = _relevant(root, rejects)
    missing = dict.fromkeys(judged)
    columns = source.model_copy(update={"text_column": "text", "title_column": "title", "id_column": "_id"})
    records = ({"_id": key, "title": title, "text": text} for key, title, text in beir_entries(corpus))
    for row in rows_of(columns, records, str(corpus), source.name or str(corpus)):
        own = judged.get(row.id, [])
        missing.pop(row.id, None)
        yield replace(
            row,
            queries=tuple(text for text, _ in own),
            grades=tuple(grade for _, grade in own),
            instruction=DEFAULT_INSTRUCTIONS["retrieval"],
        )
    for document_id in missing:
        asked = len(judged[document_id])
        rejects.add(
            document_id, "judged_document_missing", f"not in {_CORPUS}; answers {asked} train queries"
        )


def _relevant(root: Path, rejects: Rejects) -> dict[str, list[tuple[str, float]]]:
    """Document id → text of every train query it is judged relevant to (above 0), and the grade."""
    if not (root / _QUERIES).is_file() or not (root / _JUDGEMENTS).is_file():
        return {}
    judged: dict[str, dict[str, float]] = {}
    for query_id, document_id, score in judgements(root / _JUDGEMENTS):
        if score > 0:
            judged.setdefault(query_id, {})[document_id] = score
    found: dict[str, list[tuple[str, float]]] = {}
    known: set[str] = set()
    for query_id, _, text in beir_entries(root / _QUERIES):
        known.add(query_id)
        for document_id, grade in judged.get(query_id, {}).items():
            found.setdefault(document_id, []).append((text, grade))
    for query_id in judged:
        if query_id not in known:
            rejects.add(query_id, "judged_query_missing", f"{_JUDGEMENTS}: not in {_QUERIES}")
    return found


# Reader of Hugging Face datasets by name, where the network or the local cache has them.


_BATCH_ROWS = 1024


def read_hub_dataset(source: CorpusSource) -> Iterator[SourceRow]:
    """Rows of one split of a dataset; ``path`` is ``name``, ``name:config`` or ``name:config:split``.

    A folder that ``save_to_disk`` wrote is read as well. With a limit the rows are streamed, so that no more than its part
    of a dataset is fetched.

    Raises:
        DataError: no such dataset, config, split or column, or no network to fetch it over.
    """
    name, _, rest = (source.path or "").partition(":")
    config, _, split = rest.partition(":")
    dataset = _load(name, config or None, split or None, source.limit is not None)
    names = dataset.column_names
    if names is None:  # a stream that states none: those of its first row
        names = list(next(iter(dataset), {}))
    columns = check_columns(source, names, f"dataset {source.path!r}")
    if source.title_column is not None:
        _check_hub_title(source, names)
    chosen = dataset.select_columns(columns)
    records = chosen if source.limit is not None and not hasattr(chosen, "__len__") else _hub_records(chosen)
    yield from rows_of(source, records, f"dataset {source.path!r}", source.name or name)


def _check_hub_title(source: CorpusSource, names: Sequence[str]) -> None:
    title = source.title_column or ""
    if title.split(".")[0] not in names and title not in names:
        raise DataError(
            f"dataset {source.path!r}: no column {title!r} (corpus.sources.title_column); columns found: {list(names)}"
        )


def _load(name: str, config: str | None, split: str | None, streaming: bool) -> Any:
    import datasets  # a second of import time, so only where it is asked for

    try:
        if (Path(name).expanduser() / "state.json").is_file():  # one Dataset, as save_to_disk wrote it
            return datasets.load_from_disk(str(Path(name).expanduser()))
        if (Path(name).expanduser() / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(Path(name).expanduser()))
        else:
            found = datasets.load_dataset(name, config, streaming=streaming)
    # The library raises a dozen types here (hub, HTTP, builder, file); all mean the same to the user.
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error, 300)}"
        raise DataError(
            f"corpus.sources: dataset {name!r} (huggingface, config {config or 'default'}) could not be "
            f"loaded: {reason}; without a network give local files: parquet, jsonl, csv, text or beir"
        ) from error
    splits = list(found)
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted not in splits:
        raise DataError(
            f"corpus.sources: dataset {name!r} (huggingface) has no split {wanted!r}; allowed: {splits}, "
            "given as path: name:config:split"
        )
    return found[wanted]


def _hub_records(dataset: Any) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(dataset), _BATCH_ROWS):
        batch = dataset[start : start + _BATCH_ROWS]
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


# Reader of plain text, Markdown and reStructuredText: one file is one document and one group.


def read_text_file(source: CorpusSource, path: Path, label: str, _: Bad | None = None) -> Iterator[SourceRow]:
    """One row; the title is the first Markdown heading, else the file's name without its ending.

    Raises:
        DataError: not UTF-8.
    """
    title, text = read_text(path, source.encoding, source.titles)
    yield SourceRow(text=text, title=title, lang=source.lang, source=label, group=label)


# Reader of documents as they are; see ``embedloom.documents``.


def read_document_file(
    source: CorpusSource, path: Path, label: str, _: Bad | None = None
) -> Iterator[SourceRow]:
    """A row a document, which is one group with the others of its file.

    Raises:
        DataError: not readable as what its name says.
    """
    for document in read_path(path, Reading(source.titles, source.encoding, source.read_as)):
        yield SourceRow(
            text=document.text,
            title=document.title,
            lang=source.lang,
            source=f"{label}#{document.part}" if document.part else label,
            group=label,
            outline=packed(document.outline),
        )


# Readers of Parquet, JSON lines and CSV: one file, a glob, or every fitting file below a folder.


_CSV_BLOCK_BYTES = 16 * 2**20  # no row may be longer than a block


def read_parquet(source: CorpusSource, path: Path, label: str, bad: Bad | None = None) -> Iterator[SourceRow]:
    """Rows of a Parquet file, a batch at a time.

    Raises:
        DataError: not Parquet, or a column that is not there.
    """
    return read_parquet_rows(source, path, label, 0, None, bad)


def read_parquet_rows(
    source: CorpusSource, path: Path, label: str, start: int, stop: int | None, bad: Bad | None = None
) -> Iterator[SourceRow]:
    """Rows ``start`` to ``stop`` (None: the last) of a Parquet file.

    Raises:
        DataError: not Parquet, or a column that is not there.
    """
    hive = hive_columns(source, path)

    def columns(found: list[str]) -> list[str]:
        names = check_columns(source, [*found, *hive], str(path))
        # A file with none of the columns that are read still has its rows.
        return [name for name in names if name in found] or found[:1]

    records = parquet_records(path, columns, start, stop)
    return rows_of(source, ({**hive, **record} for _, record in records), str(path), label, start + 1, bad)


def hive_columns(source: CorpusSource, path: Path) -> dict[str, str]:
    """Columns that stand in the names of folders below the source's: ``lang=de/part-0.parquet``."""
    root = located(source.path or "").absolute()
    parts = path.absolute().parent.parts[len(root.parts) - (not root.is_dir()) :] if root.is_dir() else ()
    pairs = (part.partition("=") for part in parts)
    return {name: unquote(value) for name, separator, value in pairs if separator and name}


def read_jsonl(source: CorpusSource, path: Path, label: str, bad: Bad | None = None) -> Iterator[SourceRow]:
    """Rows of a JSON-lines file, plain or compressed; empty lines are passed over.

    A title that is absent from a line is no title; one absent from a whole file is an error.

    Raises:
        DataError: a line that is not a JSON object, or lacks a column.
    """
    return rows_of(source, _json_records(path, source, bad), str(path), label, bad=bad)


def read_csv(source: CorpusSource, path: Path, label: str, bad: Bad | None = None) -> Iterator[SourceRow]:
    """Rows of a CSV file with a header line (``.tsv``: separated by tabs); quoted cells may span lines.

    Raises:
        DataError: not CSV in UTF-8, or a column that is not there.
    """
    return rows_of(source, _csv_records(path, source, bad), str(path), label, bad=bad)


def _json_records(path: Path, source: CorpusSource, bad: Bad | None) -> Iterator[Mapping[str, Any]]:
    for number, record in json_lines(path, bad):
        missing = [
            (key, column)
            for key, column in used_columns(source).items()
            if column not in record and column.split(".")[0] not in record and key != "title_column"
        ]
        if not missing:
            yield record
            continue
        key, column = missing[0]
        error = DataError(
            f"{path}: line {number} has no key {column!r} (corpus.sources.{key}); keys found: {list(record)}"
        )
        if bad is None:
            raise error
        bad(f"line {number}", error)


def csv_reading(
    path: Path, source: CorpusSource | None = None, bad: Bad | None = None
) -> tuple[pa.csv.ReadOptions, pa.csv.ParseOptions]:
    """How a CSV file is read, by its name and its source's section; ``bad`` is told of rows of other lengths."""
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    names: list[str] | None = None
    encoding = "utf-8"
    if source is not None:
        delimiter, encoding = source.delimiter or delimiter, source.encoding
        names = list(source.column_names) or None

    def skipped(row: Any) -> str:
        if bad is not None:
            message = f"{path}: a row has {row.actual_columns} cells, expected {row.expected_columns}: {row.text[:60]!r}"
            bad("a row", DataError(message))
        return "skip"

    # Rows have numbers only where one thread reads them in order.
    handler = {} if bad is None else {"invalid_row_handler": skipped}
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, **handler)
    read = pa.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, column_names=names, encoding=encoding)
    return read, parse


def open_csv(path: Path, *options: Any) -> Any:
    """A reader of batches of a CSV file, compressed or not."""
    stream = fsspec.open(str(path), "rb", compression=compression_of(path.name)).open()
    return pa.csv.open_csv(stream, *options)


def _silent(place: str, error: DataError) -> None:
    """Passes a bad row over."""


def _csv_records(path: Path, source: CorpusSource, bad: Bad | None) -> Iterator[Mapping[str, Any]]:
    read, parse = csv_reading(path, source, bad)
    try:
        # The first look must not tell of bad rows, or those of the first block would count twice.
        with open_csv(path, *csv_reading(path, source, None if bad is None else _silent)) as reader:
            columns = check_columns(source, reader.schema.names, str(path))
        # Every cell as text: "007" stays an id, and "NA" a word.
        convert = pa.csv.ConvertOptions(
            include_columns=columns,
            column_types={column: pa.string() for column in columns},
            strings_can_be_null=False,
        )
        with open_csv(path, read, parse, convert) as reader:
            for batch in reader:
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path}: not readable as CSV: {one_line(error)}") from error


# Sources: one reader a format, all giving the same rows; a reader streams, it never holds a whole file. The corpus stage
# takes a source in pieces, each read by a task of its own: ``pieces_of`` lists them, ``read_piece`` gives their rows.
#
# Pairs alone are gathered: a text that answers many queries must be one document, or the others would be its negatives.


_WHOLE_FILES = 2**62  # bytes: no file is read in several pieces
_BYTES_OF_A_FILE = 4096  # what opening one costs, so that a piece does not hold a million of them

# A file, what its rows are called, and who is told of rows that cannot be read.
FileReader = Callable[[CorpusSource, Path, str, Bad | None], Iterator[SourceRow]]
SourceReader = Callable[[CorpusSource, Rejects], Iterator[SourceRow]]

# What is read file by file, so that many can be read at once: the endings of its files, and the reader of one.
FILE_READERS: dict[str, tuple[tuple[str, ...], FileReader]] = {
    "parquet": (PARQUET_ENDINGS, read_parquet),
    "jsonl": (JSONL_ENDINGS, read_jsonl),
    "csv": (CSV_ENDINGS, read_csv),
    "text": (TEXT_ENDINGS, read_text_file),
    "documents": (tuple(ENDINGS), read_document_file),
}
# What is read as one.
WHOLE_READERS: dict[str, SourceReader] = {
    "python_docs": lambda source, _: read_python_docs(source),
    "beir": read_beir,
    "huggingface": lambda source, _: read_hub_dataset(source),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """What one task reads of a source; all pieces in order are the source. Picklable.

    Attributes:
        source: its section.
        files: (path, what its rows are called); none: the source is read as one.
        start: of a single Parquet file the first row.
        stop: and the row behind the last; None: all that are there.
        limit: most rows, where the source has a limit that only reading tells the end of.
    """

    source: CorpusSource
    files: tuple[tuple[Path, str], ...] = ()
    start: int = 0
    stop: int | None = None
    limit: int | None = None


def pieces_of(source: CorpusSource, most_bytes: int) -> list[Piece]:
    """What tasks read of a source: whole files together of up to ``most_bytes``, or row groups of a larger Parquet file.

    Raises:
        DataError: no file, or one that is not Parquet.
    """
    if source.format not in FILE_READERS:
        return [Piece(source, limit=source.limit)]
    endings, _ = FILE_READERS[source.format]
    named = [(path.absolute(), label_of(source, path)) for path in files_of(source, endings)]
    note_passed_over(source, endings)
    check_title_column(source, [path for path, _ in named])
    if source.limit is not None:  # how many rows pass is known only where they are read in order
        return [Piece(source, tuple(named), limit=source.limit)]
    if source.format == "parquet":
        return [piece for path, label in named for piece in _parquet_pieces(source, path, label, most_bytes)]
    found: list[list[tuple[Path, str]]] = []
    room = 0
    for path, label in named:
        size = path.stat().st_size
        if size > room or not found:
            found.append([])
            room = most_bytes
        found[-1].append((path, label))
        room -= size + _BYTES_OF_A_FILE
    return [Piece(source, tuple(files)) for files in found]


def _parquet_pieces(source: CorpusSource, path: Path, label: str, most_bytes: int) -> list[Piece]:
    """Ranges of whole row groups: from the middle of one, all rows before it would be decoded once more."""
    try:
        metadata = pq.read_metadata(parquet_source(path))
        check_columns(
            source, [*metadata.schema.to_arrow_schema().names, *hive_columns(source, path)], str(path)
        )
    except (pa.ArrowException, OSError, DataError) as error:
        if source.max_unreadable is not None:
            return [Piece(source, ((path, label),))]  # a reject of whoever reads it
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not readable as Parquet: {one_line(error)}") from error
    bounds = [0]
    end, room = 0, most_bytes
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        if end > bounds[-1] and group.total_byte_size > room:
            bounds.append(end)
            room = most_bytes
        end += group.num_rows
        room -= group.total_byte_size
    return [Piece(source, ((path, label),), start, stop) for start, stop in pairwise([*bounds, end])]


def read_piece(piece: Piece, rejects: Rejects) -> Iterator[SourceRow]:
    """Rows of a piece as they are; none is no error.

    Raises:
        DataError: not readable, or a column that is not there.
    """
    source = piece.source
    rows: Iterable[SourceRow]
    if source.format not in FILE_READERS:
        rows = WHOLE_READERS[source.format](source, rejects)
    else:
        rows = (row for path, label in piece.files for row in _readable(piece, path, label, rejects))
    return islice(rows, piece.limit)


UNREADABLE = "unreadable"  # a reject: a file, or a row of one


def _readable(piece: Piece, path: Path, label: str, rejects: Rejects) -> Iterator[SourceRow]:
    """Rows of a file as far as it can be read; if its source allows any, what cannot is a reject."""
    source = piece.source

    def bad(place: str, error: DataError) -> None:
        rejects.add(f"{label}:{place.removeprefix('row ')}", UNREADABLE, str(error))

    noted = None if source.max_unreadable is None else bad
    try:
        if piece.stop is not None:
            yield from read_parquet_rows(source, path, label, piece.start, piece.stop, noted)
        else:
            yield from FILE_READERS[source.format][1](source, path, label, noted)
    except DataError as error:
        if source.max_unreadable is None:
            raise
        rejects.add(label, UNREADABLE, str(error))


def check_unreadable(source: CorpusSource, unreadable: int, read: int) -> None:
    """Refuse a source of which more could not be read than it allows.

    Args:
        source: its section.
        unreadable: its rejects of this reason.
        read: rows that could be read.

    Raises:
        DataError: the share is above ``max_unreadable``.
    """
    allowed = source.max_unreadable or 0.0
    if unreadable > allowed * (read + unreadable):
        share = unreadable / (read + unreadable)
        raise DataError(
            f"corpus.sources: {source.path} ({source.format}): {unreadable:,} of {read + unreadable:,} files or rows are "
            f"unreadable ({share:.1%}); allowed by max_unreadable: {allowed:.1%}; the rejects name them"
        )


def check_title_column(source: CorpusSource, files: Sequence[Path]) -> None:
    """Refuse a title column that no file has; a file without it gives documents without titles.

    Looks at files until one has it, usually the first, and of JSON lines and CSV at their first rows.

    Raises:
        DataError: none has it.
    """
    title = source.title_column
    if title is None or source.format not in _TITLED:
        return
    found: list[str] = []
    for path in files:
        try:
            names = [*_TITLED[source.format](source, path), *hive_columns(source, path)]
        except (DataError, pa.ArrowException, OSError):
            if source.max_unreadable is None:
                raise
            continue
        if title in names or title.split(".")[0] in names:
            return
        found = found or names
    raise DataError(
        f"{files[0]}: no column {title!r} (corpus.sources.title_column) in any file; columns found: {found}"
    )


def _parquet_names(_: CorpusSource, path: Path) -> list[str]:
    try:
        return list(pq.read_schema(parquet_source(path)).names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {one_line(error)}") from error


def _csv_names(source: CorpusSource, path: Path) -> list[str]:
    try:
        with open_csv(path, *csv_reading(path, source, _silent)) as reader:
            return list(reader.schema.names)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path}: not readable as CSV: {one_line(error)}") from error


def _json_names(source: CorpusSource, path: Path) -> list[str]:
    """Keys of the lines up to the one that has the title."""
    names: dict[str, None] = {}
    for _, record in json_lines(path, _silent):
        names.update(dict.fromkeys(record))
        if source.title_column in record:
            break
    return list(names)


_TITLED: dict[str, Callable[[CorpusSource, Path], list[str]]] = {
    "parquet": _parquet_names, "csv": _csv_names, "jsonl": _json_names,
}  # fmt: skip


def finished_row(source: CorpusSource, row: SourceRow) -> SourceRow:
    """A row with what its source's section says of all: a query taken out of it, the name of its pairs."""
    if source.query_from is not None:
        row = with_query(row, source.query_from, source.instruction)
    return replace(row, dataset=source.dataset or "")


def no_document(source: CorpusSource) -> DataError:
    """What to raise where a source has no row."""
    place = source.path or f"packages {list(source.packages)}"
    return DataError(
        f"corpus.sources: {place} ({source.format}) holds no document; give a source with at least one"
    )


def read_source(source: CorpusSource, rejects: Rejects | None = None) -> Iterator[SourceRow]:
    """Stream the rows of a source, at most ``source.limit`` of them, always in the same order.

    Args:
        source: its section.
        rejects: takes note of what a reader itself leaves out.

    Raises:
        DataError: nothing there, not readable, a column that is not there, or no row at all.
    """
    rejects = Rejects() if rejects is None else rejects
    pieces = pieces_of(source, _WHOLE_FILES)
    before = rejects.counts.get(UNREADABLE, 0)
    read = 0

    def counted() -> Iterator[SourceRow]:
        nonlocal read
        for piece in pieces:
            for row in read_piece(piece, rejects):
                read += 1
                yield row

    for row in one_document_a_text(counted()) if source.query_column is not None else counted():
        yield finished_row(source, row)
    check_unreadable(source, rejects.counts.get(UNREADABLE, 0) - before, read)
    if not read:
        raise no_document(source)
