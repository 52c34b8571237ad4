"""How many rows each generator writes of each family in each language, how many more after rejects, and the counts of what
was written.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pyarrow as pa

from embedloom.core.apportionment import largest_remainder
from embedloom.core.storage import Place
from embedloom.errors import StageError

# A second round asks for a little more than the seen acceptance says, so that few cells need a third.
_MARGIN = Fraction(11, 10)


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What a quota belongs to; ``generator`` is empty for rows that are extracted, not written."""

    family: str
    generator: str
    language: str

    @property
    def name(self) -> str:
        """As it stands in files and messages."""
        return "/".join(part for part in (self.family, self.generator, self.language) if part)


def shares(total: int, weights: Sequence[float], carried: Sequence[float] | None = None) -> list[int]:
    """Share ``total`` out by weight in whole numbers that sum to it (largest remainder, ties to the first).

    Args:
        total: what is shared out.
        weights: at least one above 0.
        carried: rows that earlier sharings still owe each, which may be negative.
    """
    whole = math.fsum(weights)
    owed = carried or [0.0] * len(weights)
    exact = [total * weight / whole + extra for weight, extra in zip(weights, owed, strict=True)]
    return largest_remainder(exact, total, [i for i, weight in enumerate(weights) if weight > 0])


def quotas(
    families: Mapping[str, int],
    generators: Mapping[str, float],
    languages: Mapping[str, Mapping[str, float]],
) -> dict[Cell, int]:
    """Rows per cell; the remainders of one family are made good by the next, so totals keep to the weights.

    Args:
        families: rows per family.
        generators: weight per generator.
        languages: weight per language, per family.

    Returns:
        Every cell with at least one row, in the order of the arguments. Each family's rows are exact, and over
        all families each generator is within one row of its share.
    """
    found: dict[Cell, int] = {}
    names = list(generators)
    owed = [0.0] * len(names)
    whole = math.fsum(generators.values())
    for family, rows in families.items():
        given = shares(rows, list(generators.values()), owed)
        owed = [o + rows * generators[n] / whole - g for o, n, g in zip(owed, names, given, strict=True)]
        by_language = languages[family]
        language_owed = [0.0] * len(by_language)
        language_whole = math.fsum(by_language.values())
        for name, count in zip(names, given, strict=True):
            split = shares(count, list(by_language.values()), language_owed)
            language_owed = [
                o + count * weight / language_whole - s
                for o, weight, s in zip(language_owed, by_language.values(), split, strict=True)
            ]
            found |= {
                Cell(family, name, language): part
                for language, part in zip(by_language, split, strict=True)
                if part
            }
    return found


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a cell stands: its quota, what was asked of its generator so far, what was kept."""

    quota: int
    attempts: int = 0  # prompts so far
    asked: int = 0  # rows those prompts asked for
    kept: int = 0

    @property
    def deficit(self) -> int:
        """Rows still missing."""
        return max(0, self.quota - self.kept)


def next_attempts(
    standing: Standing, rows_per_attempt: int, max_attempts_per_row: float, expected_acceptance: float = 1.0
) -> int:
    """Attempts of the next round: round 0 asks the quota, later ones the deficit divided by the acceptance seen.

    The acceptance is smoothed by one kept and one refused row, so that nothing kept does not mean infinitely many
    attempts. Never more than the limit leaves; 0 when the quota is met or the limit is reached.

    Args:
        standing: of the cell.
        rows_per_attempt: rows one attempt asks for.
        max_attempts_per_row: rows asked for per row of the quota, at most; may be infinite.
        expected_acceptance: what round 0 assumes.
    """
    if not standing.deficit:
        return 0
    if not standing.attempts:
        wanted = math.ceil(standing.quota / expected_acceptance / rows_per_attempt)
    else:
        acceptance = Fraction(standing.kept + 1, standing.asked + 2)
        wanted = math.ceil(standing.deficit * _MARGIN / acceptance / rows_per_attempt)
    limit = standing.quota * max_attempts_per_row / rows_per_attempt
    return max(0, wanted if limit == math.inf else min(wanted, math.ceil(limit) - standing.attempts))


def check_limits(
    cells: Mapping[Cell, Standing],
    rows_per_attempt: Mapping[str, int],
    limits: Mapping[str, float],
    reasons: Mapping[Cell, Mapping[str, int]],
    exhausted: Collection[str] = (),
) -> None:
    """Stop once a cell lacks rows and may ask no more.

    Args:
        cells: where each stands.
        rows_per_attempt: per family.
        limits: rows asked for per row of the quota, at most, per family.
        reasons: why rows were refused, per cell.
        exhausted: families whose documents have all been read.

    Raises:
        StageError: naming the generator, family, language, and why its rows were refused.
    """
    for cell, standing in cells.items():
        if not standing.deficit:
            continue
        limit = limits[cell.family]
        spent = cell.family in exhausted
        if spent or not next_attempts(standing, rows_per_attempt[cell.family], limit):
            why = ", ".join(
                f"{reason} {number:,}" for reason, number in sorted(reasons.get(cell, {}).items())
            )
            bound = (
                f"the corpus has no further document; lower the family's rows to {standing.kept:,}"
                if spent
                else f"synthesis.max_attempts_per_row allows to ask for {limit:g} times the rows"
            )
            raise StageError(
                f"synthesize: {cell.generator or 'no generator'}, family {cell.family}, language {cell.language}: "
                f"{standing.kept:,} of {standing.quota:,} rows kept of {standing.asked:,} asked for "
                f"(refused: {why or 'none'}); {bound}"
            )


# Counts per cell; each shard's stand in its file's own metadata, so that a resumed run sums them without reading rows.


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
