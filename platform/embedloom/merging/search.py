"""Finding weights: a greedy soup or a coordinate search over merges that are scored on dev tasks, checked on scores held out."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

import numpy as np

from embedloom.config.cluster import PoolConfig
from embedloom.config.merging import MergeSearch, MergingConfig
from embedloom.core.artefacts import fingerprint
from embedloom.core.progress import note
from embedloom.core.storage import Place
from embedloom.encoder.registry import NodeModel, model_at
from embedloom.errors import ConfigError
from embedloom.merging.carry import SEARCH_FILE, carry_over, contract_of
from embedloom.merging.plan import Weights, plan_merge
from embedloom.merging.stage import write_weights

# What a search compares: a merge's score on dev queries, and apart from it on queries kept for the check.


_RESAMPLES = 10_000
# Main score by task, and the same by task and item; an item's id is split/subset/name.
TaskScores = tuple[Mapping[str, float], Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Scored:
    """One merge's scores; higher is better."""

    dev: float  # mean over the dev tasks
    check: float  # mean over the check tasks
    check_items: dict[str, dict[str, float]]  # task -> item -> value, where the task has items


def set_apart(search: MergeSearch, scores: TaskScores) -> Scored:
    """Scores of the search's queries and of those kept for the check.

    Without check tasks the items of every dev task are halved by a hash of their ids, the same way for every model.

    Raises:
        ConfigError: a dev task that cannot be halved, as it has no scores by item.
    """
    main, items = scores
    check_tasks = [task.name for task in search.check_tasks]
    absent = next((name for name in check_tasks if name not in main), None)
    if absent is not None:
        raise ConfigError(
            f"merging.search.check_tasks: {absent!r} has no score of its own, only {', '.join(main)}; name single tasks"
        )
    dev_tasks = [
        name for name in main if name not in check_tasks
    ]  # a folder or benchmark stands for its tasks
    if check_tasks:
        return Scored(
            fmean(main[name] for name in dev_tasks),
            fmean(main[name] for name in check_tasks),
            {name: dict(items.get(name, {})) for name in check_tasks if items.get(name)},
        )
    dev: list[float] = []
    check: dict[str, dict[str, float]] = {}
    for name in dev_tasks:
        found = items.get(name, {})
        kept = {item: value for item, value in found.items() if _kept_for_check(item)}
        rest = {item: value for item, value in found.items() if item not in kept}
        if not kept or not rest:
            raise ConfigError(
                f"merging.search.tasks: {name!r} has {len(found)} scores by query, too few to keep some for the check; "
                "name check_tasks"
            )
        dev.append(subset_mean(rest))
        check[name] = kept
    return Scored(fmean(dev), fmean(subset_mean(kept) for kept in check.values()), check)


def _kept_for_check(item: str) -> bool:
    return hashlib.blake2b(item.encode(), digest_size=1).digest()[0] % 2 == 1


def subset_mean(items: Mapping[str, float]) -> float:
    """Mean of the items of each language subset, then over subsets."""
    groups: dict[str, list[float]] = {}
    for item, value in items.items():
        groups.setdefault("/".join(item.split("/", 2)[:2]), []).append(value)
    return fmean(map(fmean, groups.values()))


