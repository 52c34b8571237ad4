"""Results on disk: mteb's own tree, so any mteb tool reads them, and ``scores.json`` drawn from it.

    results/<organisation>__<model>/<revision>/{<task>.json, model_meta.json, run_settings.jsonl}
    units/<group>/<model>/<task>.json      tokens, seconds and sizes, which mteb's files have no place for

Only the driver writes, each file by rename and the task's result last, so that its presence means done.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from embedloom.config.use import EvaluationTask
from embedloom.storage import Place

RESULTS_FOLDER = "results"
UNITS_FOLDER = "units"
SCORES_FILE = "scores.json"
RUN_SETTINGS_FILE = "run_settings.jsonl"
DECIMALS = 6  # as mteb rounds in its files
SHOWN_METRICS = ("ndcg_at_10", "recall_at_100", "mrr_at_10")

Group = Literal["models", "baselines"]


@dataclass(frozen=True, slots=True)
class Scorer:
    """What gets scored: a model folder, or BM25 where ``folder`` is None."""

    name: str  # in scores.json
    group: Group
    mteb_name: str  # organisation/model
    revision: str
    folder: Path | None = None

    @property
    def result_folder(self) -> str:
        """Where mteb keeps its results, relative to the artefact."""
        return f"{RESULTS_FOLDER}/{self.mteb_name.replace('/', '__').replace(' ', '_')}/{self.revision}"


@dataclass(frozen=True, slots=True)
class Unit:
    """One result to compute: a scorer on a task."""

    scorer: Scorer
    task: EvaluationTask

    @property
    def label(self) -> str:
        """``model/task``, as errors and progress name it."""
        return f"{self.scorer.name}/{self.task.name}"

    @property
    def result_path(self) -> str:
        """mteb's result file, relative to the artefact."""
        return f"{self.scorer.result_folder}/{self.task.name}.json"

    @property
    def figures_path(self) -> str:
        """Our own figures, relative to the artefact."""
        return f"{UNITS_FOLDER}/{self.scorer.group}/{self.scorer.name}/{self.task.name}.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What scoring one unit gave: mteb's files by name, and our own figures."""

    files: dict[str, bytes]
    figures: dict[str, Any] = field(default_factory=dict)


def save_outcome(place: Place, unit: Unit, outcome: Outcome) -> None:
    """Write one finished result; the file whose presence means done comes last."""
    place.write_json(unit.figures_path, outcome.figures)
    for name, content in outcome.files.items():
        path = f"{unit.scorer.result_folder}/{name}"
        if name == RUN_SETTINGS_FILE:
            content = _merged_settings(place, path, content)
        if path != unit.result_path:
            place.write_bytes(path, content)
    place.write_bytes(unit.result_path, outcome.files[f"{unit.task.name}.json"])


def _merged_settings(place: Place, path: str, new: bytes) -> bytes:
    """mteb keeps one line a task in a file shared by all tasks of a model."""
    added = [json.loads(line) for line in new.splitlines()]
    tasks = {entry["task"] for entry in added}
    kept = [json.loads(line) for line in place.read_bytes(path).splitlines()] if place.exists(path) else []
    entries = [entry for entry in kept if entry["task"] not in tasks] + added
    return "".join(
        json.dumps(entry) + "\n" for entry in sorted(entries, key=lambda entry: str(entry["task"]))
    ).encode()


def read_scores(place: Place, unit: Unit) -> dict[str, float]:
    """``main_score`` and the shown metrics of one result: means over its splits and language subsets."""
    entries = [entry for split in place.read_json(unit.result_path)["scores"].values() for entry in split]
    keys = [key for key in ("main_score", *SHOWN_METRICS) if all(key in entry for entry in entries)]
    return {key: round(sum(entry[key] for entry in entries) / len(entries), DECIMALS) for key in keys}


def score_table(place: Place, units: Sequence[Unit]) -> dict[str, Any]:
    """Content of ``scores.json`` for finished units: main scores, and beside them all shown metrics."""
    # JSON on disk is sorted by key, so the order of the config stands beside the scores.
    order: dict[str, list[str]] = {"tasks": list(dict.fromkeys(unit.task.name for unit in units))}
    for group in ("models", "baselines"):
        order[group] = list(dict.fromkeys(unit.scorer.name for unit in units if unit.scorer.group == group))
    table: dict[str, Any] = {"order": order, "models": {}, "baselines": {}}
    table["metrics"] = {"models": {}, "baselines": {}}
    for unit in units:
        metrics = read_scores(place, unit)
        group, name, task = unit.scorer.group, unit.scorer.name, unit.task.name
        table[group].setdefault(name, {})[task] = metrics["main_score"]
        table["metrics"][group].setdefault(name, {})[task] = metrics
    return table
