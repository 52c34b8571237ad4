"""Rows of a finished artefact as the first round of one that asks for other numbers of rows: what was paid for counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from embedloom.compute.shards import PART_PATTERN, run_tasks
from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import Artefact
from embedloom.core.storage import Place
from embedloom.synthesis.attempts import ATTEMPTS_FILE
from embedloom.synthesis.duplicates import exact_key, signature
from embedloom.synthesis.refusals import ROWS_FOLDER
from embedloom.synthesis.rows import REJECTS_FOLDER, STEP_SCHEMA

_ROWS_OF_A_PART = 2**32  # far more than one has, so that numbers are in the order of the parts
_FIRST = -1  # ordinal of a carried row: it comes before all that are asked now
_COUNTS = ("attempts", "asked", "rows", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Carried:
    """What a phase takes over.

    Attributes:
        previous: place of the finished artefact.
        rows: its folder of them.
        families: key by generator and prompt hash; None where rows say their family (tasks).
        config: the section.
        place: of the artefact that is built.
        folder: of the round to be written there.
    """

    previous: Place
    rows: str
    families: Mapping[tuple[str, str], str] | None
    config: SynthesisConfig
    place: Place
    folder: str


def families_by_prompt(previous: Artefact) -> dict[tuple[str, str], str] | None:
    """(generator, prompt hash) -> key of the family whose rows carry them; None where two families share a prompt."""
    found: dict[tuple[str, str], str] = {}
    for generator, prompts in previous.manifest["details"]["prompts"]["rows"].items():
        for key, prompt_hash in prompts.items():
            if (generator, prompt_hash) in found:
                return None
            found[generator, prompt_hash] = key
    return found


def can_carry(previous: Artefact) -> bool:
    """Whether a finished artefact says all that is needed; those of earlier versions do not.

    Nor do those with questions read out of documents, which nobody was paid for.
    """
    details = previous.manifest["details"]
    extracted = any(not cell["generator"] for cell in details["cells"])
    return "phases" in details and not extracted and families_by_prompt(previous) is not None


def carry_round(
    stage: str,
    previous: Artefact,
    name: str,
    families: Sequence[str],
    config: SynthesisConfig,
    place: Place,
    files: tuple[str, str],
) -> None:
    """Write the first round of a phase from a finished artefact; what is there already is kept.

    Args:
        stage: named in errors.
        previous: the finished artefact.
        name: of the phase.
        families: keys whose rows are taken over.
        config: the section.
        place: of the artefact that is built.
        files: names of the round's plan and counts.
    """
    plan_file, counts_file = files
    folder = f"steps/{name}/round-000"
    if place.exists(f"{folder}/{plan_file}"):
        return
    tasks = name == "tasks"
    details = previous.manifest["details"]
    cells = [one for one in details["task_cells" if tasks else "cells"] if one["family"] in families]
    phase = details["phases"][name]
    first, stop = phase["parts"]
    known = None if tasks else families_by_prompt(previous)
    job = Carried(previous.place, "tasks" if tasks else "pairs", known, config, place, folder)
    for _ in run_tasks(stage, _carry_part, list(range(first, stop)), job):
        pass
    attempts = {"attempts": {}, "offsets": phase["offsets"], "exhausted": []}
    place.write_json(f"{folder}/{ATTEMPTS_FILE}", attempts)
    place.write_json(f"{folder}/{counts_file}", {"cells": [_counts(one) for one in cells]})
    # Last: a round without a plan has not begun.
    place.write_json(f"{folder}/{plan_file}", {"stretches": [_stretch(one) for one in cells]})


def carry_accounts(previous: Artefact, place: Place, money: Mapping[str, str]) -> None:
    """Write what the finished artefact took: seconds and tokens of engines, money of endpoints.

    Args:
        previous: the finished artefact.
        place: of the artefact that is built.
        money: folder of an endpoint's account, by what the manifest calls it.
    """
    details = previous.manifest["details"]
    for number, (generator, speed) in enumerate(details["engines"].items()):
        kept = {"generator": generator, "output_tokens": speed["output_tokens"], "seconds": speed["seconds"]}
        place.write_json(f"steps/speed/previous-{number}.json", kept)
    for name, spent in details.get("money", {}).items():
        if name in money:
            place.write_json(f"{money[name]}/previous.json", {"claimed": spent})


def _stretch(cell: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: cell[key] for key in ("family", "generator", "language")}
    return {**named, "start": 0, "stop": cell["attempts"]}


def _counts(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Rows above the former quota were not kept, so they count as never asked for."""
    named = {key: cell[key] for key in ("family", "generator", "language", "rejects", *_COUNTS)}
    return {**named, "asked": cell["asked"] - cell["surplus"]}


def _carry_part(number: int, job: Carried) -> None:
    """Rows with what they are compared by, and the refusals that stand beside them."""
    part = PART_PATTERN.format(number)
    table = job.previous.read_table(f"{job.rows}/{part}")
    if job.families is not None:
        table = _step_rows(table, job.families, job.config, number)
    rejects = job.previous.read_table(f"{REJECTS_FOLDER}/{part}")
    job.place.write_table(f"{job.folder}/{REJECTS_FOLDER}/{part}", rejects)
    job.place.write_table(f"{job.folder}/{ROWS_FOLDER}/{part}", table)


def _step_rows(
    table: pa.Table, families: Mapping[tuple[str, str], str], config: SynthesisConfig, part: int
) -> pa.Table:
    quality = config.quality
    rows = [
        {
            **row,
            "family": families[row["generator"], row["prompt_hash"]],
            "ordinal": _FIRST,
            "number": part * _ROWS_OF_A_PART + number,
            "exact_key": exact_key(row) if quality.exact_duplicates else None,
            "signature": signature(row) if quality.near_duplicates is not None else None,
            "document_text": None,
        }
        for number, row in enumerate(table.to_pylist())
    ]
    return pa.Table.from_pylist(rows, schema=STEP_SCHEMA)
