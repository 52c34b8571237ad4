"""May this model replace that one? The decision, from scores and items alone; pure.

Every task is tested by a paired bootstrap over its items, and the tasks' p-values are corrected by Holm, so the chance
of refusing an equal model for a loss on any task stays at ``significance``, however many tasks there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from embedloom.config.gate import GateConfig
from embedloom.errors import DataError
from embedloom.evaluation.ranking import Standing
from embedloom.evaluation.statistics import Floats, Stratum, holm, interval, one_sided_p, resampled
from embedloom.verdict import PASSED, REFUSED

Result = Literal["better", "worse", "equal", "not tested"]
_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured of the two models."""

    candidate: Mapping[str, float]  # task -> main score
    current: Mapping[str, float]
    items: Mapping[str, tuple[Sequence[Stratum], Sequence[Stratum]]]  # task -> strata of both
    standings: tuple[Standing, Standing] | None = None  # candidate, current, within one pool
    pool: str = ""
    latency: tuple[float, float] | None = None  # milliseconds of one query, median
    size: tuple[int, int] = (0, 0)  # bytes of weights


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """Candidate less current on one task."""

    task: str
    candidate: float
    current: float
    difference: float
    low: float | None  # 95 % bootstrap interval of the difference
    high: float | None
    p_worse: float | None  # corrected; small: a real loss
    p_better: float | None
    result: Result


@dataclass(frozen=True, slots=True)
class Check:
    """One rule and what came of it."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict with everything it rests on."""

    verdict: str
    checks: list[Check]
    tasks: list[TaskComparison]
    mean: dict[str, float]
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def reasons(self) -> list[str]:
        """Why it was refused, or what it passed on."""
        return [check.text for check in self.checks if check.passed == (self.verdict == PASSED)]

    def as_json(self) -> dict[str, Any]:
        """Content of ``gate.json`` but for the models' identities."""
        return {
            "verdict": self.verdict,
            "reasons": self.reasons,
            "checks": [asdict(check) for check in self.checks],
            "tasks": {
                entry.task: {k: v for k, v in asdict(entry).items() if k != "task"} for entry in self.tasks
            },
            "mean": self.mean,
            **self.evidence,
        }


def decide(config: GateConfig, evidence: Evidence) -> Decision:
    """Apply every rule; all of them must pass.

    Raises:
        DataError: the models were not scored on the same tasks and items.
    """
    tasks, mean = _compare(config, evidence)
    checks = [
        _mean_check(config, mean),
        _tolerance_check(config, tasks),
        _significance_check(config, tasks),
        *_borda_check(config, evidence),
        *_latency_check(config, evidence),
        *_size_check(config, evidence),
    ]
    verdict = PASSED if all(check.passed for check in checks) else REFUSED
    found: dict[str, Any] = {"size_bytes": list(evidence.size)}
    if evidence.latency is not None:
        found["latency_milliseconds"] = list(evidence.latency)
    if evidence.standings is not None:
        found["standings"] = [standing.as_json() for standing in evidence.standings]
        found["pool"] = evidence.pool
    return Decision(verdict, checks, tasks, mean, found)


def _compare(config: GateConfig, evidence: Evidence) -> tuple[list[TaskComparison], dict[str, float]]:
    tasks = list(evidence.candidate)
    if not tasks or set(tasks) != set(evidence.current):
        odd = sorted(set(tasks) ^ set(evidence.current)) or ["none"]
        raise DataError(
            f"gate: both models need scores on the same tasks; on one side only: {', '.join(odd[:5])}"
        )
    observed = {task: evidence.candidate[task] - evidence.current[task] for task in tasks}
    drawn = {
        task: _differences(config, task, evidence)
        for task in tasks
        if all(evidence.items.get(task, ((), ())))
    }
    worse = holm({task: one_sided_p(values) for task, values in drawn.items()})
    better = holm({task: one_sided_p(-values) for task, values in drawn.items()})
    found = []
    for task in tasks:
        low, high = interval(drawn[task]) if task in drawn else (None, None)
        found.append(
            TaskComparison(
                task,
                evidence.candidate[task],
                evidence.current[task],
                round(observed[task], _DECIMALS),
                low,
                high,
                worse.get(task),
                better.get(task),
                _result(config, worse.get(task), better.get(task)),
            )
        )
    total = np.zeros(config.resamples)
    for task in tasks:  # a task without items counts with its difference and no spread
        total += drawn.get(task, np.full(config.resamples, observed[task]))
    low, high = interval(total / len(tasks))
    return found, {"difference": float(np.mean(list(observed.values()))), "low": low, "high": high}


