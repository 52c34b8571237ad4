"""Models in an object store: fetched once a node into its cache, file by file, and known by the store's own tags."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from embedloom.core.contents import Contents, cache_folder, digest
from embedloom.core.progress import note
from embedloom.core.storage import Place
from embedloom.core.verdict import GATE_FILE, INT8_FILE
from embedloom.errors import DataError

_FOLDER = "stored-models"
_DIGITS = 16
_WORTH_SAYING_BYTES = 2**30
# Written beside finished weights, or gone after them: they come along, but make no other model of it.
_NOT_THE_MODEL = ("_building.json", GATE_FILE, INT8_FILE)


def stored_contents(place: Place) -> Contents:
    """What stands for the content of every file, by its name: a hash of its size and tag; nothing is read."""
    return {name: _hash(*map(str, state)) for name, state in place.states().items() if _is_part(name)}


def state_of(place: Place) -> str:
    """One hash for all files of a model: another one where any of them was written again."""
    return _state(stored_contents(place))


def _state(contents: Contents) -> str:
    return digest({name: held for name, held in contents.items() if name not in _NOT_THE_MODEL})


def fetched(place: Place, state: str | None = None) -> Path:
    """The model's folder in this machine's cache; files that an earlier state of the model had too are not fetched again.

    Whoever calls it holds a lock on the model's name.

    Args:
        place: of the model.
        state: ``state_of`` the model that is meant; None: whatever is there.

    Raises:
        DataError: no files, or others than those of ``state``.
    """
    contents = stored_contents(place)
    if not contents:
        raise DataError(f"model {place.uri}: no such folder, or an empty one")
    if state is not None and _state(contents) != state:
        raise DataError(
            f"model {place.uri}: its files are not those that the command began with; run the command again"
        )
    root = cache_folder() / _FOLDER / _hash(place.uri)
    # A model without a manifest is named by its folder, so the copy is called as the original.
    target = root / digest(contents)[:_DIGITS] / place.uri.rstrip("/").rsplit("/", 1)[-1]
    if not target.is_dir():
        _fetch(place, contents, root, target)
        _forget_others(root, target, {_hash(name, held) for name, held in contents.items()})
    return target


def _forget_others(root: Path, target: Path, kept: set[str]) -> None:
    """Delete what earlier states of the model had: the store has it no more, and a search over merges makes hundreds."""
    for folder in root.iterdir():
        if folder.name not in ("files", target.parent.name):
            shutil.rmtree(folder, ignore_errors=True)
    for path in (root / "files").iterdir():
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _fetch(place: Place, contents: Contents, root: Path, target: Path) -> None:
    files = root / "files"
    files.mkdir(parents=True, exist_ok=True)
    missing = {name: held for name, held in contents.items() if not (files / _hash(name, held)).is_file()}
    size = sum(state[0] for name, state in place.states().items() if name in missing)
    if size >= _WORTH_SAYING_BYTES:
        note("model", f"fetching {size / 2**30:,.1f} GiB of {place.uri}: once on this machine")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="_tmp-", dir=target.parent))
    try:
        for name, held in contents.items():
            kept = files / _hash(name, held)
            if name in missing:
                part = kept.with_name(f"_tmp-{os.getpid()}-{kept.name}")
                place.get_file(name, part)
                part.replace(kept)
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(kept, temporary / name)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_part(name: str) -> bool:
    """Whether a file belongs to the model, and not to the work on it, such as checkpoints."""
    return not name.startswith("_") or "/" not in name


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_DIGITS]
