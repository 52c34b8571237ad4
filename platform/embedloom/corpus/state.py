"""The state of a corpus source, for fingerprints: a changed file or package makes the corpus stale."""

import hashlib
import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from embedloom.config.data import CorpusSource
from embedloom.contents import Contents, digest, path_contents
from embedloom.errors import DataError
from embedloom.formats import files_at


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
    if source.format in ("huggingface", "python_docs") or (source.format == "text" and source.name is None):
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
