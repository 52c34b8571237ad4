"""What lies in a folder: the files that are read, and the others by kind, so that none is passed over without a word.

Links to files are read under their own names; links to folders are not followed, so there are no loops; broken links,
links to folders and hidden files are counted among what is passed over.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedloom.config.corpus import DocumentKind
from embedloom.core.storage import CSV_ENDINGS, JSONL_ENDINGS, PARQUET_ENDINGS, files_at
from embedloom.documents.reading import kind_of, unpacked_name

_TABLES = (*PARQUET_ENDINGS, *JSONL_ENDINGS, *CSV_ENDINGS)


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of a path.

    Attributes:
        files: what is read, in order.
        passed: what is not: number of files by kind (ending, ``hidden``, ``link to a folder``, ``broken link``).
    """

    files: tuple[Path, ...]
    passed: Mapping[str, int]

    def __str__(self) -> str:
        """One clause for a note; empty where nothing is passed over."""
        return ", ".join(
            f"{count:,} {kind}"
            for kind, count in sorted(self.passed.items(), key=lambda one: (-one[1], one[0]))
        )


def list_documents(path: str, read_as: Mapping[str, DocumentKind] = {}) -> Listing:
    """The documents of a file, folder or glob.

    A file that is given itself, or by a glob, is read whatever its name is like, or refused by its reader.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        return Listing(tuple(files_at(path)), {})
    files: list[Path] = []
    passed: Counter[str] = Counter()
    for file, why in _walk(root):
        if why is None and kind_of(file.name, read_as) is None:
            why = kind_name(file.name)
        if why is None:
            files.append(file)
        else:
            passed[why] += 1
    return Listing(tuple(sorted(files)), dict(passed))


def kind_name(name: str) -> str:
    """What files like this one are called: by their ending."""
    suffix = Path(unpacked_name(name)).suffix.lower()
    return suffix or "without an ending"


def are_tables(passed: Mapping[str, int]) -> list[str]:
    """The kinds among those that a format of tables reads."""
    return sorted(kind for kind in passed if kind.endswith(_TABLES) and kind.startswith("."))


def _walk(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Every file below a folder, and why it is passed over, or None."""
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        hidden = here != root and any(part.startswith(".") for part in here.relative_to(root).parts)
        for name in folders:
            if (here / name).is_symlink():
                yield here / name, "link to a folder"
        for name in names:
            file = here / name
            if hidden or name.startswith("."):
                yield file, "hidden"
            elif not file.exists():
                yield file, "broken link"
            else:
                yield file, None if file.is_file() else "no regular file"


def how_to_read(passed: Mapping[str, int], tables: Sequence[str] = ()) -> str:
    """What a person can do about kinds that are passed over."""
    said = ["read_as: {.ENDING: text} reads more"]
    if tables:
        said.append(f"{', '.join(tables)} are tables: give them by a source of their own format")
    return "; ".join(said)
