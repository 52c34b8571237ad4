"""What files hold, as hashes: an input that was touched or copied is the same input, other bytes at its path are not.

Hashes are kept in the user's cache folder by the file's size, times of change and inode, one small file a folder, so
that gigabytes of weights are read once. The cache decides nothing: without it, or with a broken one, files are read
again. Reading takes about a second per 1-2 GB.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from embedloom.core.progress import note
from embedloom.core.storage import apply_umask, files_at, is_remote, named_below, remote_states
from embedloom.errors import DataError

Contents = dict[str, str]  # file -> hash of what it holds

_HEX_DIGITS = 32
_DONE = ".converted"  # written last; a folder without it is an interrupted one
# A file that was written this recently may be written again within one tick of its clock, unseen (as git's index says).
_RACY_NANOSECONDS = 2 * 10**9
_WORTH_SAYING_BYTES = 2**30
_READERS = 4


def cache_folder() -> Path:
    """Where hashes and converted models live: ``$EMBEDLOOM_CACHE`` or the user's cache folder."""
    root = os.environ.get("EMBEDLOOM_CACHE") or os.path.join(  # noqa: PTH118
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "embedloom"
    )
    return Path(root)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made whole or not at all, unless it is there; of several processes that want it one wins.

    Args:
        folder: where it is to lie.
        make: fills the empty folder it is given, which is then renamed.
    """
    if (folder / _DONE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        make(temporary)
        (temporary / _DONE).touch()
        apply_umask(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process finished first, or an interrupted folder stands in the way.
            if not (folder / _DONE).is_file():
                shutil.rmtree(folder)
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def is_trusted(folder: Path) -> bool:
    """Whether a folder lies where ``own_code.trusted_copy`` alone writes, so that the code in it may be run."""
    return cache_folder().absolute() / "trusted" in folder.absolute().parents


def contents_of(files: Mapping[str, Path]) -> Contents:
    """The hash of every file, by the name it is given under.

    Raises:
        DataError: a file that cannot be read.
    """
    folders: dict[Path, list[Path]] = {}
    for path in files.values():
        folders.setdefault(path.parent.absolute(), []).append(path)
    found: dict[Path, str] = {}
    for folder, paths in folders.items():
        found |= _hashes_in(folder, paths)
    return {name: found[path] for name, path in files.items()}


def path_contents(path: str) -> Contents:
    """What lies behind a file, folder or glob: hashes by path below the folder that all files share; at an address, of
    the files' sizes and tags.

    Raises:
        DataError: a file that cannot be read.
    """
    if is_remote(path):
        return {
            name: hashlib.sha256(str(state).encode()).hexdigest()[:_HEX_DIGITS]
            for name, state in remote_states(path).items()
        }
    return contents_of(named_below(path, files_at(path)))


def digest(contents: Mapping[str, str]) -> str:
    """One hash of all, for fingerprints."""
    text = json.dumps(dict(contents), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_HEX_DIGITS]


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files in which two contents differ, in words: ``a.json``, ``b.json (new)``, ``c.json (gone)``."""
    found = []
    for name in sorted({**before, **now}):
        if before.get(name) != now.get(name):
            found.append(
                name + ("" if name in before and name in now else " (new)" if name in now else " (gone)")
            )
    return found


def _hashes_in(folder: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """Hashes of files of one folder: those the cache knows, and the others read."""
    kept = _read_cache(folder)
    found: dict[Path, str] = {}
    unknown: list[Path] = []
    stamps: dict[Path, list[int]] = {}
    for path in paths:
        stamps[path] = _stamp(path)
        entry = kept.get(path.name)
        if entry is not None and entry[:-1] == stamps[path]:
            found[path] = entry[-1]
        else:
            unknown.append(path)
    if not unknown:
        return found
    size = sum(stamps[path][0] for path in unknown)
    if size >= _WORTH_SAYING_BYTES:
        note(
            "contents",
            f"reading {size / 2**30:,.1f} GiB in {folder} for their hashes: once, unless they change",
        )
    with ThreadPoolExecutor(_READERS) as pool:
        found |= dict(zip(unknown, pool.map(_hash, unknown), strict=True))
    settled = time.time_ns() - _RACY_NANOSECONDS
    fresh = {
        path.name: [*stamps[path], found[path]]
        for path in unknown
        if max(stamps[path][1:3]) < settled and _stamp(path) == stamps[path]  # not while it was read
    }
    if fresh:
        _write_cache(folder, {**kept, **fresh})
    return found


def _stamp(path: Path) -> list[int]:
    """What a change of a file changes. The change time too, which nobody can set back: a file overwritten in place may
    be given its former size and modification time (as ``rsync --inplace -t`` and archives do)."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:_HEX_DIGITS]
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from error


def _cache_file(folder: Path) -> Path:
    return cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"


def _read_cache(folder: Path) -> dict[str, Any]:
    """Entries of a folder's files: [size, three stamps, hash] by name; empty where the cache cannot be read."""
    try:
        entries = json.loads(_cache_file(folder).read_bytes())["files"]
        return {name: entry for name, entry in entries.items() if _is_entry(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and [type(value) for value in entry] == [int, int, int, int, str]
        and len(entry[-1]) == _HEX_DIGITS
    )


def _write_cache(folder: Path, entries: dict[str, Any]) -> None:
    """Keep the entries of files that are still there; a cache that cannot be written is only a slower next time."""
    present = {name: entry for name, entry in entries.items() if (folder / name).is_file()}
    target = _cache_file(folder)
    temporary = target.with_name(f"_tmp-{os.getpid()}-{time.monotonic_ns()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"folder": str(folder), "files": present}))
        temporary.replace(target)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
