"""The pinned pool: scores of real models that candidates are ranked among.

Votes depend on who else is in the pool, so a pool is a file with a fingerprint, not "the leaderboard today".
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from mteb.abstasks.abstask import AbsTask

from embedloom.errors import DataError
from embedloom.evaluation.local_tables import read_columns, revision_of

_COLUMNS = {"model": pa.string(), "task": pa.string(), "task_type": pa.string(), "score": pa.float64()}
_OTHER_FILES = ("model_meta.json",)
LOCAL_TYPE = "Other"  # of tasks that neither mteb nor the results know


@dataclass(frozen=True, slots=True)
class PinnedPool:
    """Scores by model and task, and the tasks' types."""

    source: str
    fingerprint: str
    scores: dict[str, dict[str, float]]
    types: dict[str, str]
    partial: dict[str, list[str]]  # model -> tasks of which it lacks a split or subset that others have
    dropped: tuple[str, ...] = ()  # tasks that no model has whole


def load_pool(path: Path, types: dict[str, str] | None = None) -> PinnedPool:
    """Read a Parquet file (model, task, task_type, score) or an mteb results folder.

    A score is partial where a model lacks a split or subset that others have (``n_rows`` below ``n_expected`` in a
    Parquet file that says so); a task that no model has whole is left out. In a results folder, of several revisions
    of a model the one with the most tasks counts, of equals the last by name.

    Args:
        path: the file, the folder of model folders, or a folder with ``results/`` in it.
        types: task -> type of tasks that mteb does not know.

    Raises:
        DataError: nothing there, missing columns, a score that stands twice, or no result.
    """
    if path.is_file():
        return _from_parquet(path)
    root = path / "results" if (path / "results").is_dir() else path
    if not root.is_dir():
        raise DataError(f"pool: {path} does not exist; allowed: a Parquet file or an mteb results folder")
    return _from_results(root, types or {})


def _from_parquet(path: Path) -> PinnedPool:
    columns = {**_COLUMNS, "on_leaderboard": pa.bool_(), "n_rows": pa.int64(), "n_expected": pa.int64()}
    table = read_columns(path, columns, optional=("on_leaderboard", "n_rows", "n_expected"))
    frame = table.to_pandas()
    frame = frame[frame["on_leaderboard"].map(lambda value: value is None or bool(value))]
    twice = frame[frame.duplicated(["model", "task"])]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(
            f"{path}: model {row['model']!r} has two scores on {row['task']!r}; keep one revision"
        )
    types = dict(zip(frame["task"], frame["task_type"], strict=True))
    return _pool(str(path), revision_of([path]), frame, frame["n_rows"] < frame["n_expected"], types)


def _from_results(root: Path, types: dict[str, str]) -> PinnedPool:
    rows = [row for folder in sorted(root.iterdir()) if folder.is_dir() for row in _model_rows(folder)]
    if not rows:
        raise DataError(f"pool: {root} holds no <model>/<revision>/<task>.json of mteb")
    frame = pd.DataFrame(rows)
    observed = frame.groupby("task")[["split", "subset"]].nunique().prod(axis=1)
    cells = frame.groupby(["model", "task"], sort=True)["score"].agg(["mean", "count"]).reset_index()
    cells["score"] = cells["mean"]
    known = {task: types.get(task) or task_type(task) for task in observed.index}
    files = [Path(file) for file in sorted({row["file"] for row in rows})]
    return _pool(str(root), revision_of(files), cells, cells["count"] < cells["task"].map(observed), known)


def _pool(
    source: str, fingerprint: str, cells: pd.DataFrame, partial: pd.Series, types: dict[str, str]
) -> PinnedPool:
    """A pool from one row a model and task; ``partial`` says which of them are."""
    whole = set(cells["task"][~partial])
    if not whole:
        raise DataError(f"{source}: no model has a whole score on any task")
    scores: dict[str, dict[str, float]] = {}
    lacking: dict[str, list[str]] = {}
    for model, task, score, some in zip(cells["model"], cells["task"], cells["score"], partial, strict=True):
        if task in whole:
            scores.setdefault(model, {})[task] = float(score)
            if some:
                lacking.setdefault(model, []).append(task)
    kept = {task: kind for task, kind in types.items() if task in whole}
    return PinnedPool(source, fingerprint, scores, kept, lacking, tuple(sorted(set(types) - whole)))


def _model_rows(folder: Path) -> list[dict[str, Any]]:
    """Scores of one model: its revision with the most tasks."""
    revisions = [
        (sorted(path for path in revision.glob("*.json") if path.name not in _OTHER_FILES), revision.name)
        for revision in sorted(folder.iterdir())
        if revision.is_dir()
    ]
    files = max(revisions, key=lambda entry: (len(entry[0]), entry[1]), default=([], ""))[0]
    rows = []
    for path in files:
        try:
            content = json.loads(path.read_text())
            for split, entries in content["scores"].items():
                rows += [
                    {"model": folder.name.replace("__", "/"), "task": content["task_name"], "split": split,
                     "subset": entry["hf_subset"], "score": float(entry["main_score"]), "file": str(path)}
                    for entry in entries
                ]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not an mteb result file ({type(error).__name__}: {error})") from error
    return rows


def task_type(name: str) -> str:
    """mteb's type of a task by name, ``Other`` for tasks that mteb does not know."""
    from mteb.get_tasks import _TASKS_REGISTRY

    found: type[AbsTask] | None = _TASKS_REGISTRY.get(name)
    return str(found.metadata.type) if found is not None else LOCAL_TYPE
