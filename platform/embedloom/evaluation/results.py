"""Results on disk: mteb's own tree, so any mteb tool reads them, and ``scores.json`` drawn from it.

    results/<organisation>__<model>/<revision>/{<task>.json, model_meta.json, run_settings.jsonl}
    items/<group>/<model>/<task>/<subset>.parquet   what each query or text contributed
    units/<group>/<model>/<task>[/<subset>].json    tokens, seconds and sizes, which mteb's files have no place for

Only the driver writes, each file by rename. A task's result file grows by subset, as mteb's own cache does; its
``units/…/<task>.json`` comes last, so that its presence means that the whole task is done.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mteb.results import TaskResult

from embedloom.core.schemas import ScoreTable
from embedloom.core.storage import Place
from embedloom.encoder.tokenizer import CutTexts
from embedloom.evaluation.jobs import Outcome, Survey, Unit

SCORES_FILE = "scores.json"
RUN_SETTINGS_FILE = "run_settings.jsonl"
DECIMALS = 6  # as mteb rounds in its files
SHOWN_METRICS = ("ndcg_at_10", "recall_at_100", "mrr_at_10")
_SUMMED = ("tokens", "padded_tokens", "seconds", "queries", "documents", "pairs", "pairs_cut")


def save_outcome(place: Place, unit: Unit, outcome: Outcome, subsets: Sequence[str] = ()) -> None:
    """Merge one finished unit into its task's result.

    Args:
        place: the artefact.
        unit: what was scored.
        outcome: mteb's files and our own.
        subsets: order of the task's subsets in the file; given, the file does not depend on who finished first.
    """
    if outcome.items is not None and outcome.items.num_rows:
        place.write_table(unit.items_path, outcome.items)
    place.write_json(unit.part_path, {**outcome.figures, "prompts_of": unit.task.prompts_of})
    for name, content in outcome.files.items():
        path = f"{unit.scorer.result_folder}/{name}"
        if path == unit.result_path:
            continue
        if name == RUN_SETTINGS_FILE:
            content = _merged_settings(place, path, content)
        place.write_bytes(path, content)
    result = _merged_result(place, unit, outcome.files[f"{unit.task.name}.json"], subsets)
    place.write_bytes(unit.result_path, result)


def _merged_result(place: Place, unit: Unit, new: bytes, subsets: Sequence[str]) -> bytes:
    """The task's file with the unit's subsets added, by mteb's own rules, in a fixed order."""
    merged = TaskResult.from_dict(json.loads(new))
    if unit.subset is not None and place.exists(unit.result_path):
        before = TaskResult.from_dict(place.read_json(unit.result_path))
        merged = before.merge(merged) if before.is_mergeable(merged) else merged
    position = {subset: number for number, subset in enumerate(subsets)}
    for entries in merged.scores.values():
        entries.sort(key=lambda entry: (position.get(entry["hf_subset"], len(position)), entry["hf_subset"]))
    with TemporaryDirectory(prefix="embedloom-") as scratch:
        merged.to_disk(Path(scratch, "result.json"))
        return Path(scratch, "result.json").read_bytes()


def _merged_settings(place: Place, path: str, new: bytes) -> bytes:
    """mteb keeps one line a task in a file shared by all tasks of a model; ours names every subset of the task."""
    added = [json.loads(line) for line in new.splitlines()]
    kept = [json.loads(line) for line in place.read_bytes(path).splitlines()] if place.exists(path) else []
    for entry in added:
        for before in [other for other in kept if other["task"] == entry["task"]]:
            if before.get("splits") == entry.get("splits") and "subsets" in entry:
                entry["subsets"] = sorted({*before.get("subsets", ()), *entry["subsets"]})
            kept.remove(before)
    entries = sorted(kept + added, key=lambda entry: str(entry["task"]))
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def missing_parts(place: Place, unit: Unit, survey: Survey) -> list[str | None]:
    """Parts of the unit's task whose scores are not stored yet, by mteb's own account of what is missing."""
    if not place.exists(unit.result_path):
        return list(survey.parts)
    content = place.read_json(unit.result_path)
    if content["dataset_revision"] != survey.revision:
        return list(survey.parts)
    there = {split: {entry["hf_subset"] for entry in entries} for split, entries in content["scores"].items()}
    done = set.intersection(*(there.get(split, set()) for split in survey.splits))
    parts = [part for part in survey.parts if not set(survey.subsets if part is None else [part]) <= done]
    return [
        part for part in survey.parts
        if part in parts or not place.exists(Unit(unit.scorer, unit.task, part).part_path)
    ]  # fmt: skip


