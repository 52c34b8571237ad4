"""Rows that other rows, the teacher or the judge refuse: small tables beside a round's rows, merged when read.

A pass over a round writes any number of files of REFUSAL_SCHEMA into a folder of its own. Rows are never
rewritten: a row survives if no file names it. When a pass is done its refusals are sorted by part, some files together, so
that whoever works on some parts reads theirs: each file by each would grow with the square of the parts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from embedloom.compute.shards import run_tasks
from embedloom.core.storage import Place
from embedloom.synthesis.quotas import Cell, Tally, stamped

ROWS_FOLDER = "rows"

REFUSAL_SCHEMA = pa.schema(
    [("part", pa.string()), ("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
_ROWS_PER_TASK = 16_384
_SORTED, _INDEX = "-by-part", "-by-part.json"  # behind the name of a pass's folder


@dataclass(frozen=True, slots=True)
class Round:
    """One finished or running round of a phase.

    ``passes`` are folders of refusals below it, in order; ``parts_together`` is what one task works on.
    """

    folder: str
    passes: tuple[str, ...] = ()
    parts_together: int = 1

    def parts(self, place: Place) -> list[str]:
        """File names of its rows."""
        return [PurePosixPath(name).name for name in place.names(f"{self.folder}/{ROWS_FOLDER}", ".parquet")]

    def groups(self, place: Place) -> list[tuple[str, ...]]:
        """Its parts, as many together as one task works on."""
        parts = self.parts(place)
        return [tuple(parts[n : n + self.parts_together]) for n in range(0, len(parts), self.parts_together)]

    def rows(self, place: Place, part: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a part."""
        return place.read_table(f"{self.folder}/{ROWS_FOLDER}/{part}", list(columns) if columns else None)


def parts_together(shard_rows: int) -> int:
    """Parts that one task works on, so that it holds about as many rows whatever a shard holds."""
    return max(1, _ROWS_PER_TASK // shard_rows)


def refusal_table(rows: Iterable[dict[str, object]]) -> pa.Table:
    """Refusals as a table."""
    return pa.Table.from_pylist(list(rows), schema=REFUSAL_SCHEMA)


_TOGETHER = (
    64  # files of a pass that are sorted into one; at most eight of duplicates, which may be of any part
)


def sort_refusals(stage: str, place: Place, one: Round, folder: str) -> None:
    """Sort the refusals of a finished pass by part, in tasks, and say in an index which file has which parts."""
    index = f"{one.folder}/{folder}{_INDEX}"
    names = place.names(f"{one.folder}/{folder}", ".parquet")
    if place.exists(index) or not names:
        return
    chunks = [tuple(names[start : start + _TOGETHER]) for start in range(0, len(names), _TOGETHER)]
    found = run_tasks(stage, _sort_chunk, list(enumerate(chunks)), f"{one.folder}/{folder}{_SORTED}", place)
    place.write_json(index, {"files": [file for file in found if file]})


def _sort_chunk(item: tuple[int, tuple[str, ...]], folder: str, place: Place) -> list[str]:
    """Write the refusals of some files by part; (name, first part, last part), nothing where there are none."""
    number, names = item
    table = pa.concat_tables([place.read_table(name) for name in names]).sort_by("part")
    if not table.num_rows:
        return []
    name = f"{folder}/{number:06d}.parquet"
    place.write_table(name, table)
    return [name, table.column("part")[0].as_py(), table.column("part")[-1].as_py()]


def _files_with(place: Place, one: Round, folder: str, parts: Sequence[str]) -> list[str]:
    """Files of a pass that may name rows of some parts; all, where they have not been sorted."""
    index = f"{one.folder}/{folder}{_INDEX}"
    if not place.exists(index):
        return place.names(f"{one.folder}/{folder}", ".parquet")
    first, last = min(parts), max(parts)
    return [name for name, low, high in place.read_json(index)["files"] if low <= last and first <= high]


def refusals_of(place: Place, one: Round, parts: Sequence[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """Part -> row id -> (reason, detail): of several passes the first, within it the smallest."""
    found: dict[str, dict[str, tuple[str, str]]] = {part: {} for part in parts}
    wanted = pc.field("part").isin(list(parts))
    for folder in one.passes:
        here: dict[str, dict[str, tuple[str, str]]] = {part: {} for part in parts}
        for name in _files_with(place, one, folder, parts) if parts else ():
            for row in place.read_table(name, where=wanted).to_pylist():
                verdict = (row["reason"], row["detail"])
                known = here[row["part"]].get(row["id"], verdict)
                here[row["part"]][row["id"]] = min(known, verdict)
        for part, verdicts in here.items():
            found[part] = {**verdicts, **found[part]}
    return found


def surviving(rows: pa.Table, refused: Iterable[str]) -> pa.Table:
    """The rows that are not refused."""
    named = pc.is_in(rows.column("id"), value_set=pa.array(list(refused), pa.string()))
    return rows.filter(pc.invert(named))


def count_parts(parts: tuple[str, ...], one: Round, place: Place) -> Tally:
    """Counts per cell of some parts, refusals included; runs in a task."""
    tally = Tally()
    refused = refusals_of(place, one, parts)
    for part in parts:
        tally.merge(stamped(place, f"{one.folder}/{ROWS_FOLDER}/{part}"))
        if not refused[part]:
            continue
        rows = one.rows(place, part, ["id", "family", "generator", "lang"]).to_pylist()
        for row in rows:
            if row["id"] in refused[part]:
                cell = Cell(row["family"], row["generator"] or "", row["lang"])
                tally.of(cell).refuse({refused[part][row["id"]][0]: 1})
    return tally
