"""From the rounds' rows to the artefact's: the first rows of each cell up to its quota, and everything refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.engines.tasks import run_tasks
from embedloom.records import SCHEMAS, check_table, table_from_rows
from embedloom.storage import Place
from embedloom.synthesis.quotas import Cell
from embedloom.synthesis.refusals import Round, refusals_of, surviving
from embedloom.synthesis.row_maker import REJECTS_FOLDER

PAIRS_FOLDER = "pairs"
_CELL = ["family", "generator", "lang"]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a round and the number its rows get in the artefact."""

    round: Round
    name: str
    number: int

    @property
    def file(self) -> str:
        """Name in the artefact's folders."""
        return f"part-{self.number:06d}.parquet"


def numbered_parts(place: Place, rounds: Sequence[Round], first: int = 0) -> list[Part]:
    """All parts of some rounds, in order."""
    named = [(one, name) for one in rounds for name in one.parts(place)]
    return [Part(one, name, first + number) for number, (one, name) in enumerate(named)]


def last_places(
    stage: str, place: Place, rounds: Sequence[Round], quotas: Mapping[Cell, int], kept: Mapping[Cell, int]
) -> dict[Cell, tuple[int, int]]:
    """(ordinal, number) of the last row that each cell with too many rows keeps."""
    crowded = [cell for cell, quota in quotas.items() if kept[cell] > quota]
    if not crowded:
        return {}
    wanted = {cell: quotas[cell] for cell in crowded}
    (found,) = run_tasks(stage, _last_places, [wanted], tuple(rounds), place, cpus=1.0)
    return found


def _last_places(
    wanted: Mapping[Cell, int], rounds: Sequence[Round], place: Place
) -> dict[Cell, tuple[int, int]]:
    """Sixteen bytes a row of the crowded cells; runs in a task."""
    places: dict[Cell, list[Any]] = {cell: [] for cell in wanted}
    for one in rounds:
        for group in one.groups(place):
            refused = refusals_of(place, one, group)
            for part in group:
                rows = surviving(one.rows(place, part, ["id", *_CELL, "ordinal", "number"]), refused[part])
                for cell, table in by_cell(rows).items():
                    if cell in places:
                        columns = [table.column(name).to_numpy() for name in ("ordinal", "number")]
                        places[cell].append(np.stack(columns, axis=1))
    last: dict[Cell, tuple[int, int]] = {}
    for cell, found in places.items():
        rows_of = np.concatenate(found)
        ordered = rows_of[np.lexsort((rows_of[:, 1], rows_of[:, 0]))]
        ordinal, number = ordered[wanted[cell] - 1]
        last[cell] = (int(ordinal), int(number))
    return last


def by_cell(rows: pa.Table) -> dict[Cell, pa.Table]:
    """Rows by cell."""
    cells = [
        Cell(family, generator or "", language)
        for family, generator, language in zip(
            *(rows.column(name).to_pylist() for name in _CELL), strict=True
        )
    ]
    return {cell: rows.filter(pa.array([one == cell for one in cells], pa.bool_())) for cell in set(cells)}


def write_final(
    stage: str,
    place: Place,
    parts: Sequence[Part],
    last: Mapping[Cell, tuple[int, int]],
    folder: str = PAIRS_FOLDER,
) -> None:
    """Write ``pairs/`` (or another folder) and ``rejects/`` of the artefact, part by part; finished ones are kept."""
    done = set(place.names(folder, ".parquet"))
    todo = [part for part in parts if f"{folder}/{part.file}" not in done]
    step = todo[0].round.parts_together if todo else 1
    groups = [todo[start : start + step] for start in range(0, len(todo), step)]
    for _ in run_tasks(stage, _write_parts, groups, dict(last), folder, place):
        pass


def _write_parts(
    parts: Sequence[Part], last: Mapping[Cell, tuple[int, int]], folder: str, place: Place
) -> None:
    for one in {part.round.folder: part.round for part in parts}.values():
        here = [part for part in parts if part.round == one]
        refused = refusals_of(place, one, [part.name for part in here])
        for part in here:
            _write_part(part, refused[part.name], last, folder, place)


def _write_part(
    part: Part,
    refused: Mapping[str, tuple[str, str]],
    last: Mapping[Cell, tuple[int, int]],
    folder: str,
    place: Place,
) -> None:
    rows = part.round.rows(place, part.name)
    kept = surviving(rows, refused)
    kept = kept.filter(pa.array([_within(row, last) for row in kept.select([*_CELL, "ordinal", "number"]).to_pylist()], pa.bool_()))  # fmt: skip
    rejects = place.read_table(f"{part.round.folder}/{REJECTS_FOLDER}/{part.name}").to_pylist()
    rejects += [
        {"id": i, "reason": reason, "detail": detail} for i, (reason, detail) in sorted(refused.items())
    ]
    place.write_table(f"{REJECTS_FOLDER}/{part.file}", table_from_rows("rejects", rejects))
    if folder == PAIRS_FOLDER:
        kept = check_table(
            "pairs", kept.select(list(SCHEMAS["pairs"].columns)), f"{part.round.folder}/{part.name}"
        )
    place.write_table(f"{folder}/{part.file}", kept.replace_schema_metadata(None))


def _within(row: Mapping[str, Any], last: Mapping[Cell, tuple[int, int]]) -> bool:
    bound = last.get(Cell(row["family"], row["generator"] or "", row["lang"]))
    return bound is None or (row["ordinal"], row["number"]) <= bound
