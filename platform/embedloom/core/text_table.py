"""Texts by id, on disk: a memory-mapped file and 16 bytes of memory a text."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.core.text import hash64
from embedloom.errors import DataError

_BATCH_ROWS = 1024
_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])


class TextTable:
    """Texts found by id, or by row number."""

    def __init__(self, path: Path, keys: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._rows: np.ndarray[Any, np.dtype[np.int64]] = np.argsort(keys, kind="stable")
        self._keys = keys[self._rows]
        self._batches: dict[int, pa.RecordBatch] = {}

    @classmethod
    def build(cls, folder: Path, texts: Iterable[tuple[str, str]]) -> "TextTable":
        """Write (id, text) pairs to ``folder/texts.arrow`` and open it.

        Raises:
            DataError: an id that comes twice with different texts.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "texts.arrow"
        keys: list[int] = []
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for batch in _batches(texts):
                keys += [hash64(row[0]) for row in batch]
                ids, bodies = zip(*batch, strict=True)
                writer.write_batch(pa.record_batch([pa.array(ids), pa.array(bodies)], schema=_SCHEMA))
        table = cls(path, np.asarray(keys, dtype=np.uint64))
        table._check_doubles()
        return table

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._keys)

    def get(self, text_id: str) -> str | None:
        """The text of an id, or None."""
        key = np.uint64(hash64(text_id))
        place = int(np.searchsorted(self._keys, key))
        while place < len(self._keys) and self._keys[place] == key:
            found, text = self._at(int(self._rows[place]))
            if found == text_id:
                return text
            place += 1
        return None

    def _at(self, row: int) -> tuple[str, str]:
        number = row // _BATCH_ROWS
        batch = self._batches.get(number)
        if batch is None:  # a view into the mapped file, so keeping it costs no copy
            batch = self._batches[number] = self._file.get_batch(number)
        offset = row - number * _BATCH_ROWS
        return str(batch.column(0)[offset]), str(batch.column(1)[offset])

    def _check_doubles(self) -> None:
        for place in np.flatnonzero(self._keys[1:] == self._keys[:-1]):
            (one, text), (other, second) = (self._at(int(self._rows[place + step])) for step in (0, 1))
            if one == other and text != second:
                raise DataError(f"corpus: id {one!r} stands for two different texts; ids must be unique")


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    for pair in texts:
        batch.append(pair)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
