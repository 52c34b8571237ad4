"""Bootstrap of task scores from items: means, Spearman correlations and average precisions, in numpy alone.

A resample draws as many items as a subset has, with replacement; it is a vector of counts, and every statistic is
computed for all resamples at once from those counts [resamples, items]. A task's score is the mean over its subsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import t as student_t

Statistic = Literal["mean", "spearman", "average_precision"]
Floats = np.ndarray[Any, np.dtype[np.float64]]
_CHUNK_CELLS = 1_000_000  # counts held at a time: 8 MB, and some temporaries of that size


@dataclass(frozen=True, slots=True)
class Stratum:
    """The items of one split and subset of a task."""

    key: str  # split/subset
    statistic: Statistic
    items: tuple[str, ...]
    values: Floats  # [items]
    targets: Floats | None = None  # [items]; None for a mean


def observed(stratum: Stratum) -> float:
    """The statistic of the items as they are."""
    return float(_statistic(stratum, np.ones((1, len(stratum.items))))[0])


def resampled(groups: Sequence[Sequence[Stratum]], resamples: int, seed: int) -> Floats:
    """Bootstrap scores of several models on the same items: float64 [models, resamples].

    Args:
        groups: strata by model; item ids and order agree between models, so each resample draws the same items of all.
        resamples: how many.
        seed: of the draws; strata have streams of their own.
    """
    total = np.zeros((len(groups), resamples))
    for number, strata in enumerate(zip(*groups, strict=True)):
        rng = np.random.default_rng([seed, number])
        size = len(strata[0].items)
        step = max(1, _CHUNK_CELLS // size)
        for start in range(0, resamples, step):
            rows = min(step, resamples - start)
            counts = rng.multinomial(size, np.full(size, 1 / size), size=rows).astype(np.float64)
            for model, stratum in enumerate(strata):
                total[model, start : start + rows] += _statistic(stratum, counts)
    return total / max(1, len(groups[0]))


def interval(scores: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap scores [resamples]."""
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of a few independent values, such as the scores of several seeds.

    None for a single value, which says nothing about its spread. Three seeds give 4.3 standard errors to each side.
    """
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / np.sqrt(len(array))
    reach = float(student_t.ppf((1 + level) / 2, len(array) - 1)) * error
    return float(array.mean() - reach), float(array.mean() + reach)


def one_sided_p(differences: Floats) -> float:
    """Bootstrap p-value of "the difference is not below 0": share of resamples at or above 0, never exactly 0."""
    return float((1 + np.count_nonzero(differences >= 0)) / (1 + len(differences)))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down correction: the chance of one false alarm among all stays below the level."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def _statistic(stratum: Stratum, counts: Floats) -> Floats:
    """The statistic of each row of counts [resamples, items]."""
    if stratum.targets is None:
        return np.asarray(counts @ stratum.values / counts.sum(axis=1))
    if stratum.statistic == "spearman":
        return _correlation(_ranks(stratum.values, counts), _ranks(stratum.targets, counts), counts)
    return _average_precision(stratum.values, stratum.targets, counts)


def _ranks(values: Floats, counts: Floats) -> Floats:
    """Average rank of every item among the drawn ones: [resamples, items]."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)
    below = np.cumsum(sizes, axis=1) - sizes
    return np.asarray((below + (sizes + 1) / 2)[:, group])


def _correlation(one: Floats, other: Floats, counts: Floats) -> Floats:
    """Pearson's correlation of two [resamples, items] under weights; 0 where one of them does not vary."""
    total = counts.sum(axis=1, keepdims=True)
    x = one - (counts * one).sum(axis=1, keepdims=True) / total
    y = other - (counts * other).sum(axis=1, keepdims=True) / total
    covariance = (counts * x * y).sum(axis=1)
    scale = np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
    correlation: Floats = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    return correlation


def _average_precision(scores: Floats, labels: Floats, counts: Floats) -> Floats:
    """Average precision as scikit-learn defines it: precision at each distinct score, weighted by recall gained."""
    _, group = np.unique(-scores, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)
    right = np.add.reduceat((counts * labels)[:, order], starts, axis=1)
    seen = np.cumsum(drawn, axis=1)
    precision = np.divide(np.cumsum(right, axis=1), seen, out=np.zeros_like(seen), where=seen > 0)
    positives = right.sum(axis=1)
    gained = (precision * right).sum(axis=1)
    found: Floats = np.divide(gained, positives, out=np.zeros_like(gained), where=positives > 0)
    return found
