"""The gate: may this model replace that one? The decision, the evidence it is made from, and where the verdict is kept."""

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from safetensors import safe_open

from embedloom import __version__
from embedloom.config.cluster import PoolConfig
from embedloom.config.evaluation import GateConfig
from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import USUAL_TASK
from embedloom.core.schemas import ScoreTable
from embedloom.core.storage import Place
from embedloom.core.verdict import GATE_FILE, PASSED, REFUSED, VERDICTS_FOLDER, Verdict
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.registry import NodeModel, open_model
from embedloom.errors import DataError
from embedloom.evaluation.evaluator import Evaluator
from embedloom.evaluation.jobs import Scorer, Unit
from embedloom.evaluation.leaderboard import OWN, Standing, load_pool, ranked_among, read_strata
from embedloom.evaluation.results import SCORES_FILE
from embedloom.evaluation.scorers import HYBRID, make_scorers
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.statistics import Floats, Stratum, holm, interval, one_sided_p, resampled
from embedloom.evaluation.texts import TASK_TYPES

# May this model replace that one? The decision, from scores and items alone; pure.
#
# Every task is tested by a paired bootstrap over its items, and the tasks' p-values are corrected by Holm, so the chance
# of refusing an equal model for a loss on any task stays at ``significance``, however many tasks there are.


Result = Literal["better", "worse", "equal", "not tested"]
_DECIMALS = 6


# Of one model or baseline: task -> main score, and task -> its items.
Scores = Mapping[str, float]
Items = Mapping[str, Sequence[Stratum]]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What models are shown beside: BM25, or the teacher."""

    name: str
    scores: Scores
    items: Items


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured of the two models."""

    candidate: Mapping[str, float]  # task -> main score
    current: Mapping[str, float]
    items: Mapping[str, tuple[Sequence[Stratum], Sequence[Stratum]]]  # task -> strata of both
    standings: tuple[Standing, Standing] | None = None  # candidate, current, within one pool
    pool: str = ""
    latency: tuple[float, float] | None = None  # milliseconds of one query, median
    size: tuple[int, int] = (0, 0)  # bytes of weight files
    parameters: tuple[int, int] = (0, 0)
    baselines: Sequence[Baseline] = ()

    def beside(self, baseline: Baseline) -> "Evidence":
        """The candidate's scores and items with a baseline's in place of the current model's."""
        items = {task: (ours, baseline.items.get(task, ())) for task, (ours, _) in self.items.items()}
        return Evidence(self.candidate, baseline.scores, items)


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
        _mean_check(config.require, config, mean),
        *_baseline_check(config, evidence),
        _tolerance_check(config, tasks),
        _significance_check(config, tasks),
        *_borda_check(config, evidence),
        *_latency_check(config, evidence),
        *_size_check(config, evidence),
    ]
    verdict = PASSED if all(check.passed for check in checks) else REFUSED
    found: dict[str, Any] = {"size_bytes": list(evidence.size), "parameters": list(evidence.parameters)}
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


def _mean_check(
    require: Literal["better", "not_worse"], config: GateConfig, mean: Mapping[str, float]
) -> Check:
    text = _mean_text(mean)
    if require == "better":
        return Check("mean", mean["low"] > 0, f"{text}; required: above 0")
    allowed = config.tolerance("*") or 0.0
    return Check("mean", mean["low"] >= -allowed, f"{text}; required: not below {-allowed:+.4f}")


def _mean_text(mean: Mapping[str, float]) -> str:
    return (
        f"mean over tasks {mean['difference']:+.4f}, 95 % interval {mean['low']:+.4f} to {mean['high']:+.4f}"
    )


def _baseline_check(config: GateConfig, evidence: Evidence) -> list[Check]:
    """Against the strongest baseline that has scores on every task; a word matcher has none on some kinds."""
    complete = [
        baseline for baseline in evidence.baselines if set(baseline.scores) == set(evidence.candidate)
    ]
    if not complete:
        if config.require_over_baseline is None:
            return []
        names = ", ".join(baseline.name for baseline in evidence.baselines) or "none"
        raise DataError(
            f"gate.require_over_baseline is {config.require_over_baseline}, but no baseline was scored on all tasks "
            f"(evaluation.baselines: {names}); allowed: a baseline that scores them, or null"
        )
    strongest = max(complete, key=lambda baseline: float(np.mean(list(baseline.scores.values()))))
    _, mean = _compare(config, evidence.beside(strongest))
    of = (
        f"{strongest.name}, the strongest baseline" if len(complete) > 1 else f"the baseline {strongest.name}"
    )
    if config.require_over_baseline is None:
        return [Check("baseline", True, f"against {of}: {_mean_text(mean)}; nothing required")]
    check = _mean_check(config.require_over_baseline, config, mean)
    return [Check("baseline", check.passed, f"against {of}: {check.text}")]


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
    # By parameters, not bytes: a base may be stored in bfloat16 and what was trained from it in float32, and a server
    # holds both in the type that it computes in.
    candidate, current = (count / 1e6 for count in evidence.parameters)
    by_count = _limits("size", candidate, current, "million parameters", config.max_size_ratio, None)
    stored, current_stored = (size / 2**20 for size in evidence.size)
    return by_count + _limits("size", stored, current_stored, "MiB of weights", None, config.max_size_mib)


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


