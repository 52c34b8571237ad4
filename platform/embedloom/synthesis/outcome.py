"""What the stage says of its rows: counts for the manifest, per generator, family, language and reason."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.storage import Place
from embedloom.synthesis.final import Part
from embedloom.synthesis.prompts_used import UsedPrompts
from embedloom.synthesis.quotas import Cell
from embedloom.synthesis.refusals import Round
from embedloom.synthesis.tally import Tally

_SPEED_FOLDER = "steps/speed"


@dataclass(frozen=True)
class Written:
    """A finished phase and the files of its rows."""

    phase: str
    quotas: Mapping[Cell, int]
    tally: Tally
    rounds: list[Round]
    parts: list[Part]

    def cells(self) -> list[dict[str, Any]]:
        """Counts of every cell; rows above the quota are surplus, not kept."""
        found = []
        for one in self.tally.plain():
            cell = Cell(one["family"], one["generator"], one["language"])
            quota = self.quotas[cell]
            kept = min(one["rows"], quota)
            found.append({**one, "quota": quota, "rows": kept, "surplus": one["rows"] - kept})
        return found


def commit(
    out: ArtefactWriter,
    prompts: UsedPrompts,
    tasks: list[Written],
    rows: list[Written],
    diversity: dict[str, Any],
    scratch: str,
) -> Artefact:
    """Write the manifest of these phases, step one and those that wrote rows, and delete the folder of their work."""
    cells = [cell for one in rows for cell in one.cells()]
    task_cells = [cell for one in tasks for cell in one.cells()]
    details = {
        "prompts": prompts.state(),
        "cells": cells,
        "task_cells": task_cells,
        "rounds": {one.phase: len(one.rounds) for one in [*tasks, *rows]},
        "engines": _speeds(out.place),
        "diversity": diversity,
    }
    return out.commit(totals(cells, task_cells), details, scratch=(scratch,))


def totals(cells: list[dict[str, Any]], task_cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the stage; tokens include those of step one, rows do not."""
    both = [*cells, *task_cells]
    found: dict[str, Any] = {
        name: sum(cell[name] for cell in cells) for name in ("rows", "attempts", "asked", "surplus")
    }
    found["tasks"] = sum(cell["rows"] for cell in task_cells)
    for name in ("prompt_tokens", "output_tokens"):
        found[name] = sum(cell[name] for cell in both)
    found["tokens"] = found["prompt_tokens"] + found["output_tokens"]
    found["rejects"] = _summed(both, lambda cell: cell["rejects"])
    for name, key in (("generators", "generator"), ("families", "family"), ("languages", "language")):
        found[name] = _summed(cells, lambda cell, key=key: {cell[key]: cell["rows"]} if cell[key] else {})
    return found


def _summed(cells: Iterable[dict[str, Any]], counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for cell in cells:
        total.update(counts(cell))
    return dict(sorted(total.items()))


def _speeds(place: Place) -> dict[str, dict[str, float]]:
    """Output tokens and wall seconds per generator, over the runs that went to their end, engine starts included."""
    found: dict[str, dict[str, float]] = {}
    for name in place.names(_SPEED_FOLDER, ".json"):
        run = place.read_json(name)
        one = found.setdefault(run["generator"], {"output_tokens": 0, "seconds": 0.0})
        one["output_tokens"] += run["output_tokens"]
        one["seconds"] += run["seconds"]
    for one in found.values():
        one["seconds"] = round(one["seconds"], 3)
        one["tokens_per_second"] = round(one["output_tokens"] / one["seconds"], 1) if one["seconds"] else 0.0
    return found
