"""Files of a run: where they lie, local or in an object store, each written whole or not at all, and the text formats
they are read in.
"""

import csv
import glob
import json
import math
import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedloom.core.schemas import check_table
from embedloom.errors import DataError, MissingDependency, one_line

# Files by name below a folder, local or in an object store, each written whole or not at all.
#
# Paths go through fsspec: a local folder, ``s3://`` or ``gs://`` behave alike. A local file is written under a
# temporary name and renamed; an object store has no rename, but an upload is one request, or parts that only a last
# request makes an object of, so files there are written directly.


_CHUNK_BYTES = 2**20


def absolute(path: str) -> str:
    """A local path as readers in other folders find it; an object store's address as it is."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def apply_umask(folder: Path) -> None:
    """Give a folder and all below it the permissions of newly made ones.

    safetensors writes through a temporary file that only its owner may read, ``mkdtemp`` makes such folders, and a
    rename or copy keeps what they have. The modes are those of a file and a folder made here: asking for the umask
    itself means setting it, for every thread of the process.
    """
    file, inner = folder / f"_tmp-{os.getpid()}-file", folder / f"_tmp-{os.getpid()}-folder"
    file.touch()
    inner.mkdir()
    modes = {False: file.stat().st_mode, True: inner.stat().st_mode}
    file.unlink()
    inner.rmdir()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(modes[path.is_dir()]))


# Of the files that are written here: shards of some hundred rows read what they need, and a group is still worth its
# page headers (a file of 10,000 rows of text is 0.3 % larger than with one group).
_GROUP_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """A folder on any filesystem fsspec knows; picklable, so Ray workers can be handed one."""

    uri: str

    @property
    def is_local(self) -> bool:
        """Whether files here have ordinary paths."""
        return "://" not in self.uri or self.uri.startswith("file://")

    @property
    def local(self) -> Path:
        """The ordinary path; only for a local place."""
        if not self.is_local:
            raise DataError(f"{self.uri}: a local folder is needed here")
        return Path(self.uri.removeprefix("file://")).absolute()

    def _resolve(self, name: str = "") -> tuple[fsspec.AbstractFileSystem, str]:
        if self.is_local:
            filesystem, root = fsspec.core.url_to_fs(str(self.local))
        else:
            # Another process's files must be seen: a listing that was kept would hide parts that actors wrote since.
            filesystem, root = fsspec.core.url_to_fs(self.uri, use_listings_cache=False)
        return filesystem, posixpath.join(root, name) if name else root

    def filesystem(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """fsspec's file system and the path in it, for libraries that take them."""
        return self._resolve()

    def absolute(self) -> "Place":
        """The same folder for processes with another working directory."""
        return Place(str(self.local)) if self.is_local else self

    def child(self, name: str) -> "Place":
        """A folder below this one."""
        return Place(f"{self.uri.rstrip('/')}/{name}")

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder is there."""
        filesystem, path = self._resolve(name)
        return bool(filesystem.exists(path))

    def names(self, folder: str = "", suffix: str = "") -> list[str]:
        """Sorted names of the files of a folder, relative to this place."""
        filesystem, path = self._resolve(folder)
        if not filesystem.exists(path):
            return []
        found = [posixpath.basename(str(entry)) for entry in filesystem.ls(path, detail=False)]
        return sorted(
            posixpath.join(folder, name)
            for name in found
            if name.endswith(suffix) and not name.startswith(("_tmp", "."))
        )

    def files(self) -> list[str]:
        """Sorted names of all files below this place, relative to it; hidden and half-written ones left out."""
        filesystem, root = self._resolve()
        found = [str(path) for path in filesystem.find(root)] if filesystem.exists(root) else []
        names = [posixpath.relpath(path, filesystem._strip_protocol(root)) for path in found]
        return sorted(filter(_is_shown, names))

    def state(self, name: str) -> list[Any]:
        """What a change of one file changes, without reading it: its size and its time of change or its tag."""
        filesystem, path = self._resolve(name)
        return _state_of(filesystem.info(path))

    def states(self) -> dict[str, list[Any]]:
        """``state`` of all ``files``, by name; one listing."""
        filesystem, root = self._resolve()
        found = filesystem.find(root, detail=True) if filesystem.exists(root) else {}
        base = filesystem._strip_protocol(root)
        named = {posixpath.relpath(str(path), base): info for path, info in found.items()}
        return {name: _state_of(named[name]) for name in sorted(named) if name == "." or _is_shown(name)}

    def read_bytes(self, name: str) -> bytes:
        """Content of one file."""
        filesystem, path = self._resolve(name)
        with filesystem.open(path, "rb") as stream:
            return bytes(stream.read())

    @contextmanager
    def open_input(self, name: str) -> Iterator[Any]:
        """An open file that pyarrow reads from, mapped into memory where it is local.

        Raises:
            DataError: not there, or cut.
        """
        try:
            if self.is_local:
                with pa.memory_map(str(self.local / name)) as mapped:
                    yield mapped
                return
            filesystem, path = self._resolve(name)
            with filesystem.open(path, "rb") as stream:
                yield stream
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.uri}/{name}: not readable: {one_line(error)}") from error

    @contextmanager
    def open_parts(self, name: str) -> Iterator[IO[bytes]]:
        """An open file of which little is read, here and there: in an object store no more is fetched than that."""
        filesystem, path = self._resolve(name)
        options = {} if self.is_local else {"block_size": 2**16, "cache_type": "bytes"}
        with filesystem.open(path, "rb", **options) as stream:
            yield stream

    def write_bytes(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write one file so that it is there whole or not at all."""
        filesystem, path = self._resolve(name)
        folder, base = posixpath.split(path)
        if not self.is_local:
            # Not through an open file: leaving its block on an error would complete the upload with what it has.
            # No folder either: object stores have none, and making one would make a misspelt bucket.
            filesystem.pipe_file(path, bytes(content))
            return
        filesystem.makedirs(folder, exist_ok=True)
        temporary = Path(folder) / f"_tmp-{os.getpid()}-{base}"
        with temporary.open("wb") as local_stream:
            local_stream.write(content)
            local_stream.flush()
            os.fsync(local_stream.fileno())
        temporary.replace(path)

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> int:
        """Write one file piece by piece, so that it is there whole or not at all; returns its bytes.

        Only this user may read a local one.
        """
        filesystem, path = self._resolve(name)
        folder = posixpath.dirname(path)
        if self.is_local:
            filesystem.makedirs(folder, exist_ok=True)
        # An object store's file is made here first: an upload that an error ended half way would count as whole.
        handle, temporary = tempfile.mkstemp(prefix="_tmp-", dir=folder if self.is_local else None)
        try:
            with os.fdopen(handle, "wb") as stream:
                size = sum(stream.write(chunk) for chunk in chunks)
                stream.flush()
                os.fsync(stream.fileno())
            if self.is_local:
                Path(temporary).replace(path)
            else:
                filesystem.put_file(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return size

    def chunks(self, name: str, size: int = _CHUNK_BYTES) -> Iterator[bytes]:
        """Content of one file, ``size`` bytes at a time."""
        filesystem, path = self._resolve(name)
        with filesystem.open(path, "rb") as stream:
            while chunk := stream.read(size):
                yield bytes(chunk)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of one file."""
        filesystem, path = self._resolve(name)
        return bytes(filesystem.cat_file(path, start=start, end=stop))

    def put_file(self, source: Path, name: str) -> None:
        """Move a finished local file here: renamed if it lies in this place already, else uploaded whole."""
        if self.is_local:
            source.replace(self.local / name)
            return
        filesystem, path = self._resolve(name)
        filesystem.put_file(str(source), path)
        source.unlink()

    def get_file(self, name: str, target: Path) -> None:
        """Copy one file to a local path, without holding it in memory."""
        filesystem, path = self._resolve(name)
        filesystem.get_file(path, str(target))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write indented JSON atomically."""
        self.write_bytes(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object.

        Raises:
            DataError: not JSON, or not an object.
        """
        try:
            content = json.loads(self.read_bytes(name))
        except (UnicodeDecodeError, ValueError) as error:
            raise DataError(
                f"{self.uri}/{name}: not valid JSON ({error}); delete the folder to build it again"
            ) from error
        if not isinstance(content, dict):
            raise DataError(f"{self.uri}/{name}: expected a JSON object, found {type(content).__name__}")
        return content

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one Parquet file atomically (zstd)."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=_GROUP_ROWS)
        self.write_bytes(name, bytes(sink.getvalue()))

    def write_tables(self, name: str, tables: Iterator[pa.Table], group_rows: int) -> None:
        """Write one Parquet file atomically out of tables of one schema, one in memory at a time; each is a row group, or more.

        Raises:
            DataError: no table.
        """
        first = next(tables, None)
        if first is None:
            raise DataError(f"{self.uri}/{name}: no rows to write")
        folder = (self.local / name).parent if self.is_local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"_tmp-{os.getpid()}-{posixpath.basename(name)}"
        try:
            with pq.ParquetWriter(temporary, first.schema, compression="zstd") as writer:
                for table in chain([first], tables):
                    writer.write_table(table, row_group_size=group_rows)
            self.put_file(temporary, name)
        finally:
            temporary.unlink(missing_ok=True)

    def read_table(
        self, name: str, columns: list[str] | None = None, where: pc.Expression | None = None
    ) -> pa.Table:
        """Read one Parquet file; with ``where`` only such rows, out of the row groups that may have some.

        Raises:
            DataError: missing or not readable as Parquet.
        """
        with self._parquet(name) as stream:
            return pq.read_table(stream, columns=columns, filters=where)

    @contextmanager
    def _parquet(self, name: str) -> Iterator[IO[bytes]]:
        """An open Parquet file; what goes wrong with it becomes a DataError naming it."""
        filesystem, path = self._resolve(name)
        try:
            with filesystem.open(path, "rb") as stream:
                yield stream
        except FileNotFoundError as error:
            raise DataError(f"{self.uri}/{name}: no such file") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.uri}/{name}: not readable as Parquet: {one_line(error)}") from error

    def parquet_footer(self, name: str) -> tuple[pa.Schema, int]:
        """Schema and row count of one Parquet file, without reading its rows.

        Raises:
            DataError: missing or not readable as Parquet.
        """
        with self._parquet(name) as stream:
            file = pq.ParquetFile(stream)
            return file.schema_arrow, int(file.metadata.num_rows)

    def parquet_groups(self, name: str) -> list[int]:
        """Rows of each row group of one Parquet file.

        Raises:
            DataError: missing or not readable as Parquet.
        """
        with self._parquet(name) as stream:
            metadata = pq.ParquetFile(stream).metadata
            return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def iter_tables(self, name: str, columns: list[str], rows: int) -> Iterator[pa.Table]:
        """One Parquet file, at most ``rows`` rows at a time.

        Raises:
            DataError: missing or not readable as Parquet.
        """
        with self._parquet(name) as stream:
            # Else pyarrow keeps the bytes of every row group that was read until the file is closed.
            file = pq.ParquetFile(stream, pre_buffer=False)
            for batch in file.iter_batches(batch_size=rows, columns=columns):
                yield pa.Table.from_batches([batch])

    def read_rows(self, name: str, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Rows ``start`` to ``stop`` of one Parquet file; reads only the row groups they lie in.

        Raises:
            DataError: missing, not readable as Parquet, or with fewer rows.
        """
        with self._parquet(name) as stream:
            file = pq.ParquetFile(stream)
            if file.metadata.num_rows < stop:
                raise DataError(f"{self.uri}/{name}: has {file.metadata.num_rows} rows, {stop} were expected")
            groups, first = _row_groups(file.metadata, start, stop)
            return file.read_row_groups(groups, columns=columns).slice(start - first, stop - start)

    def read_tables(self, folder: str, kind: str | None = None) -> pa.Table:
        """All Parquet files of a folder in name order, checked against ``kind``.

        Raises:
            DataError: no Parquet file, or one that does not fit.
        """
        names = self.names(folder, ".parquet")
        if not names:
            raise DataError(f"{self.uri}/{folder}: no Parquet file")
        tables = [self.read_table(name) for name in names]
        if kind is not None:
            tables = [
                check_table(kind, table, f"{self.uri}/{name}")
                for name, table in zip(names, tables, strict=True)
            ]
        return pa.concat_tables(tables)

    def delete(self, name: str) -> None:
        """Delete one file."""
        filesystem, path = self._resolve(name)
        filesystem.rm(path)

    def upload(self, folder: Path) -> None:
        """Copy a local folder's files here, below the same names."""
        filesystem, path = self._resolve()
        filesystem.put(f"{folder}/", path, recursive=True)

    def remove(self) -> None:
        """Delete the folder and everything below it, if it is there."""
        filesystem, path = self._resolve()
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    def move_to(self, other: "Place") -> None:
        """Rename this folder; what stands at the other place is deleted first. Local places only."""
        other.remove()
        self.local.rename(other.local)

    def sweep(self) -> None:
        """Delete the half-written files that killed processes left below this place, if it is local."""
        if self.is_local and self.local.is_dir():
            for path in self.local.rglob("_tmp-*"):
                path.unlink(missing_ok=True)


def _is_shown(name: str) -> bool:
    """Whether a file is neither hidden nor half-written."""
    return not any(part.startswith(("_tmp", ".")) for part in name.split("/"))


def _state_of(info: Mapping[str, Any]) -> list[Any]:
    stamps = (info.get(key) for key in ("mtime", "ETag", "etag", "LastModified", "updated", "created"))
    return [info["size"], str(next((stamp for stamp in stamps if stamp is not None), None))]


# File formats that hold texts: JSON lines and plain text or Markdown, one record at a time, and where they lie.


_BATCH_ROWS = 1024
_PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
PARQUET_ENDINGS = (".parquet", ".pq")
JSONL_ENDINGS = tuple(f"{ending}{packed}" for ending in (".jsonl", ".ndjson", ".json") for packed in _PACKED)
CSV_ENDINGS = tuple(f"{ending}{packed}" for ending in (".csv", ".tsv") for packed in _PACKED)
TEXT_ENDINGS = (".txt", ".md", ".markdown", ".rst")
MARKDOWN = (".md", ".markdown")
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")
_GLOB_CHARACTERS = set("*?[")


# Package and extra of addresses.
FILESYSTEMS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}


def is_remote(path: str) -> bool:
    """Whether a path is an address, such as ``s3://bucket/folder``, ``gs://`` or ``hf://datasets/owner/name``."""
    return "://" in path and not path.startswith("file://")


def located(path: str) -> Path:
    """A path as it stands in a config: a local one, or one that reads an address through fsspec like a local one.

    Raises:
        MissingDependency: the package for such addresses is not installed.
    """
    if not is_remote(path):
        return Path(path).expanduser()
    try:
        from upath import UPath

        # Not a subclass of Path since pathlib has paths that are no files' (PEP 428's pure ones); it has its methods.
        return cast(Path, UPath(path, use_listings_cache=False))
    except ImportError as error:
        scheme = path.partition("://")[0]
        package, extra = FILESYSTEMS.get(scheme, ("universal_pathlib", "s3"))
        raise MissingDependency(package, extra, f"{scheme}:// ({one_line(error)})") from error


def parquet_source(path: Path) -> str | IO[bytes]:
    """What pyarrow opens a Parquet file by."""
    return path.open("rb") if is_remote(str(path)) else str(path)


def remote_states(path: str) -> dict[str, list[Any]]:
    """Size and tag of every file at an address, by its name below the folder, or the file's own; one listing, nothing is read."""
    found = Place(path).states()
    return {posixpath.basename(path) if name == "." else name: state for name, state in found.items()}


def files_at(path: str) -> list[Path]:
    """Files behind a path, sorted: the file itself, all below a folder, or what a glob matches; none hidden, nor in a
    hidden folder below it.

    A path that exists is a path, whatever characters of globs its name has. At an address there are no globs.
    """
    if is_remote(path):
        root = located(path)
        return [root if name == "." else root / name for name in Place(path).states()]
    text = str(Path(path).expanduser())
    if _GLOB_CHARACTERS & set(text) and not Path(text).exists():
        found = [Path(name) for name in glob.glob(text, recursive=True)]  # noqa: PTH207 - absolute patterns
    elif Path(text).is_dir():
        found = [path for path in Path(text).rglob("*") if not _in_hidden_folder(path, Path(text))]
    else:
        found = [Path(text)]
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _in_hidden_folder(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parent.parts)


def named_below(path: str, files: Sequence[Path]) -> dict[str, Path]:
    """Files by their paths below the folder that ``path`` is, or below the one that those of a glob share."""
    root = located(path)
    if is_remote(path):
        return {file.name if file == root else file.relative_to(root).as_posix(): file for file in files}
    if files and not root.is_dir():
        root = Path(os.path.commonpath([file.parent for file in files]))
    return {file.relative_to(root).as_posix(): file for file in files}


def json_lines(
    path: Path, bad: Callable[[str, DataError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty; plain or compressed.

    A file that is one JSON array gives its objects by their number in it, from 1; it is held in memory.

    Args:
        path: the file.
        bad: is told of a line that is no JSON object, by its place; None: the first one is raised.

    Raises:
        DataError: not UTF-8, or a line that is not a JSON object.
    """
    # A line that is not UTF-8 would else end the reading, and its number would be a guess.
    errors = "strict" if bad is None else "surrogateescape"
    number = 0
    try:
        with fsspec.open(
            str(path), "rt", encoding="utf-8-sig", errors=errors, compression=compression_of(path.name)
        ) as stream:
            lines = enumerate(stream, start=1)
            first = next(((number, line) for number, line in lines if line.strip()), None)
            if first is not None and _opens_array(first[1]):
                yield from _array(path, first[1] + stream.read(), bad)
                return
            for number, line in chain([] if first is None else [first], lines):
                if not line.strip():
                    continue
                try:
                    yield number, _json_line(path, number, line)
                except DataError as error:
                    if bad is None:
                        raise
                    bad(f"line {number}", error)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 after line {number}: {error.reason}; allowed: UTF-8") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: not readable as JSON lines: {one_line(error)}") from error


def _json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {number} is not JSON ({error}); allowed: one JSON object a line"
        ) from error
    if not isinstance(record, dict):
        seen = f"line {number} holds a {type(record).__name__}"
        raise DataError(f"{path}: {seen}; allowed: one JSON object a line")
    if max(line) >= "\udc80" and any("\udc80" <= character <= "\udcff" for character in line):
        raise DataError(f"{path}: line {number} is not UTF-8; allowed: UTF-8")
    return record


def compression_of(name: str) -> str | None:
    """How fsspec names a file's compression, by its ending; None: none."""
    endings = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
    return next((kind for ending, kind in endings.items() if name.lower().endswith(ending)), None)


def _opens_array(line: str) -> bool:
    """Whether a file's first line begins an array of objects; a line that is a whole array of its own is no object."""
    try:
        return line.lstrip().startswith("[") and isinstance(json.loads(line), list) and "{" in line
    except ValueError:
        return True


def _array(
    path: Path, content: str, bad: Callable[[str, DataError], None] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: neither JSON lines nor a JSON array: {error}") from error
    for number, record in enumerate(found, start=1):
        if isinstance(record, dict):
            yield number, record
            continue
        problem = DataError(
            f"{path}: element {number} of the array is {type(record).__name__}; allowed: JSON objects"
        )
        if bad is None:
            raise problem
        bad(f"element {number}", problem)


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
    path: Path, columns: Callable[[list[str]], list[str]] = list, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, record) of one Parquet file, a batch at a time; only the row groups asked for are read.

    Args:
        path: the file.
        columns: from the names of the file's columns to those that are read; raises where it misses one.
        start: the first row.
        stop: the row behind the last; None: all.

    Raises:
        DataError: not there, or not Parquet.
    """
    try:
        # Not buffered ahead: pyarrow would keep the bytes of every row group that was read until the file is closed.
        with pq.ParquetFile(parquet_source(path), pre_buffer=False) as file:
            names = columns(file.schema_arrow.names)
            end = file.metadata.num_rows if stop is None else min(stop, file.metadata.num_rows)
            groups, number = _row_groups(file.metadata, start, end)
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names):
                first, last = max(start - number, 0), min(end - number, batch.num_rows)
                records = batch.slice(first, max(0, last - first)).to_pylist()
                yield from enumerate(records, number + first)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {one_line(error)}") from error


def _row_groups(metadata: pq.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows ``start`` to ``stop``, and the first row of the first of them."""
    groups: list[int] = []
    first = end = 0
    for group in range(metadata.num_row_groups):
        begin, end = end, end + metadata.row_group(group).num_rows
        if end > start and begin < stop:
            first = first if groups else begin
            groups.append(group)
    return groups, first


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
