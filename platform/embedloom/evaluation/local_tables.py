"""Reading the Parquet files of local tasks: columns checked, languages and splits chosen."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from embedloom.errors import DataError
from embedloom.evaluation.languages import same_language
from embedloom.evaluation.specs import TaskSpec
from embedloom.records import Schema, checked, content_id
from embedloom.storage import Place

Rows = list[dict[str, Any]]


def read_columns(path: Path, columns: dict[str, pa.DataType], optional: Sequence[str] = ()) -> pa.Table:
    """The named columns of one file, cast.

    Raises:
        DataError: not Parquet, a column missing, empty values where none are allowed, or of another type.
    """
    schema = Schema(path.stem, columns, frozenset(optional))
    return checked(schema, Place(str(path.parent)).read_table(path.name), str(path))


def rows_of_split(table: pa.Table, split: str, path: Path) -> pa.Table:
    """Rows of one split.

    Raises:
        DataError: there are none; the message names the splits there are.
    """
    chosen = table.filter(pc.equal(table.column("split"), split))
    if not chosen.num_rows:
        there = sorted(set(table.column("split").to_pylist()))
        raise DataError(f"{path}: no row of split {split!r}; the file has {there}")
    return chosen


def by_subset(rows: Rows, key: Any, spec: TaskSpec) -> dict[str, Rows]:
    """Rows by subset name, sorted by name; only those that the task's ``languages`` allow.

    Raises:
        DataError: none of them is left.
    """
    subsets: dict[str, Rows] = {}
    for row in rows:
        subsets.setdefault(key(row), []).append(row)
    kept = {name: subsets[name] for name in sorted(subsets) if wanted(name, spec)}
    if not kept:
        raise DataError(
            f"{spec.where}: languages is {list(spec.languages or ())}; the task has {sorted(subsets)}"
        )
    return kept


def wanted(subset: str, spec: TaskSpec) -> bool:
    """Whether ``languages`` allows a subset; one of a language pair is enough."""
    if spec.languages is None:
        return True
    names = [subset, *subset.split("-")]
    return any(same_language(name, lang) for name in names for lang in spec.languages)


def limited(rows: Rows, limit: int | None, *keys: str) -> Rows:
    """At most ``limit`` rows in their order, chosen by a hash of the named columns."""
    if limit is None or limit >= len(rows):
        return rows
    drawn = sorted(
        range(len(rows)), key=lambda i: content_id("evaluation row", *(str(rows[i][key]) for key in keys))
    )
    return [rows[position] for position in sorted(drawn[:limit])]


def revision_of(files: Sequence[Path], *choices: Any) -> str:
    """Sixteen hex digits over the files' content and what was chosen of them."""
    digest = hashlib.sha256(repr(choices).encode())
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()[:16]
