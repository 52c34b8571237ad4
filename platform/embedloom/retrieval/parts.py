"""The Parquet files of a folder, read again and again without holding more than a given amount of memory."""

from itertools import accumulate

import pyarrow as pa

from embedloom.engines.shards import parquet_rows
from embedloom.storage import Place


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
