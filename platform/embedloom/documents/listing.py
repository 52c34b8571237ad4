"""What lies in a folder: the files that are read, and the others by kind, so that none is passed over without a word.

Links to files are read under their own names; links to folders are not followed, so there are no loops; broken links,
links to folders and hidden files are counted among what is passed over.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from embedloom.config.corpus import DocumentKind
from embedloom.core.storage import CSV_ENDINGS, JSONL_ENDINGS, PARQUET_ENDINGS, files_at, is_remote, located
from embedloom.documents.reading import kind_of, unpacked_name

_TABLES = (*PARQUET_ENDINGS, *JSONL_ENDINGS, *CSV_ENDINGS)


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of a path.

    Attributes:
        files: what is read, in order.
        passed: what is not: number of files by kind (ending, ``hidden``, ``link to a folder``,
            ``broken link``).
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
    """The documents of a file, folder or glob; what is given itself, or by a glob, is read, or refused by its reader."""
    return list_files(path, lambda name: kind_of(name, read_as) is not None)


def list_files(path: str, reads: Callable[[str], bool]) -> Listing:
    """The files of a path, and of a folder those whose names ``reads`` passes."""
    root = located(path)
    found: list[tuple[Path, str | None]]
    if is_remote(path):
        found = [(file, None) for file in files_at(path)]
    elif not root.is_dir():
        return Listing(tuple(files_at(path)), {})
    else:
        found = list(_walk(root))
    files: list[Path] = []
    passed: Counter[str] = Counter()
    for file, why in found:
        if why is None and file != root and not reads(file.name):
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


def how_to_read(passed: Mapping[str, int], form: str) -> str:
    """What a person can do about kinds that are passed over.

    Args:
        passed: of a listing.
        form: format of the source.
    """
    said = []
    documents = sorted(kind for kind in passed if form != "documents" and kind_of(f"x{kind}") is not None)
    tables = sorted(kind for kind in passed if kind.endswith(_TABLES) and kind.startswith("."))
    if documents:
        said.append(f"format documents reads {', '.join(documents)}")
    if tables:
        said.append(f"{', '.join(tables)} are tables: a source of their own format reads them")
    if form == "documents":
        said.append("read_as ({.ENDING: text}) reads more")
    return "; ".join(said) or "they are no data of this format"