def _differences(config: GateConfig, task: str, evidence: Evidence) -> Floats:
    """Bootstrap differences on one task [resamples]."""
    ours, theirs = ({stratum.key: stratum for stratum in strata} for strata in evidence.items[task])
    for key in sorted(set(ours) | set(theirs)):
        if key not in ours or key not in theirs or set(ours[key].items) != set(theirs[key].items):
            raise DataError(f"gate: task {task!r}, {key}: the models were not scored on the same items")
    keys = sorted(ours)
    pairs = [[ours[key] for key in keys], [_in_order(theirs[key], ours[key].items) for key in keys]]
    scores = resampled(pairs, config.resamples, config.seed)
    return np.asarray(scores[0] - scores[1])


def _in_order(stratum: Stratum, items: tuple[str, ...]) -> Stratum:
    place = {item: number for number, item in enumerate(stratum.items)}
    order = [place[item] for item in items]
    targets = None if stratum.targets is None else stratum.targets[order]
    return Stratum(stratum.key, stratum.statistic, items, stratum.values[order], targets)


def _result(config: GateConfig, worse: float | None, better: float | None) -> Result:
    if worse is None or better is None:
        return "not tested"
    if worse < config.significance:
        return "worse"
    return "better" if better < config.significance else "equal"


def _mean_check(config: GateConfig, mean: Mapping[str, float]) -> Check:
    text = (
        f"mean over tasks {mean['difference']:+.4f}, 95 % interval {mean['low']:+.4f} to {mean['high']:+.4f}"
    )
    if config.require == "better":
        return Check("mean", mean["low"] > 0, f"{text}; required: above 0")
    allowed = config.tolerance("*") or 0.0
    return Check("mean", mean["low"] >= -allowed, f"{text}; required: not below {-allowed:+.4f}")


def _tolerance_check(config: GateConfig, tasks: Sequence[TaskComparison]) -> Check:
    broken = [
        f"{entry.task} {entry.difference:+.4f}, tolerated {-drop:+.4f}"
        for entry in tasks
        if (drop := config.tolerance(entry.task)) is not None and entry.difference < -drop
    ]
    text = (
        f"drops beyond the no-regression list: {'; '.join(broken)}"
        if broken
        else "no task of the no-regression list drops beyond its tolerance"
    )
    return Check("no_regression", not broken, text)


def _significance_check(config: GateConfig, tasks: Sequence[TaskComparison]) -> Check:
    lost = [
        f"{entry.task} {entry.difference:+.4f} (p {entry.p_worse:.4f})"
        for entry in tasks
        if entry.result == "worse"
    ]
    won = sum(entry.result == "better" for entry in tasks)
    tested = sum(entry.result != "not tested" for entry in tasks)
    if lost:
        return Check(
            "significance", False, f"significantly worse, Holm over {tested} tasks: {'; '.join(lost)}"
        )
    return Check(
        "significance",
        True,
        f"significantly better on {won} of {tested} tasks, worse on none (Holm, level {config.significance:g})",
    )


def _borda_check(config: GateConfig, evidence: Evidence) -> list[Check]:
    if config.min_borda_gain is None or evidence.standings is None:
        return []
    candidate, current = evidence.standings
    gain = candidate.votes - current.votes
    text = f"Borda {gain:+g} votes (rank {candidate.rank} against {current.rank}, pool {evidence.pool}); required: at least {config.min_borda_gain:+g}"
    return [Check("borda", gain >= config.min_borda_gain, text)]


def _latency_check(config: GateConfig, evidence: Evidence) -> list[Check]:
    if evidence.latency is None:
        return []
    candidate, current = evidence.latency
    return _limits(
        "latency", candidate, current, "ms a query", config.max_latency_ratio, config.max_latency_milliseconds
    )


def _size_check(config: GateConfig, evidence: Evidence) -> list[Check]:
    candidate, current = (size / 2**20 for size in evidence.size)
    return _limits("size", candidate, current, "MiB of weights", config.max_size_ratio, config.max_size_mib)


def _limits(
    name: str, candidate: float, current: float, unit: str, ratio: float | None, most: float | None
) -> list[Check]:
    seen = f"{candidate:,.1f} {unit} against {current:,.1f}"
    checks = []
    if ratio is not None:
        checks.append(Check(name, candidate <= ratio * current, f"{seen}; allowed: {ratio:g} times as much"))
    if most is not None:
        checks.append(Check(name, candidate <= most, f"{seen}; allowed: {most:g}"))
    return checks
