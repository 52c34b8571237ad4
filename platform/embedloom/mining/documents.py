"""The texts behind the document vectors, by position, without holding the corpus in memory."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.errors import DataError
from embedloom.instructions import document_text
from embedloom.retrieval.exact import Positions
from embedloom.retrieval.parts import PartReader
from embedloom.retrieval.vectors import VectorStore
from embedloom.storage import Place

MEMORY_BYTES = 2**30  # of texts one actor keeps; files beyond it are read again


class DocumentTexts:
    """Texts of a documents folder at the positions (ranks of ids) of their vectors."""

    def __init__(
        self, place: Place, folder: str, vectors: VectorStore, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        """Read the folder once to learn where each document is and which share a text.

        Raises:
            DataError: a document without a vector, or a vector without a document.
        """
        self._parts = PartReader(place, folder, ["id", "title", "text"], memory_bytes)
        self._file = np.full(len(vectors), -1, dtype=np.int32)
        self._row = np.zeros(len(vectors), dtype=np.int64)
        # 64 bits of a hash: two texts of ten million share one by accident with a chance of 3 in a million, and
        # then one document is no negative of the other's queries.
        digests = np.zeros(len(vectors), dtype=np.int64)
        for number in range(len(self._parts)):
            table = self._parts.table(number)
            positions = vectors.find(table.column("id").to_pylist())
            if (positions < 0).any():
                stranger = table.column("id")[int(np.flatnonzero(positions < 0)[0])].as_py()
                raise DataError(
                    f"{place.uri}/{self._parts.names[number]}: document {stranger!r} has no vector in {vectors.source}"
                )
            self._file[positions] = number
            self._row[positions] = np.arange(len(positions))
            digests[positions] = [text_digest(text) for text in _texts(table)]
        if (self._file < 0).any():
            stranger = vectors.names(np.flatnonzero(self._file < 0)[:1])[0]
            raise DataError(
                f"{vectors.source}: vector {stranger!r} belongs to no document of {place.uri}/{folder}"
            )
        self._digests, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        self._first = first.astype(np.int64)
        self._same = self._first[inverse]

    def same_text(self, positions: Positions) -> Positions:
        """The smallest position with the same text, for each of these: equal exactly for equal texts."""
        return self._same[positions]

    def position_of(self, text: str) -> int | None:
        """The smallest position with this text, None if no document has it."""
        slot = int(np.searchsorted(self._digests, text_digest(text)))
        found = slot < len(self._digests) and self._digests[slot] == text_digest(text)
        return int(self._first[slot]) if found else None

    def texts(self, positions: Iterable[int]) -> dict[int, str]:
        """Model texts at these positions; reads each file at most once."""
        wanted: Positions = np.unique(np.fromiter(positions, dtype=np.int64))
        files = self._file[wanted]
        found: dict[int, str] = {}
        for number in np.unique(files):
            here = wanted[files == number]
            table = self._parts.table(int(number)).take(pa.array(self._row[here]))
            found.update(zip(here.tolist(), _texts(table), strict=True))
        return found


def text_digest(text: str) -> int:
    """Signed 64-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _texts(table: pa.Table) -> list[str]:
    titles: list[Any] = (
        table.column("title").to_pylist() if "title" in table.column_names else [None] * table.num_rows
    )
    return [
        document_text(title, text)
        for title, text in zip(titles, table.column("text").to_pylist(), strict=True)
    ]
