"""Ranks and means as mteb's leaderboard has them, the pinned pool of models to rank among, and confidence intervals."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from mteb.abstasks.abstask import AbsTask

from embedloom.core.schemas import ScoreTable
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.evaluation.jobs import Unit
from embedloom.evaluation.local_tasks import read_columns, revision_of
from embedloom.evaluation.results import DECIMALS, read_scores
from embedloom.evaluation.statistics import Stratum, interval, observed, resampled

# Ranks and means as mteb's leaderboard computes them (``mteb/benchmarks/_create_table.py``); pure.
#
# A score table has one row a model and one column a task, NaN where a model has no score. Scores stay float64: rounding
# them to four decimals makes ties and moves ranks.


Scores = Mapping[str, Mapping[str, float]]  # model -> task -> main score, 0-1


@dataclass(frozen=True, slots=True)
class Standing:
    """One model's line of a leaderboard."""

    model: str
    votes: float
    rank: int
    mean_task: float | None  # None where a task is missing, as on the leaderboard
    mean_type: float | None
    types: dict[str, float | None]
    tasks: int  # scored

    def as_json(self) -> dict[str, Any]:
        """For ``scores.json`` and ``gate.json``."""
        return {
            "votes": self.votes,
            "rank": self.rank,
            "mean_task": self.mean_task,
            "mean_type": self.mean_type,
            "types": self.types,
            "tasks": self.tasks,
        }


def score_frame(scores: Scores) -> pd.DataFrame:
    """Models x tasks, float64; models without any score are left out, as on the leaderboard."""
    frame = pd.DataFrame.from_dict({model: dict(row) for model, row in scores.items()}, orient="index")
    return frame.astype("float64").dropna(how="all")


def borda_votes(frame: pd.DataFrame, models: int | None = None) -> pd.Series:
    """Votes of each model: within a task ``models - rank``, ties share their average rank; a missing score has none.

    Args:
        frame: models x tasks.
        models: what ranks are subtracted from; None: the frame's.
    """
    ranks = frame.rank(axis=0, method="average", ascending=False)
    return ((len(frame) if models is None else models) - ranks).fillna(0.0).sum(axis=1)


def rank_models(
    scores: Scores,
    types: Mapping[str, str],
    partial: Mapping[str, Collection[str]] | None = None,
    *,
    partial_in_means: bool = False,
) -> list[Standing]:
    """All models by votes, best first, equal ones by name; models with equal votes share the better rank.

    A partial score (some of a task's subsets) takes part in the ranking but not in the means, and a model with
    partial scores only is not counted among the models that votes are subtracted from: so does mteb 2.26.

    Args:
        scores: of the whole pool; votes only compare within one set of models.
        types: task -> task type.
        partial: model -> tasks whose score covers only some subsets.
        partial_in_means: let them into the means too.
    """
    frame = score_frame(scores)
    whole = frame.copy()
    for model, tasks in (partial or {}).items():
        if model in whole.index:
            whole.loc[model, [task for task in tasks if task in whole.columns]] = float("nan")
    votes = borda_votes(frame, int(whole.notna().any(axis=1).sum()))
    ranks = votes.rank(method="min", ascending=False)
    counted = frame if partial_in_means else whole
    mean_task = counted.mean(axis=1, skipna=False)
    by_type = pd.DataFrame(
        {
            kind: counted[[task for task in frame.columns if types[task] == kind]].mean(axis=1, skipna=False)
            for kind in sorted({types[task] for task in frame.columns})
        }
    )
    mean_type = by_type.mean(axis=1, skipna=False)
    found = [
        Standing(
            model=str(model),
            votes=float(votes[model]),
            rank=int(ranks[model]),
            mean_task=_number(mean_task[model]),
            mean_type=_number(mean_type[model]),
            types={kind: _number(by_type.loc[model, kind]) for kind in by_type.columns},
            tasks=int(frame.loc[model].notna().sum()),
        )
        for model in frame.index
    ]
    return sorted(found, key=lambda standing: (standing.rank, standing.model))


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


# The pinned pool: scores of real models that candidates are ranked among.
#
# Votes depend on who else is in the pool, so a pool is a file with a fingerprint, not "the leaderboard today".


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


# What an evaluation says beside its scores: confidence intervals, and each model's place in the pool.


_SEED = 20251
OWN = "this evaluation"  # the pool where none is given: the models and baselines themselves


