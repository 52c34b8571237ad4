"""Faults of the process and of its storage at the n-th write of a stage, for a process that is expendable."""

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedloom.core.artefacts import MANIFEST_FILE
from embedloom.core.storage import Place

FAULTS = ("kill", "full disk", "commit", "truncated")


class Writes:
    """Counts the files a stage writes, and does ``fault`` at one of them.

    Args:
        fault: called with the place, the name, the content or source file and the real write; None: only count.
        target: number of the write, from 0; with ``commit`` the number of the manifest.
        manifests: count manifests alone.
    """

    def __init__(self, fault: Callable[..., None] | None, target: int, manifests: bool = False) -> None:
        self.count = 0
        self.fired = False
        self._fault, self._target, self._manifests = fault, target, manifests

    def install(self) -> None:
        """Stand in for the two ways in which files come to be; for the rest of the process."""
        for method in ("write_bytes", "put_file"):
            original = getattr(Place, method)

            def replaced(place: Place, first: Any, second: Any, original: Any = original) -> None:
                name = first if isinstance(first, str) else second
                self._write(place, str(name), lambda: original(place, first, second))

            setattr(Place, method, replaced)

    def _write(self, place: Place, name: str, write: Callable[[], None]) -> None:
        if self._manifests and not name.endswith(MANIFEST_FILE):
            write()
            return
        number, self.count = self.count, self.count + 1
        due = number == self._target or (self.fired and self._fault is disk_full)
        if self._fault is None or not due:
            write()
            return
        self.fired = True
        self._fault(place, name, write)


def killed_before(place: Place, name: str, write: Callable[[], None]) -> None:
    """The process is gone in the middle of the write: a half temporary file stays behind."""
    _half_file(place, name)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(place: Place, name: str, write: Callable[[], None]) -> None:
    """The file is whole, what should have followed never came."""
    write()
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(place: Place, name: str, write: Callable[[], None]) -> None:
    """This write and all that follow fail, after some bytes."""
    _half_file(place, name)
    raise OSError(errno.ENOSPC, "No space left on device", name)


def commit_refused(place: Place, name: str, write: Callable[[], None]) -> None:
    """The storage refuses the manifest."""
    raise OSError(errno.EIO, "Input/output error", name)


def commit_unanswered(place: Place, name: str, write: Callable[[], None]) -> None:
    """The manifest is there, but the storage's answer is lost."""
    write()
    raise OSError(errno.ETIMEDOUT, "Connection timed out", name)


def fault_of(kind: str, draw: random.Random) -> Callable[..., None]:
    """What happens at the drawn write."""
    if kind == "full disk":
        return disk_full
    if kind == "commit":
        return draw.choice([commit_refused, commit_unanswered])
    return draw.choice([killed_before, killed_after])


def truncate_one(folder: Path, draw: random.Random) -> Path | None:
    """Cut a finished file of an unfinished artefact in half; None where there is none yet."""
    found = [
        path for path in sorted(folder.rglob("*")) if _is_shard(path) and not _is_committed(folder, path)
    ]
    if not found:
        return None
    chosen = draw.choice(found)
    os.truncate(chosen, chosen.stat().st_size // 2)
    return chosen


def _is_shard(path: Path) -> bool:
    return (
        path.suffix in (".parquet", ".safetensors")
        and not path.name.startswith("_tmp")
        and path.stat().st_size > 1
    )


def _is_committed(folder: Path, path: Path) -> bool:
    return (folder / path.relative_to(folder).parts[0] / MANIFEST_FILE).exists()


def _half_file(place: Place, name: str) -> None:
    path = place.local / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / f"_tmp-{os.getpid()}-{path.name}").write_bytes(b"half of what was to be writ")