def difference_interval(left: Scored, right: Scored, seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of ``left.check - right.check``: items paired by id, resampled within their task.

    None where the check has no items.
    """
    groups = _paired(left.check_items, right.check_items)
    if not groups:
        return None
    generator = np.random.default_rng(seed)
    means = np.zeros(_RESAMPLES)
    for differences in groups:
        draws = generator.integers(0, len(differences), (_RESAMPLES, len(differences)), dtype=np.int32)
        means += differences[draws].mean(axis=1) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _paired(
    left: Mapping[str, Mapping[str, float]], right: Mapping[str, Mapping[str, float]]
) -> Sequence["np.ndarray"]:
    return [
        np.array([value - right[task][item] for item, value in sorted(items.items()) if item in right[task]])
        for task, items in sorted(left.items())
        if task in right and set(items) & set(right[task])
    ]


# Finding weights: a greedy soup or a coordinate search on dev scores, checked on scores the search never saw.
#
# Pure: a merge is its weights, and ``score`` says how good it is. The greedy soup is that of arXiv 2203.05482
# (Algorithm 1); the coordinate search takes any method that reads weights.


Score = Callable[[Weights], Scored]
_DECIMALS = 6


class LeftOut(TypedDict):
    """What one model of the merge adds."""

    model: str
    weight: float
    dev_gain: float
    check_gain: float
    check_interval: list[float] | None  # 95 %; None without scores by item


class Check(TypedDict):
    """Gains of the chosen weights over equal ones."""

    reason: str
    dev_gain: float
    check_gain: float
    check_interval: list[float] | None


class Trial(TypedDict):
    """One merge that was scored."""

    weights: list[float]
    dev: float
    check: float


class SearchResult(Check):
    """``search.json``: weights are shares, in the order of ``models``."""

    kind: str
    chosen: list[float]  # by the search
    kept: list[float]  # to use: the plain average where the gain does not hold on the check
    models: list[str]
    trials: list[Trial]
    leave_one_out: list[LeftOut]


@dataclass
class Trials:
    """Every merge that was scored, in order; equal weights are scored once, and no more than the budget allows."""

    score: Score
    budget: int
    found: dict[Weights, Scored] = field(default_factory=dict)

    def of(self, weights: Sequence[float]) -> Scored | None:
        """Scores of a merge; None if it was not scored and the budget is spent."""
        key = shares(weights)
        if key not in self.found:
            if len(self.found) >= self.budget:
                return None
            self.found[key] = self.score(key)
        return self.found[key]


def shares(weights: Sequence[float]) -> Weights:
    """The weights over their sum, rounded so that equal merges are known as equal."""
    total = sum(weights)
    return tuple(round(weight / total, 9) for weight in weights)


def search_weights(search: MergeSearch, names: Sequence[str], score: Score) -> SearchResult:
    """Search, check, and take the chosen merge apart.

    Args:
        search: which search, and its bounds.
        names: of the models.
        score: merges the models with these shares and scores the result.

    Raises:
        ConfigError: fewer than two models, or a budget that does not reach once around them.
    """
    count = len(names)
    if count < 2:
        raise ConfigError(f"merging.search: needs at least 2 models, found {count}")
    left_out = count if search.leave_one_out else 0
    needed = {"greedy_soup": 2 * count, "weights": 3}[search.kind] + left_out
    if search.max_merges < needed:
        raise ConfigError(
            f"merging.search.max_merges: {search.max_merges}; {search.kind} over {count} models needs at least {needed}"
        )
    trials = Trials(score, search.max_merges - left_out)
    equal = shares([1.0] * count)
    trials.of(equal)
    chosen = (
        greedy_soup(trials, count)
        if search.kind == "greedy_soup"
        else coordinate_search(trials, search, count)
    )
    kept, check = _checked(trials.found, chosen, equal)
    trials.budget = search.max_merges
    table = leave_one_out(trials, names, kept) if search.leave_one_out else []
    return {
        "kind": search.kind,
        "chosen": list(chosen),
        "kept": list(kept),
        **check,
        "models": list(names),
        "trials": [
            {"weights": list(weights), "dev": round(s.dev, _DECIMALS), "check": round(s.check, _DECIMALS)}
            for weights, s in trials.found.items()
        ],
        "leave_one_out": table,
    }


def greedy_soup(trials: Trials, count: int) -> Weights:
    """Add models in the order of their own dev scores; each stays if the average does not get worse."""
    alone = [
        _required(trials, [float(other == index) for other in range(count)]).dev for index in range(count)
    ]
    ranked = sorted(range(count), key=lambda index: (-alone[index], index))
    inside, best = [ranked[0]], alone[ranked[0]]
    for index in ranked[1:]:
        tried = trials.of([float(other in (*inside, index)) for other in range(count)])
        if tried is not None and tried.dev >= best:
            inside, best = [*inside, index], tried.dev
    return shares([float(index in inside) for index in range(count)])


def coordinate_search(trials: Trials, search: MergeSearch, count: int) -> Weights:
    """From equal weights, make one model's weight larger or smaller, keep what is better, halve the step each round."""
    best = shares([1.0] * count)
    top = _required(trials, best).dev
    step = search.step
    for _ in range(search.rounds):
        for index in range(count):
            for factor in (1 + step, 1 - step):
                tried_weights = [w * factor if i == index else w for i, w in enumerate(best)]
                tried = trials.of(tried_weights)
                if tried is not None and tried.dev > top:
                    best, top = shares(tried_weights), tried.dev
                    break
        step /= 2
    return best


def leave_one_out(trials: Trials, names: Sequence[str], kept: Weights) -> list[LeftOut]:
    """What each model of the merge adds: scores with it less scores without it, the others' weights in proportion."""
    whole = _required(trials, kept)
    rows: list[LeftOut] = []
    for index, name in enumerate(names):
        without = [0.0 if i == index else weight for i, weight in enumerate(kept)]
        if kept[index] == 0 or not any(without):
            continue
        less = _required(trials, without)
        interval = difference_interval(whole, less)
        rows.append(
            {
                "model": name,
                "weight": kept[index],
                "dev_gain": round(whole.dev - less.dev, _DECIMALS),
                "check_gain": round(whole.check - less.check, _DECIMALS),
                "check_interval": None if interval is None else [round(v, _DECIMALS) for v in interval],
            }
        )
    return rows


def _checked(found: Mapping[Weights, Scored], chosen: Weights, equal: Weights) -> tuple[Weights, Check]:
    """The chosen weights if they hold on the check, else equal ones, and why."""
    best, plain = found[chosen], found[equal]
    gain, held = best.dev - plain.dev, best.check - plain.check
    interval = difference_interval(best, plain)
    sure = interval is not None and interval[0] > 0
    if chosen == equal:
        reason = "the search found nothing better than equal weights"
    elif held >= 0:
        reason = f"{gain:+.5f} over equal weights on dev queries, {held:+.5f} on the check" + (
            "" if sure else ", which is within chance"
        )
    else:
        reason = f"{gain:+.5f} over equal weights on dev queries, but {held:+.5f} on the check: equal weights are kept"
    check: Check = {
        "reason": reason,
        "dev_gain": round(gain, _DECIMALS),
        "check_gain": round(held, _DECIMALS),
        "check_interval": None if interval is None else [round(value, _DECIMALS) for value in interval],
    }
    return (chosen if held >= 0 else equal), check


def _required(trials: Trials, weights: Sequence[float]) -> Scored:
    scored = trials.of(weights)
    if scored is None:
        raise RuntimeError("merging.search: the budget was checked before the search")
    return scored


# Scoring the merges of a search: merge into a scratch folder, score it, keep the scores, drop the weights.


TRIALS_FOLDER = "search"
Scorer = Callable[[str, Path | NodeModel], TaskScores]


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
    if alone is not None and config.method == "linear" and default_task is None:
        return scorer(label, model_at(models[alone]))  # the average of one model is that model
    folder = place.child(f"{TRIALS_FOLDER}/trial")
    folder.remove()  # of a killed search
    try:
        plan = plan_merge(config.model_copy(update={"weights": weights, "search": None}), models, base)
        carry_over(plan, folder, contract_of(plan, default_task))
        write_weights(plan, folder, pool, threads)
        return scorer(label, model_at(folder))
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