def read_strata(place: Place, unit: Unit) -> list[Stratum]:
    """Items of a finished task by split and subset; empty where its score is no function of items."""
    rows = [
        row
        for name in place.names(unit.items_folder, ".parquet")
        for row in place.read_table(name).to_pylist()
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['split']}/{row['subset']}", []).append(row)
    return [
        Stratum(
            key,
            group[0]["statistic"],
            tuple(row["item"] for row in group),
            np.asarray([row["value"] for row in group]),
            None if group[0]["target"] is None else np.asarray([row["target"] for row in group]),
        )
        for key, group in sorted(groups.items())
    ]


def score_intervals(
    place: Place, units: Sequence[Unit], resamples: int
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """95 % bootstrap intervals of main scores: group -> model -> task -> [low, high].

    Where the main score is not itself a mean of items (a bitext's F1), its items' spread is laid around it.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {"models": {}, "baselines": {}}
    for unit in units:
        strata = read_strata(place, unit)
        if not strata:
            continue
        low, high = interval(resampled([strata], resamples, _SEED)[0])
        shift = read_scores(place, unit)["main_score"] - float(np.mean([observed(s) for s in strata]))
        bounds = [round(low + shift, DECIMALS), round(high + shift, DECIMALS)]
        found[unit.scorer.group].setdefault(unit.scorer.name, {})[unit.task.name] = bounds
    return found


def standings(table: ScoreTable, types: Mapping[str, str], pool: str | None) -> dict[str, Any]:
    """Votes, ranks and means of an evaluation's models and baselines among a pool's models.

    Args:
        table: ``models`` and ``baselines`` of ``scores.json``.
        types: task -> type.
        pool: a Parquet file or results folder; None ranks the evaluation's own models among themselves.

    Raises:
        DataError: the pool has none of the tasks.
    """
    own = {**table["models"], **table["baselines"]}
    pinned = None if pool is None else load_pool(Path(pool).expanduser(), dict(types))
    ranked, tasks = ranked_among(own, types, pinned)
    places = {standing.model: standing.as_json() for standing in ranked if standing.model in own}
    return {
        "pool": OWN if pinned is None else pinned.source,
        "pool_fingerprint": None if pinned is None else pinned.fingerprint,
        "pool_models": len(ranked),
        "tasks": tasks,
        "models": places,
        "shown": [
            {"model": standing.model, "own": standing.model in own, **standing.as_json()}
            for standing in shown_standings(ranked, set(own))
        ],
    }


def shown_standings(
    ranked: Sequence[Standing], own: Collection[str], top: int = 10, around: int = 2
) -> list[Standing]:
    """The first ``top`` models, ours, and ``around`` neighbours of each of ours, in order."""
    kept = set(range(min(top, len(ranked))))
    for place, standing in enumerate(ranked):
        if standing.model in own:
            kept |= set(range(max(0, place - around), min(len(ranked), place + around + 1)))
    return [ranked[place] for place in sorted(kept)]


def check_pool(pool: str | None, tasks: Collection[str], models: Collection[str]) -> None:
    """Fail before any work if models cannot be ranked within a pool.

    Raises:
        DataError: no such pool, none of the tasks in it, or a model's name taken.
    """
    if pool is not None:
        ranked_among(
            {model: dict.fromkeys(tasks, 0.0) for model in models},
            dict.fromkeys(tasks, ""),
            load_pool(Path(pool).expanduser()),
        )


def ranked_among(
    own: Scores, types: Mapping[str, str], pool: PinnedPool | None
) -> tuple[list[Standing], list[str]]:
    """Everybody's standing, and the tasks it is about: with a pool, those that the pool has too.

    Raises:
        DataError: no task in common, or a model of ours with the name of one in the pool.
    """
    ours = sorted({task for row in own.values() for task in row})
    if pool is None:
        return rank_models(own, types), ours
    tasks = [task for task in ours if task in pool.types]
    if not tasks:
        raise DataError(
            f"pool: {pool.source} has none of the tasks {', '.join(ours[:5])}; a pool must hold scores on the same tasks"
        )
    both = sorted(set(own) & set(pool.scores))
    if both:
        raise DataError(
            f"pool: {pool.source} has a model named {both[0]!r}, as this evaluation does; rename one"
        )
    everybody = {
        model: {task: row[task] for task in tasks if task in row}
        for model, row in {**pool.scores, **own}.items()
    }
    return rank_models(everybody, {**pool.types, **types}, pool.partial), tasks
