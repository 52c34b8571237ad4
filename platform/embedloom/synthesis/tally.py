"""Counts per cell; each shard's stand in its file's own metadata, so that a resumed run sums them without reading rows."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from embedloom.storage import Place
from embedloom.synthesis.quotas import Cell

_KEY = b"cells"
NUMBERS = ("attempts", "asked", "rows", "prompt_tokens", "output_tokens")


@dataclass(slots=True)
class CellTally:
    """What one cell's attempts came to.

    ``asked`` counts rows asked for; ``rows`` those that passed so far; the others stand in ``rejects`` by reason.
    """

    attempts: int = 0
    asked: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    rejects: Counter[str] = field(default_factory=Counter)

    def add(self, other: "CellTally") -> None:
        """Sum up."""
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.rejects.update(other.rejects)

    def refuse(self, reasons: Mapping[str, int]) -> None:
        """Move rows to the rejects."""
        self.rows -= sum(reasons.values())
        self.rejects.update(reasons)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        numbers: dict[str, Any] = {name: getattr(self, name) for name in NUMBERS}
        return {**numbers, "rejects": dict(sorted(self.rejects.items()))}


class Tally(dict[Cell, CellTally]):
    """Counts of many cells."""

    def of(self, cell: Cell) -> CellTally:
        """A cell's counts, zeros at first."""
        return self.setdefault(cell, CellTally())

    def merge(self, other: "Tally") -> None:
        """Sum up cell by cell."""
        for cell, counts in other.items():
            self.of(cell).add(counts)

    def plain(self) -> list[dict[str, Any]]:
        """As JSON: one object a cell."""
        return [
            {"family": c.family, "generator": c.generator, "language": c.language, **counts.plain()}
            for c, counts in sorted(self.items())
        ]

    @classmethod
    def read(cls, cells: Iterable[Mapping[str, Any]]) -> "Tally":
        """The inverse of ``plain``."""
        found = cls()
        for one in cells:
            cell = Cell(one["family"], one["generator"], one["language"])
            numbers = {name: int(one[name]) for name in NUMBERS}
            found[cell] = CellTally(**numbers, rejects=Counter(one["rejects"]))
        return found

    def stamp(self, table: pa.Table) -> pa.Table:
        """The table with these counts in its metadata."""
        return table.replace_schema_metadata({_KEY: json.dumps(self.plain()).encode()})


def stamped(place: Place, part: str) -> Tally:
    """The counts in a part's footer."""
    schema, _ = place.parquet_footer(part)
    return Tally.read(json.loads(schema.metadata[_KEY]))
