"""Prepared examples of all sources, read row by row from memory-mapped files.

Only the pages that are read take memory, and workers of one node share them, so the data may be larger than memory.
Below an object store, parts are copied to the node's own disk when first needed.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.storage import Place
from embedloom.training.groups import Group
from embedloom.training.prepare import INDEX_FILE, PART_ROWS
from embedloom.training.right_answers import KEY_SCHEMA, RightAnswers

_OPEN_PARTS = 2048  # mapped at a time; each is a handful of objects, its pages belong to the system


class ExampleStore:
    """Rows numbered through all sources, in the order in which they are named."""

    def __init__(self, place: Place, folders: Mapping[str, str], negatives: int) -> None:
        """Read the sources' indexes and keys, 8 bytes a text.

        Args:
            place: below which they lie.
            folders: of each source, by its name.
            negatives: that every example shall have.
        """
        self._place = place
        self._folders = dict(folders)
        self._names = list(folders)
        self._negatives = negatives
        self.indexes = {name: place.child(folder).read_json(INDEX_FILE) for name, folder in folders.items()}
        self._part = lru_cache(maxsize=_OPEN_PARTS)(self._open_part)
        self.sizes = {name: int(sum(index["parts"])) for name, index in self.indexes.items()}
        self._starts = np.cumsum([0, *self.sizes.values()])
        self.keys = {name: self._keys_of(name) for name in folders}
        self.rights = RightAnswers(list(self.keys.values()))

    def first_row(self, name: str) -> int:
        """Number of a source's first row."""
        return int(self._starts[self._names.index(name)])

    def ids(self, rows: Sequence[int]) -> list[str]:
        """``source/id`` of rows."""
        return [f"{name}/{self._value(name, at, 'id')}" for name, at in map(self._find, rows)]

    def lengths(self, rows: Sequence[int]) -> list[list[int]]:
        """Tokens of every text of every row: query, positive, then exactly ``negatives`` negatives."""
        found = [self._value(name, at, "lengths") for name, at in map(self._find, rows)]
        return [[*own[:2], *self._repeated(own[2:])] for own in found]

    def groups(self, rows: Sequence[int]) -> list[Group]:
        """Token ids of rows; negatives short of the number wanted repeat in turn, as NeMo's trainer does."""
        groups = []
        for name, at in map(self._find, rows):
            documents = self._value(name, at, "documents")
            query, rights, negatives = (self._value(name, at, column, "keys") for column in KEY_SCHEMA.names)
            groups.append(
                Group(
                    f"{name}/{self._value(name, at, 'id')}",
                    self._value(name, at, "query"),
                    [documents[0], *self._repeated(documents[1:])],
                    query,
                    [rights[0], *self._repeated(negatives)],
                    list(dict.fromkeys([*rights, *self.rights.of(query)])),
                )
            )
        return groups

    def _repeated(self, negatives: list[Any]) -> list[Any]:
        return [negatives[number % len(negatives)] for number in range(self._negatives)]

    def _find(self, row: int) -> tuple[str, int]:
        """Source of a row, and its number there."""
        source = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._names[source], int(row) - int(self._starts[source])

    def _value(self, name: str, at: int, column: str, kind: str = "part") -> Any:
        return self._part(name, kind, at // PART_ROWS).column(column)[at % PART_ROWS].as_py()

    def _keys_of(self, name: str) -> pa.Table:
        parts = range(len(self.indexes[name]["parts"]))
        return pa.Table.from_batches([self._part(name, "keys", number) for number in parts], KEY_SCHEMA)

    def _open_part(self, name: str, kind: str, number: int) -> pa.RecordBatch:
        path = self._local(f"{self._folders[name]}/{kind}-{number:06d}.arrow")
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)

    def _local(self, name: str) -> Path:
        if self._place.is_local:
            return self._place.local / name
        key = hashlib.sha256(self._place.uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"embedloom-parts-{key}" / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Workers of a node may fetch one part at once; each renames a whole file over the other's.
            temporary = path.with_name(f"_tmp-{os.getpid()}-{path.name}")
            temporary.write_bytes(self._place.read_bytes(name))
            temporary.replace(path)
        return path
