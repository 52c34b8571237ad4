"""The gate at work: evidence from an evaluation, the decision, and where its verdict is kept."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from embedloom import __version__
from embedloom.config.gate import GateConfig
from embedloom.config.resources import PoolConfig
from embedloom.encoder.device import DTypeName
from embedloom.encoder.registry import open_model
from embedloom.errors import DataError
from embedloom.evaluation.benchmark_instructions import TASK_TYPES
from embedloom.evaluation.evaluator import Evaluator
from embedloom.evaluation.gate import Evidence, decide
from embedloom.evaluation.jobs import Scorer, Unit
from embedloom.evaluation.pinned import load_pool
from embedloom.evaluation.results import SCORES_FILE
from embedloom.evaluation.scorers import make_scorers
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.standings import OWN, ranked_among, read_strata
from embedloom.instructions import USUAL_TASK
from embedloom.model_folder import ModelFolder
from embedloom.records import ScoreTable
from embedloom.storage import Place
from embedloom.verdict import GATE_FILE, VERDICTS_FOLDER

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
    folder: Path


def judge(
    config: GateConfig,
    place: Place,
    contenders: tuple[Contender, Contender],
    pool: str | None,
    workers: PoolConfig,
    dtype: DTypeName,
) -> dict[str, Any]:
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
    )
    decision = decide(config, evidence)
    return {
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


def store_verdict(folder: Place, content: Mapping[str, Any], results: Place | None = None) -> str:
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


def verdict_text(content: Mapping[str, Any]) -> str:
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
    scorers, _ = make_scorers({contender.name: contender.folder for contender in contenders}, (), None)
    with Evaluator((), None, workers, place, place, dtype, 1) as evaluator:
        found = evaluator.time(scorers, TIMED_QUERIES)
    candidate, current = (found[contender.name]["p50_milliseconds"] for contender in contenders)
    return candidate, current


def _weight_bytes(folder: Path) -> int:
    """Of all modules: a foreign transformer may lie in a folder of its own, with layers after the pooling beside it."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
