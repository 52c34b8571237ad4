"""Artefacts: folders that are done when, and only when, their ``manifest.json`` is there.

A writer first states what it is building in ``_building.json`` (kind and fingerprint), then adds files, each
written under a temporary name and renamed, and last of all the manifest. So a killed stage leaves either a
whole file or none; the next run with the same fingerprint continues from the whole files, any other
fingerprint starts from an empty folder, and readers accept nothing without a manifest.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from embedloom import __version__
from embedloom.core.storage import Place
from embedloom.errors import DataError

MANIFEST_FILE = "manifest.json"
BUILDING_FILE = "_building.json"
MANIFEST_VERSION = 1


class Manifest(TypedDict):
    """``manifest.json``: what an artefact is, of what it was made, and what its stage counted."""

    kind: str
    schema_version: int
    fingerprint: str
    config_fingerprint: str
    inputs: dict[str, str]  # name -> fingerprint
    counts: dict[str, Any]  # rows, tokens, rejects by reason
    seconds: float
    versions: dict[str, str]  # of embedloom, and the hash of its code
    profile: str
    created: str  # UTC, ISO 8601
    details: dict[str, Any]  # the stage's own
    scratch: NotRequired[list[str]]  # folders of work to delete
    origin: NotRequired[dict[str, Any]]  # settings, and contents of the files read
    revisions: NotRequired[dict[str, str]]  # Hugging Face id -> commit of the model behind it


def fingerprint(*parts: Any) -> str:
    """Hash JSON-like values (and pydantic models) into sixteen hex digits."""

    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def plain_values(*parts: Any) -> Any:
    """What a fingerprint is made of, as JSON has it."""
    return json.loads(json.dumps(parts, sort_keys=True, default=_plain))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


@functools.cache
def code_versions() -> dict[str, str]:
    """The version, and a hash over this package's sources: what it was that built an artefact, to the letter."""
    root = Path(__file__).parents[1]  # of the package, whose every source counts
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {"embedloom": __version__, "code": digest.hexdigest()[:16]}


@dataclass(frozen=True, slots=True)
class Artefact:
    """A finished artefact: its place and its manifest."""

    place: Place
    manifest: Manifest

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
        missing = sorted(Manifest.__required_keys__ - set(manifest))
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
        return cls(place, cast(Manifest, manifest))

    @classmethod
    def find(cls, place: Place, wanted: str) -> "Artefact | None":
        """The artefact if it is finished with this fingerprint, else None; a corrupt manifest still raises."""
        if not place.exists(MANIFEST_FILE):
            return None
        artefact = cls.open(place)
        return artefact if artefact.fingerprint == wanted else None

    def tidy(self) -> None:
        """Delete what a build left that ended, or lost its storage's answer, right after the manifest was written."""
        for folder in self.manifest.get("scratch", ()):
            self.place.child(folder).remove()
        if self.place.exists(BUILDING_FILE):
            self.place.delete(BUILDING_FILE)


_PARQUET_END = b"PAR1"


def recorded(place: Place) -> tuple[str, list[Any]] | None:
    """Fingerprint and settings that the artefact at a place, finished or begun, was made with; None where nothing says so.

    Raises:
        DataError: a corrupt manifest.
    """
    content: Mapping[str, Any] = {}
    if place.exists(MANIFEST_FILE):
        manifest = Artefact.open(place).manifest
        content = {**manifest.get("origin", {}), "fingerprint": manifest["fingerprint"]}
    elif place.exists(BUILDING_FILE):
        with contextlib.suppress(DataError):  # half-written: the build begins again
            content = place.read_json(BUILDING_FILE)
    settings = content.get("settings")
    return (content["fingerprint"], settings) if settings else None


