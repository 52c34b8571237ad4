"""What a search compares: a merge's score on dev queries, and apart from it on queries kept for the check."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from embedloom.config.merging import MergeSearch
from embedloom.errors import ConfigError

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
