"""Writes rows of one kind as numbered Parquet parts of a fixed size, a part at a time."""

from embedloom.engines.shards import PART_PATTERN
from embedloom.records import table_from_rows
from embedloom.storage import Place

PART_ROWS = 10_000


class PartWriter:
    """Collects rows of a table kind for one folder; full parts are written at once, the rest by ``close``."""

    def __init__(self, place: Place, folder: str, kind: str, part_rows: int = PART_ROWS) -> None:
        self._place = place
        self._folder = folder
        self._kind = kind
        self._part_rows = part_rows
        self._rows: list[dict[str, object]] = []
        self._parts = 0
        self.count = 0

    def add(self, row: dict[str, object]) -> None:
        """Take one row."""
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == self._part_rows:
            self.close()

    def close(self) -> None:
        """Write what is left; no rows, no file."""
        if not self._rows:
            return
        name = f"{self._folder}/{PART_PATTERN.format(self._parts)}"
        self._place.write_table(name, table_from_rows(self._kind, self._rows))
        self._parts += 1
        self._rows = []
