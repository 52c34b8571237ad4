"""Scoring the merges of a search: merge into a scratch folder, score it, keep the scores, drop the weights."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedloom.artefacts import fingerprint
from embedloom.config.merging import MergeSearch, MergingConfig
from embedloom.config.resources import PoolConfig
from embedloom.merging.carry import SEARCH_FILE, carry_over, contract_of
from embedloom.merging.plan import plan_merge
from embedloom.merging.scores import Scored, TaskScores, set_apart
from embedloom.merging.search import SearchResult, search_weights
from embedloom.merging.stage import write_weights
from embedloom.merging.weights import Weights
from embedloom.progress import note
from embedloom.storage import Place

TRIALS_FOLDER = "search"
Scorer = Callable[[str, Path], TaskScores]


def search_merge(
    config: MergingConfig,
    models: dict[str, Place],
    base: Place | None,
    scorer: Scorer,
    place: Place,
    pool: PoolConfig | None = None,
    threads: int = 1,
    default_task: str | None = None,
) -> SearchResult:
    """Find the weights of a merge by the section's search and write ``search.json``.

    Scores of every merge are kept in ``search/`` until the search is done, so a killed search goes on where it was.

    Args:
        config: the merging section, with a search.
        models: name -> model folder.
        base: for methods on task vectors.
        scorer: called with a name and a model folder; gives main scores by task and scores by task and item.
        place: the folder of the merged model.
        pool: Ray tasks for the merges; None: this process, with ``threads``.
        threads: without Ray, how many compute.
        default_task: of the merged model, so that trials are scored as it will be.

    Returns:
        What ``search_weights`` returns.

    Raises:
        ConfigError, DataError: models, weights or tasks that cannot be searched.
    """
    search = config.search
    assert search is not None  # noqa: S101 - the caller asks only where the section exists
    contract_of(plan_merge(config, models, base), default_task)  # all checks come before the first merge

    def score(weights: Weights) -> Scored:
        name = f"{TRIALS_FOLDER}/{fingerprint(weights)}.json"
        if not place.exists(name):
            scores = _score(config, models, base, scorer, weights, place, pool, threads, default_task)
            place.write_json(name, {"weights": weights, "main": dict(scores[0]), "items": _plain(scores)})
        stored = place.read_json(name)
        scored = set_apart(search, (stored["main"], stored["items"]))
        note("merge", f"search: {_shown(models, weights)}: dev {scored.dev:.5f}, check {scored.check:.5f}")
        return scored

    result = search_weights(search, list(models), score)
    place.write_json(SEARCH_FILE, result)
    place.child(TRIALS_FOLDER).remove()
    for line in table_lines(result):
        note("merge", line)
    return result


def _score(
    config: MergingConfig,
    models: dict[str, Place],
    base: Place | None,
    scorer: Scorer,
    weights: Weights,
    place: Place,
    pool: PoolConfig | None,
    threads: int,
    default_task: str | None,
) -> TaskScores:
    label = f"trial-{fingerprint(weights)}"
    alone = next((name for name, weight in zip(models, weights, strict=True) if weight == 1), None)
    if alone is not None and models[alone].is_local and config.method == "linear" and default_task is None:
        return scorer(label, models[alone].local)  # the average of one model is that model
    if (
        not place.is_local
    ):  # scorers read a folder; only this machine sees its scratch disk, so no tasks write it
        pool = None
    folder = (
        place.child(f"{TRIALS_FOLDER}/trial")
        if place.is_local
        else Place(tempfile.mkdtemp(prefix="embedloom-"))
    )
    folder.remove()  # of a killed search
    try:
        plan = plan_merge(config.model_copy(update={"weights": weights, "search": None}), models, base)
        carry_over(plan, folder, contract_of(plan, default_task))
        write_weights(plan, folder, pool, threads)
        return scorer(label, folder.local)
    finally:
        folder.remove()


def _plain(scores: TaskScores) -> dict[str, dict[str, float]]:
    return {task: dict(items) for task, items in scores[1].items()}


def _shown(models: dict[str, Place], weights: Weights) -> str:
    return ", ".join(f"{name} {weight:.3g}" for name, weight in zip(models, weights, strict=True) if weight)


def table_lines(result: SearchResult) -> list[str]:
    """Choice, check and leave-one-out table, as text."""
    kept = ", ".join(f"{n} {w:.3g}" for n, w in zip(result["models"], result["kept"], strict=True) if w)
    lines = [f"search {result['kind']} keeps {kept}: {result['reason']}"]
    for row in result["leave_one_out"]:
        interval = row["check_interval"]
        shown = "" if interval is None else f" ({interval[0]:+.5f} to {interval[1]:+.5f})"
        lines.append(
            f"without {row['model']}: dev {-row['dev_gain']:+.5f}, check {-row['check_gain']:+.5f}"
            + (f"; it adds{shown}" if shown else "")
        )
    return lines


def scored_tasks(search: MergeSearch) -> list[Any]:
    """All tasks a merge of the search is scored on."""
    return [*search.tasks, *search.check_tasks]