def finish_task(
    place: Place, unit: Unit, survey: Survey, tokens: int, padded: int, cuts: CutTexts | None = None
) -> None:
    """Sum the figures of a task's parts; the file marks the task done.

    Args:
        place: the artefact.
        unit: its scorer and task.
        survey: of the task.
        tokens: of the shards that the task owns.
        padded: the same with padding.
        cuts: what the model's limits left out of their texts.
    """
    parts = [place.read_json(Unit(unit.scorer, unit.task, part).part_path) for part in survey.parts]
    total: dict[str, Any] = {
        key: sum(part[key] for part in parts) for key in _SUMMED if all(key in part for part in parts)
    }
    total["tokens"] = total.get("tokens", 0) + tokens
    total["padded_tokens"] = total.get("padded_tokens", 0) + padded
    total["seconds"] = round(total.get("seconds", 0.0), 3)
    prompts = survey.prompts.get(unit.scorer.contract_hash)
    if prompts is not None:
        total["prompts"] = asdict(prompts)
    place.write_json(
        unit.figures_path,
        {**total, **(cuts or CutTexts()).counts(), "type": survey.type, "metric": survey.metric},
    )


def drop_other_prompts(place: Place, unit: Unit) -> None:
    """Remove a task's results that were scored with other prompts than it asks for now, or nobody recorded which."""
    parts = place.names(unit.figures_path.removesuffix(".json"), ".json")
    if unit.scorer.folder is None or all(
        place.read_json(part).get("prompts_of") == unit.task.prompts_of for part in parts
    ):
        return
    items = place.names(unit.items_folder, ".parquet")
    for name in [unit.figures_path, unit.result_path, *parts, *items]:
        if place.exists(name):
            place.delete(name)


def read_scores(place: Place, unit: Unit) -> dict[str, float]:
    """``main_score`` and the shown metrics of one result: means over its splits and language subsets."""
    entries = [entry for split in place.read_json(unit.result_path)["scores"].values() for entry in split]
    keys = [key for key in ("main_score", *SHOWN_METRICS) if all(key in entry for entry in entries)]
    return {key: round(sum(entry[key] for entry in entries) / len(entries), DECIMALS) for key in keys}


def read_subsets(place: Place, unit: Unit) -> dict[str, float]:
    """Main score of every language subset, a mean over splits."""
    found: dict[str, list[float]] = {}
    for entries in place.read_json(unit.result_path)["scores"].values():
        for entry in entries:
            found.setdefault(entry["hf_subset"], []).append(entry["main_score"])
    return {subset: round(sum(scores) / len(scores), DECIMALS) for subset, scores in found.items()}


def score_table(place: Place, units: Sequence[Unit]) -> ScoreTable:
    """Content of ``scores.json`` for finished tasks: main scores, and beside them all shown metrics."""
    # JSON on disk is sorted by key, so the order of the config stands beside the scores.
    order: dict[str, list[str]] = {"tasks": list(dict.fromkeys(unit.task.name for unit in units))}
    for group in ("models", "baselines"):
        order[group] = list(dict.fromkeys(unit.scorer.name for unit in units if unit.scorer.group == group))
    table: ScoreTable = {
        "order": order,
        "models": {},
        "baselines": {},
        "metrics": {"models": {}, "baselines": {}},
    }
    for unit in units:
        metrics = read_scores(place, unit)
        group, name, task = unit.scorer.group, unit.scorer.name, unit.task.name
        table[group].setdefault(name, {})[task] = metrics["main_score"]
        table["metrics"][group].setdefault(name, {})[task] = metrics
        subsets = read_subsets(place, unit)
        if len(subsets) > 1:
            shown = table.setdefault("subsets", {"models": {}, "baselines": {}})
            shown[group].setdefault(name, {})[task] = subsets
    return table
