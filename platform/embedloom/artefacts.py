"""Artefacts: folders that are done when, and only when, their ``manifest.json`` is there.

A writer first states what it is building in ``_building.json`` (kind and fingerprint), then adds files, each
written under a temporary name and renamed, and last of all the manifest. So a killed stage leaves either a
whole file or none; the next run with the same fingerprint continues from the whole files, any other
fingerprint starts from an empty folder, and readers accept nothing without a manifest.

Paths go through fsspec: a local folder, ``s3://`` or ``gs://`` behave alike. An object store has no rename,
but its uploads are atomic, so files there are written directly.
"""

import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from embedloom import __version__
from embedloom.errors import DataError
from embedloom.records import check_table

MANIFEST_FILE = "manifest.json"
BUILDING_FILE = "_building.json"
MANIFEST_VERSION = 1
_MANIFEST_KEYS = {
    "kind", "schema_version", "fingerprint", "config_fingerprint", "inputs", "counts", "seconds",
    "versions", "profile", "created", "details",
}  # fmt: skip


def fingerprint(*parts: Any) -> str:
    """Hash JSON-like values (and pydantic models) into sixteen hex digits."""

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)

    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=plain)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


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
        filesystem, root = fsspec.core.url_to_fs(str(self.local) if self.is_local else self.uri)
        return filesystem, posixpath.join(root, name) if name else root

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

    def read_bytes(self, name: str) -> bytes:
        """Content of one file."""
        filesystem, path = self._resolve(name)
        with filesystem.open(path, "rb") as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file so that it is there whole or not at all."""
        filesystem, path = self._resolve(name)
        folder, base = posixpath.split(path)
        filesystem.makedirs(folder, exist_ok=True)
        if not self.is_local:
            with filesystem.open(path, "wb") as stream:
                stream.write(content)
            return
        temporary = Path(folder) / f"_tmp-{os.getpid()}-{base}"
        with temporary.open("wb") as local_stream:
            local_stream.write(content)
            local_stream.flush()
            os.fsync(local_stream.fileno())
        temporary.replace(path)

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
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(name, bytes(sink.getvalue()))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read one Parquet file.

        Raises:
            DataError: missing or not readable as Parquet.
        """
        filesystem, path = self._resolve(name)
        try:
            with filesystem.open(path, "rb") as stream:
                return pq.read_table(stream, columns=columns)
        except FileNotFoundError as error:
            raise DataError(f"{self.uri}/{name}: no such file") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{self.uri}/{name}: not readable as Parquet: {' '.join(str(error).split())}"
            ) from error

    def parquet_footer(self, name: str) -> tuple[pa.Schema, int]:
        """Schema and row count of one Parquet file, without reading its rows.

        Raises:
            DataError: not readable as Parquet.
        """
        filesystem, path = self._resolve(name)
        try:
            with filesystem.open(path, "rb") as stream:
                footer = pq.ParquetFile(stream)
                return footer.schema_arrow, int(footer.metadata.num_rows)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{self.uri}/{name}: not readable as Parquet: {' '.join(str(error).split())}"
            ) from error

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

    def remove(self) -> None:
        """Delete the folder and everything below it, if it is there."""
        filesystem, path = self._resolve()
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)


@dataclass(frozen=True, slots=True)
class Artefact:
    """A finished artefact: its place and its manifest."""

    place: Place
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What identifies its content: kind, config and inputs."""
        return str(self.manifest["fingerprint"])

    @property
    def counts(self) -> dict[str, Any]:
        """Rows, tokens, rejects by reason."""
        return dict(self.manifest["counts"])

    @classmethod
    def open(cls, place: Place, kind: str | None = None) -> "Artefact":
        """Open a finished artefact.

        Raises:
            DataError: no manifest (absent or half-written), a corrupt one, or another kind.
        """
        if not place.exists(MANIFEST_FILE):
            raise DataError(
                f"{place.uri}: no {MANIFEST_FILE}, so this artefact is missing or unfinished; run its stage first"
            )
        manifest = place.read_json(MANIFEST_FILE)
        missing = sorted(_MANIFEST_KEYS - set(manifest))
        if missing:
            raise DataError(
                f"{place.uri}/{MANIFEST_FILE}: corrupt, key {missing[0]!r} is missing; delete the folder to build it again"
            )
        if manifest["schema_version"] != MANIFEST_VERSION:
            raise DataError(
                f"{place.uri}/{MANIFEST_FILE}: schema_version {manifest['schema_version']!r}, this version reads {MANIFEST_VERSION}"
            )
        if kind is not None and manifest["kind"] != kind:
            raise DataError(f"{place.uri}: is a {manifest['kind']!r} artefact, expected {kind!r}")
        return cls(place, manifest)

    @classmethod
    def find(cls, place: Place, wanted: str) -> "Artefact | None":
        """The artefact if it is finished with this fingerprint, else None; a corrupt manifest still raises."""
        if not place.exists(MANIFEST_FILE):
            return None
        artefact = cls.open(place)
        return artefact if artefact.fingerprint == wanted else None


class ArtefactWriter:
    """Builds one artefact; continue after a crash by opening it again with the same fingerprint."""

    def __init__(
        self, place: Place, kind: str, config_fingerprint: str, inputs: Mapping[str, str], profile: str
    ) -> None:
        self.place = place
        self.kind = kind
        self.config_fingerprint = config_fingerprint
        self.inputs = dict(inputs)
        self.profile = profile
        self.fingerprint = fingerprint(kind, config_fingerprint, self.inputs)
        self._started = time.monotonic()
        self.resumed = self._begin()

    def _begin(self) -> bool:
        """Keep the files of an interrupted build of the same fingerprint; clear anything else."""
        if self.place.exists(BUILDING_FILE):
            try:
                building = self.place.read_json(BUILDING_FILE)
            except DataError:
                building = {}
            if building.get("fingerprint") == self.fingerprint and not self.place.exists(MANIFEST_FILE):
                return True
        self.place.remove()
        self.place.write_json(BUILDING_FILE, {"kind": self.kind, "fingerprint": self.fingerprint})
        return False

    @contextmanager
    def local_folder(self, name: str = "") -> Iterator[Path]:
        """A local folder whose files become part of the artefact: itself if local, else uploaded on success."""
        target = self.place.child(name) if name else self.place
        if target.is_local:
            target.local.mkdir(parents=True, exist_ok=True)
            yield target.local
            return
        temporary = Path(tempfile.mkdtemp(prefix="embedloom-"))
        try:
            yield temporary
            filesystem, path = target._resolve()
            filesystem.put(f"{temporary}/", path, recursive=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def commit(
        self,
        counts: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> Artefact:
        """Write the manifest, which makes the artefact done.

        Args:
            counts: rows, tokens, rejects by reason.
            details: anything else a reader of the run wants to know, JSON-like.
            seconds: time spent, if it was more than this process saw.
        """
        manifest = {
            "kind": self.kind,
            "schema_version": MANIFEST_VERSION,
            "fingerprint": self.fingerprint,
            "config_fingerprint": self.config_fingerprint,
            "inputs": self.inputs,
            "counts": dict(counts),
            "seconds": round(time.monotonic() - self._started if seconds is None else seconds, 3),
            "versions": {"embedloom": __version__},
            "profile": self.profile,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "details": dict(details or {}),
        }
        self.place.write_json(MANIFEST_FILE, manifest)
        filesystem, path = self.place._resolve(BUILDING_FILE)
        filesystem.rm(path)
        return Artefact(self.place, manifest)