class ArtefactWriter:
    """Builds one artefact; continue after a crash by opening it again with the same fingerprint."""

    def __init__(
        self,
        place: Place,
        kind: str,
        config_fingerprint: str,
        inputs: Mapping[str, str],
        profile: str,
        origin: Mapping[str, Any] | None = None,
        revisions: Callable[[], dict[str, str]] | None = None,
        continues: str | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            place: the artefact's folder.
            kind: of artefact.
            config_fingerprint: of the settings that decide it.
            inputs: fingerprints of the artefacts it is made from, by name.
            profile: it is built on.
            origin: the settings and the contents of the files read, kept so that a later run can say what changed.
            revisions: asked when it is done: the commits of the Hugging Face models behind it, by their ids.
            continues: fingerprint of another build whose files this one can use; what of them it cannot, its stage deletes.
        """
        self.place = place
        self.kind = kind
        self.config_fingerprint = config_fingerprint
        self.inputs = dict(inputs)
        self.profile = profile
        self.origin = dict(origin or {})
        self._revisions = revisions
        self.fingerprint = fingerprint(kind, config_fingerprint, self.inputs)
        self._started = time.monotonic()
        self.resumed = self._begin(continues)

    def _begin(self, continues: str | None) -> bool:
        """Keep the files of an interrupted build of the same fingerprint or of ``continues``; clear anything else."""
        settings = {"settings": self.origin["settings"]} if "settings" in self.origin else {}
        stated = {"kind": self.kind, "fingerprint": self.fingerprint, **settings}
        if self.place.exists(BUILDING_FILE):
            try:
                building = self.place.read_json(BUILDING_FILE)
            except DataError:
                building = {}
            known = building.get("fingerprint")
            if known in (self.fingerprint, continues) and known and not self.place.exists(MANIFEST_FILE):
                if known != self.fingerprint:
                    self.place.write_json(BUILDING_FILE, stated)
                return True
        self.place.remove()
        self.place.write_json(BUILDING_FILE, stated)
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
            target.upload(temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def commit(
        self,
        counts: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        scratch: Sequence[str] = (),
    ) -> Artefact:
        """Write the manifest, which makes the artefact done.

        Args:
            counts: rows, tokens, rejects by reason.
            details: anything else a reader of the run wants to know, JSON-like.
            seconds: time spent, if it was more than this process saw.
            scratch: folders of work that are no part of the artefact; gone afterwards, not before, as a build that is
                killed here would otherwise begin again.

        Raises:
            DataError: a Parquet file of the artefact is cut, which a resumed build would otherwise take over.
        """
        manifest: Manifest = {
            "kind": self.kind,
            "schema_version": MANIFEST_VERSION,
            "fingerprint": self.fingerprint,
            "config_fingerprint": self.config_fingerprint,
            "inputs": self.inputs,
            "counts": dict(counts),
            "seconds": round(time.monotonic() - self._started if seconds is None else seconds, 3),
            "versions": code_versions(),
            "profile": self.profile,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "details": dict(details or {}),
        }
        if scratch:
            manifest["scratch"] = list(scratch)
        if self.origin:
            manifest["origin"] = self.origin
        if self._revisions is not None and (revisions := self._revisions()):
            manifest["revisions"] = revisions
        self._refuse_cut_files()
        self.place.sweep()  # what a full disk or a killed predecessor left half-written is no part of it
        self.place.write_json(MANIFEST_FILE, manifest)
        artefact = Artefact(self.place, manifest)
        artefact.tidy()
        return artefact

    def _refuse_cut_files(self) -> None:
        """Look at the last bytes of every Parquet file on a disk; an object store has whole files or none."""
        if not self.place.is_local:
            return
        for path in sorted(self.place.local.rglob("*.parquet")):
            with path.open("rb") as stream:
                stream.seek(max(0, path.stat().st_size - len(_PARQUET_END)))
                end = stream.read()
            if end != _PARQUET_END and not path.name.startswith("_tmp"):
                raise DataError(
                    f"{path}: cut, a Parquet file ends in {_PARQUET_END!r}; delete it and run again"
                )
