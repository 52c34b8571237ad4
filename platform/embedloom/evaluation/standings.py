"""What an evaluation says beside its scores: confidence intervals, and each model's place in the pool."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedloom.errors import DataError
from embedloom.evaluation.jobs import Unit
from embedloom.evaluation.pinned import PinnedPool, load_pool
from embedloom.evaluation.ranking import Scores, Standing, rank_models
from embedloom.evaluation.results import DECIMALS, read_scores
from embedloom.evaluation.statistics import Stratum, interval, observed, resampled
from embedloom.records import ScoreTable
from embedloom.storage import Place

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