# The gate at work: evidence from an evaluation, the decision, and where its verdict is kept.


# Single queries of everyday lengths; what they ask does not matter, how long they are does.
TIMED_QUERIES = tuple(
    f"{question} {topic}"
    for topic in ("in a large sorted array", "of a weighted graph with negative edges", "over HTTP", "as UTF-8 text")
    for question in ("how do I find the smallest element", "shortest path", "what is the best way to read a value",
                     "convert", "why does it fail to open a file", "list all neighbours", "remove duplicates",
                     "explain step by step how to measure the time it takes to compute the result")
)  # fmt: skip


# What a verdict says of prompts that are not the endpoint's default.
_PROMPTS_MEAN = {
    "own": ", which the endpoint sends by default or to whoever names the task",
    "published": ", not what the endpoint sends by default",
}


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the two models."""

    name: str  # in scores.json and below items/
    folder: Path  # on this machine
    named: NodeModel | None = None  # what other machines open it by; None: the folder, which they see too

    @property
    def travels(self) -> Path | NodeModel:
        """What every node opens the model by."""
        return self.folder if self.named is None else self.named


def judge(
    config: GateConfig,
    place: Place,
    contenders: tuple[Contender, Contender],
    pool: str | None,
    workers: PoolConfig,
    dtype: DTypeName,
) -> Verdict:
    """Decide from a finished evaluation.

    Args:
        config: the rules.
        place: the evaluation, with ``scores.json`` and ``items/`` of both models.
        contenders: candidate and current model.
        pool: models to rank among; None: the evaluation's own models and baselines.
        workers: actors, for the latency if a limit asks for it.
        dtype: compute type of the timing.

    Returns:
        The content of ``gate.json``, not written yet.

    Raises:
        DataError: a model that the evaluation has no scores of, or a candidate that was evaluated with other prompts
            than the endpoint sends by default.
    """
    table = cast(ScoreTable, place.read_json(SCORES_FILE))
    scores = [_scores_of(contender, table, place) for contender in contenders]
    prompts = check_prompts(table, contenders[0])
    types = dict(table.get("types", {}))
    own = {**table["models"], **table["baselines"]}
    pinned = None if pool is None else load_pool(Path(pool).expanduser(), types)
    ranked, _ = ranked_among(own, types, pinned)
    standing = {entry.model: entry for entry in ranked}
    candidate, current = contenders
    evidence = Evidence(
        scores[0],
        scores[1],
        {task: (_strata(place, candidate, task), _strata(place, current, task)) for task in scores[0]},
        (standing[candidate.name], standing[current.name]),
        OWN if pinned is None else f"{pinned.source} ({pinned.fingerprint}), {len(ranked)} models",
        _latency(config, contenders, workers, place, dtype),
        (_weight_bytes(candidate.folder), _weight_bytes(current.folder)),
        (_parameters(candidate.folder), _parameters(current.folder)),
        _baselines(place, table),
    )
    decision = decide(config, evidence)
    found = {
        **decision.as_json(),
        "prompts": prompts,
        "candidate": candidate.name,
        "against": current.name,
        "weights": ModelFolder(candidate.folder).weights,
        "against_weights": ModelFolder(current.folder).weights,
        "rules": config.model_dump(mode="json"),
        "created": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "version": __version__,
    }
    return cast(Verdict, found)


def check_prompts(table: ScoreTable, candidate: Contender) -> dict[str, str]:
    """By which prompts the candidate was scored, task by task: the ones that the endpoint would send, or stated ones.

    Accepted are the default of the task's type, named tasks of the candidate's contract, and a benchmark's published
    instructions where the task states ``prompts: published``.

    Args:
        table: content of ``scores.json``; one of an earlier version records no prompts, and the result says so.
        candidate: the model that would be served.

    Raises:
        DataError: other prompts, with both texts.
    """
    contract = open_model(candidate.folder).scored_contract
    found = {}
    for task in table["models"][candidate.name]:
        entry = table.get("prompts", {}).get(task, {}).get(candidate.name)
        found[task] = "not recorded" if entry is None else str(entry["of"])
        if entry is None or (entry["of"] == "published" and entry["stated"]):
            continue
        kind = TASK_TYPES[table["types"][task]]
        default = contract.format("{text}", "query", None if kind == USUAL_TASK else kind)
        sendable = {default, *(contract.format("{text}", "query", name) for name in contract.tasks or {})}
        other = next((text for text in entry["sent"] if text not in sendable), None)
        if other is not None:
            raise DataError(
                f"gate: {task} was evaluated with {other!r}, but by default the endpoint sends {default!r}; evaluate what is "
                "served (prompts: default), train with that instruction, or state evaluation.prompts: published"
            )
    return found


def store_verdict(folder: Place, content: Verdict, results: Place | None = None) -> str:
    """Write a verdict where it belongs; returns where that is.

    Args:
        folder: of the model that it is about.
        content: of ``gate.json``, which lies beside the weights where embedloom made them.
        results: of the gate; a foreign model's verdict goes there, by the model's name. None: always beside the weights.
    """
    name = GATE_FILE
    if results is not None and not (folder.is_local and ModelFolder(folder.local).keeps_verdict):
        folder, name = results, f"{VERDICTS_FOLDER}/{content['candidate']}.json"
    folder.write_json(name, content)
    return f"{folder.uri.rstrip('/')}/{name}"


def verdict_text(content: Verdict) -> str:
    """The verdict for people: a line a check, a line a task."""
    lines = [f"gate: {content['candidate']} against {content['against']}: {str(content['verdict']).upper()}"]
    lines += [
        f"  {'ok  ' if check['passed'] else 'FAIL'} {check['name']}: {check['text']}"
        for check in content["checks"]
    ]
    for task, prompts in content.get("prompts", {}).items():
        if prompts != "default":
            lines.append(f"       {task}: prompts {prompts}{_PROMPTS_MEAN.get(prompts, '')}")
    width = max(len(task) for task in content["tasks"])
    for task, entry in content["tasks"].items():
        spread = "" if entry["low"] is None else f"  [{entry['low']:+.4f}, {entry['high']:+.4f}]"
        lines.append(
            f"       {task:<{width}}  {entry['current']:.4f} -> {entry['candidate']:.4f}  {entry['difference']:+.4f}{spread}  {entry['result']}"
        )
    return "\n".join(lines)


def _scores_of(contender: Contender, table: ScoreTable, place: Place) -> dict[str, float]:
    models = table["models"]
    if contender.name not in models:
        raise DataError(
            f"gate: {place.uri} has no scores of {contender.name!r}; it has {', '.join(sorted(models))}"
        )
    return dict(models[contender.name])


def _baselines(place: Place, table: ScoreTable) -> list[Baseline]:
    return [
        Baseline(
            f"{name} {table['teacher']}" if name == "teacher" and "teacher" in table else name,
            dict(scores),
            {
                task: read_strata(place, Unit(Scorer(name, "baselines", "", ""), TaskSpec(task)))
                for task in scores
            },
        )
        for name, scores in table["baselines"].items()
        if name != HYBRID  # it has the model itself in it
    ]


def _strata(place: Place, contender: Contender, task: str) -> Sequence[Any]:
    return read_strata(place, Unit(Scorer(contender.name, "models", "", ""), TaskSpec(task)))


def _latency(
    config: GateConfig,
    contenders: tuple[Contender, Contender],
    workers: PoolConfig,
    place: Place,
    dtype: DTypeName,
) -> tuple[float, float] | None:
    if not config.measures_latency:
        return None
    scorers, _ = make_scorers({contender.name: contender.travels for contender in contenders}, (), None)
    with Evaluator((), None, workers, place, place, dtype, 1) as evaluator:
        found = evaluator.time(scorers, TIMED_QUERIES)
    candidate, current = (found[contender.name]["p50_milliseconds"] for contender in contenders)
    return candidate, current


def _weight_bytes(folder: Path) -> int:
    """Of all modules: a foreign transformer may lie in a folder of its own, with layers after the pooling beside it."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _parameters(folder: Path) -> int:
    """Elements of all tensors of the same files, by their headers."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
