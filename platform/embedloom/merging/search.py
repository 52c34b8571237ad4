"""Finding weights: a greedy soup or a coordinate search on dev scores, checked on scores the search never saw.

Pure: a merge is its weights, and ``score`` says how good it is. The greedy soup is that of arXiv 2203.05482
(Algorithm 1); the coordinate search takes any method that reads weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from embedloom.config.merging import MergeSearch
from embedloom.errors import ConfigError
from embedloom.merging.scores import Scored, difference_interval
from embedloom.merging.weights import Weights

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
