"""The texts behind document ids, and the Parquet files they stand in, without holding the corpus in memory."""

import itertools
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.compute.shards import parquet_rows
from embedloom.core.ids import IdIndex
from embedloom.core.prompting import document_text
from embedloom.core.storage import Place
from embedloom.core.text import folded, hash64, hashes64
from embedloom.errors import DataError
from embedloom.retrieval.search import Positions


class PartReader:
    """Arrow tables of a folder's files by number; kept in memory while they fit, else read again each time."""

    def __init__(self, place: Place, folder: str, columns: list[str], memory_bytes: int) -> None:
        files = parquet_rows(place, folder)
        self.place = place
        self.folder = folder
        self.names = [name for name, _ in files]
        self.rows = [rows for _, rows in files]
        self.starts = list(accumulate(self.rows, initial=0))[:-1]
        self._columns = columns
        self._room = memory_bytes
        self._kept: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        """Number of files."""
        return len(self.names)

    def table(self, number: int) -> pa.Table:
        """The asked columns (those the file has) of one file."""
        if number in self._kept:
            return self._kept[number]
        schema, _ = self.place.parquet_footer(self.names[number])
        table = self.place.read_table(
            self.names[number], [name for name in self._columns if name in schema.names]
        )
        if table.nbytes <= self._room:
            self._kept[number] = table
            self._room -= table.nbytes
        return table


MEMORY_BYTES = 2**30  # of texts one actor keeps; files beyond it are read again


class DocumentTexts:
    """Texts of documents folders at positions, which are ranks of ids."""

    def __init__(self, folders: list[tuple[Place, str]], memory_bytes: int = MEMORY_BYTES) -> None:
        """Read the folders once to learn where each document is and which share a text."""
        room = memory_bytes // max(1, len(folders))
        self._readers = [
            PartReader(place, folder, ["id", "title", "text"], room) for place, folder in folders
        ]
        self._tables = [(reader, number) for reader in self._readers for number in range(len(reader))]
        ids, files, rows, digests = [], [], [], []
        for file, (reader, number) in enumerate(self._tables):
            table = reader.table(number)
            ids.append(table.column("id").combine_chunks().cast(pa.large_string()))
            files.append(np.full(table.num_rows, file, dtype=np.int32))
            rows.append(np.arange(table.num_rows, dtype=np.int64))
            # 64 bits of a hash: two texts of ten million share one by accident with a chance of 3 in a million,
            # and then one document is no negative of the other's queries.
            digests.append(hashes64(folded(text) for text in _texts(table)))
        unsorted = pa.concat_arrays(ids) if ids else pa.array([], pa.large_string())
        order = pc.sort_indices(unsorted).to_numpy()
        self.ids = unsorted.take(pa.array(order))
        self._index = IdIndex.of(self.ids)
        self._file = np.concatenate([np.empty(0, np.int32), *files])[order]
        self._row = np.concatenate([np.empty(0, np.int64), *rows])[order]
        sorted_digests = np.concatenate([np.empty(0, np.uint64), *digests])[order]
        self._digests, first, inverse = np.unique(sorted_digests, return_index=True, return_inverse=True)
        self._first = first.astype(np.int64)
        self._same = self._first[inverse]

    def find(self, ids: Iterable[str]) -> Positions:
        """Position of each id, -1 where no document has it."""
        return self._index.find(list(ids))

    def find_lists(self, lists: Sequence[Sequence[str]]) -> list[Positions]:
        """``find`` of every list, in one look-up."""
        found = self.find(itertools.chain.from_iterable(lists))
        return np.split(found, np.cumsum([len(ids) for ids in lists])[:-1]) if lists else []

    def same_text(self, positions: Positions) -> Positions:
        """The smallest position with the same text, case and blanks aside, for each of these.

        Raises:
            DataError: a position is -1, so an id came from another corpus.
        """
        if (positions < 0).any():
            raise DataError(
                "mining: a candidate is no document of the corpus; mine again after changing the corpus"
            )
        return np.asarray(self._same[positions])

    def position_of(self, text: str) -> int | None:
        """The smallest position with this text, case and blanks aside; None if no document has it."""
        digest = np.uint64(hash64(folded(text)))
        slot = int(np.searchsorted(self._digests, digest))
        found = slot < len(self._digests) and self._digests[slot] == digest
        return int(self._first[slot]) if found else None

    def texts(self, positions: Iterable[int]) -> dict[int, str]:
        """Model texts at these positions; reads each file at most once."""
        wanted: Positions = np.unique(np.fromiter(positions, dtype=np.int64))
        files = self._file[wanted]
        found: dict[int, str] = {}
        for file in np.unique(files):
            here = wanted[files == file]
            reader, number = self._tables[int(file)]
            table = reader.table(number).take(pa.array(self._row[here]))
            found.update(zip(here.tolist(), _texts(table), strict=True))
        return found


class ChunkedDocuments:
    """Which documents are pieces of one: a source judged them together, so none is a negative of what another answers."""

    def __init__(self, texts: DocumentTexts, place: Place) -> None:
        """Read the ``chunks`` table of a corpus; corpora without one have whole documents only."""
        tables = [place.read_table(name, ["id", "document_id"]) for name in place.names("chunks", ".parquet")]
        ids = [name for table in tables for name in table.column("id").to_pylist()]
        owners = [name for table in tables for name in table.column("document_id").to_pylist()]
        positions = texts.find(ids).tolist()
        self._pieces: dict[str, list[int]] = {}
        self._owner: dict[int, str] = {}
        for position, owner in zip(positions, owners, strict=True):
            if position >= 0:  # a piece of another split
                self._pieces.setdefault(owner, []).append(position)
                self._owner[position] = owner

    def pieces(self, positions: Iterable[int]) -> set[int]:
        """Positions of all pieces of the documents that these are pieces of."""
        owners = {self._owner[position] for position in positions if position in self._owner}
        return {position for owner in owners for position in self._pieces[owner]}


def _texts(table: pa.Table) -> list[str]:
    titles: list[Any] = (
        table.column("title").to_pylist() if "title" in table.column_names else [None] * table.num_rows
    )
    return [
        document_text(title, text)
        for title, text in zip(titles, table.column("text").to_pylist(), strict=True)
    ]
