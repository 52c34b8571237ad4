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

_OPEN_PARTS = 2048  # mapped at a time; each is a handful of objects, its pages belong to the system


class ExampleStore:
    """Rows numbered through all sources, in the order in which they are named."""

    def __init__(self, place: Place, folders: Mapping[str, str], negatives: int) -> None:
        """Read the sources' indexes.

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
        self.sizes = {name: int(sum(index["parts"])) for name, index in self.indexes.items()}
        self._starts = np.cumsum([0, *self.sizes.values()])
        self._part = lru_cache(maxsize=_OPEN_PARTS)(self._open_part)

    def first_row(self, name: str) -> int:
        """Number of a source's first row."""
        return int(self._starts[self._names.index(name)])

    def ids(self, rows: Sequence[int]) -> list[str]:
        """``source/id`` of rows."""
        return [f"{name}/{batch.column('id')[at].as_py()}" for name, batch, at in map(self._find, rows)]

    def lengths(self, rows: Sequence[int]) -> list[list[int]]:
        """Tokens of every text of every row: query, positive, then exactly ``negatives`` negatives."""
        return [
            [*(own := batch.column("lengths")[at].as_py())[:2], *self._repeated(own[2:])]
            for _, batch, at in map(self._find, rows)
        ]

    def groups(self, rows: Sequence[int]) -> list[Group]:
        """Token ids of rows; negatives short of the number wanted repeat in turn, as NeMo's trainer does."""
        groups = []
        for name, batch, at in map(self._find, rows):
            documents = batch.column("documents")[at].as_py()
            groups.append(
                Group(
                    f"{name}/{batch.column('id')[at].as_py()}",
                    batch.column("query")[at].as_py(),
                    [documents[0], *self._repeated(documents[1:])],
                )
            )
        return groups

    def _repeated(self, negatives: list[Any]) -> list[Any]:
        return [negatives[number % len(negatives)] for number in range(self._negatives)]

    def _find(self, row: int) -> tuple[str, pa.RecordBatch, int]:
        source = int(np.searchsorted(self._starts, row, side="right")) - 1
        inside = int(row) - int(self._starts[source])
        name = self._names[source]
        return name, self._part(name, inside // PART_ROWS), inside % PART_ROWS

    def _open_part(self, name: str, number: int) -> pa.RecordBatch:
        path = self._local(f"{self._folders[name]}/part-{number:06d}.arrow")
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
