"""The state of a corpus source, for fingerprints: a changed file or package makes the corpus stale."""

import hashlib
import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from embedloom.config.data import CorpusSource
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


def source_state(source: CorpusSource) -> dict[str, Any]:
    """Name, size and modification time of every file, or the version of every package.

    Raises:
        DataError: a path that does not exist, or a package that is not installed.
    """
    if source.format == "huggingface":
        return {"dataset": source.path}
    if source.format == "python_docs":
        return {package: _package_state(package) for package in source.packages}
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in source_files(source)}


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
