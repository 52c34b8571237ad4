"""A run folder read back: which artefacts it has, their counts, losses and scores; and the scores as text for the terminal."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from embedloom.config.reranker import BASE_NODE, GATE_NODE, MODEL_NODE, SCORES_NODE
from embedloom.core.artefacts import BUILDING_FILE, MANIFEST_FILE, Artefact, Manifest
from embedloom.core.storage import Place
from embedloom.core.tables import text_table
from embedloom.errors import DataError


def score_rows(scores: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """(label, kind, score by task) of base, candidates, merged model and baselines, in that order.

    ``kind`` is base, candidate, merged or baseline.
    """
    rows = [("base", "base", scores.get("base", {}))]
    candidates = in_order(scores.get("candidates", {}), scores, "models")
    rows += [(name, "candidate", scores["candidates"][name]) for name in candidates]
    rows.append(("merged", "merged", scores.get("merged", {})))
    for name in in_order(scores.get("baselines", {}), scores, "baselines"):
        rows.append((label_of(name, scores), "baseline", scores["baselines"][name]))
    return [row for row in rows if row[2]]


def label_of(name: str, scores: dict[str, Any]) -> str:
    """A model's name in ``scores.json``, for people: the teacher with the model it is."""
    return f"teacher {scores['teacher']}" if name == "teacher" and "teacher" in scores else name


def task_names(scores: dict[str, Any]) -> list[str]:
    """All tasks in the order of the config."""
    return in_order({task for _, _, by_task in score_rows(scores) for task in by_task}, scores, "tasks")


def in_order(names: Iterable[str], scores: dict[str, Any], kind: str) -> list[str]:
    """Names of ``models``, ``baselines`` or ``tasks`` as the evaluation recorded them, then any others by name."""
    order = scores.get("order", {}).get(kind, [])
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def interval_text(scores: dict[str, Any], name: str, task: str) -> str:
    """``0.3912 to 0.4311``, the bootstrap interval of a score; empty where there is none."""
    for group in scores.get("intervals", {}).values():
        if task in group.get(name, {}):
            low, high = group[name][task]
            return f"{low:.4f} to {high:.4f}"
    return ""


def _prompt_lines(prompts: dict[str, Any]) -> list[str]:
    """A line for every task that was not scored as the endpoint asks by default."""
    other = {
        task: entry["of"]
        for task, by_model in prompts.items()
        for entry in by_model.values()
        if entry["sent"] != [entry["default"]]
    }
    return [f"prompts of {task}: {of}, not what the endpoint sends by default" for task, of in other.items()]


def summary_table(summary: dict[str, Any]) -> str:
    """Scores of base, candidates, merged model and baselines, one column a task; plain ASCII."""
    rows = score_rows(summary["scores"])
    if not rows:
        return "no scores yet: the evaluation has not finished"
    tasks = task_names(summary["scores"])
    single = len(tasks) == 1  # an interval beside each of many scores would hide the scores
    header = ["model", "kind", *tasks, *(["95 % interval"] if single else [])]
    body = []
    for label, kind, by_task in rows:
        cells = [f"{by_task[task]:.5f}" if task in by_task else "-" for task in tasks]
        name = "teacher" if label.startswith("teacher ") and kind == "baseline" else label
        body.append(
            [label, kind, *cells, *([interval_text(summary["scores"], name, tasks[0])] if single else [])]
        )
    lines = text_table(header, body, (0, 1))
    lines += _prompt_lines(summary["scores"].get("prompts", {}))
    gate = summary.get("gate", {})
    if "checks" in gate:
        lines.append(_verdict_line("gate", gate))
    reranker = summary.get("reranker", {})
    if "checks" in reranker:
        lines += [
            f"{task}: reranked {entry['candidate']:.5f}, not reranked {entry['current']:.5f}"
            for task, entry in reranker["tasks"].items()
        ]
        lines.append(_verdict_line("reranker", reranker))
    return "\n".join(lines)


def _verdict_line(name: str, verdict: dict[str, Any]) -> str:
    return (
        f"{name}: {verdict['candidate']} against {verdict['against']}: {verdict['verdict']}: "
        f"{'; '.join(verdict['reasons'])}"
    )


State = Literal["finished", "unfinished"]
Curve = list[tuple[float, float]]

_BEFORE_TRAINING = ("corpus", "encoder", "synthesis", "mining", "rescoring", "examples")
_AFTER_TRAINING = (
    "merged", "evaluation", "gate", BASE_NODE, MODEL_NODE, SCORES_NODE, GATE_NODE, "vectors",
)  # fmt: skip
_METRICS_FILE = "metrics.jsonl"  # training's own record, one line a step
_SCORES_FILE = "scores.json"
_VERDICT_FILE = "verdict.json"


@dataclass(frozen=True, slots=True)
class Stage:
    """One artefact of a run, finished or not."""

    name: str  # its folder below the run
    place: Place
    manifest: Manifest | None

    @property
    def state(self) -> State:
        """Finished means that its manifest is there."""
        return "unfinished" if self.manifest is None else "finished"

    @property
    def counts(self) -> dict[str, Any]:
        """Rows, tokens, rejects by reason."""
        return dict(self.manifest["counts"]) if self.manifest else {}

    @property
    def seconds(self) -> float | None:
        """Wall time, if finished."""
        return float(self.manifest["seconds"]) if self.manifest else None

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the artefacts it was made from, by name."""
        return dict(self.manifest["inputs"]) if self.manifest else {}


def read_stages(run: Place) -> list[Stage]:
    """All artefacts of a run that were at least begun, in pipeline order.

    Raises:
        DataError: the folder holds no artefact, or a corrupt manifest.
    """
    names = [*_BEFORE_TRAINING, *_training_names(run), *_AFTER_TRAINING]
    stages = [_stage(run, name) for name in names if _begun(run.child(name))]
    if not stages:
        raise DataError(
            f"{run.uri}: no artefact of a run here; expected folders such as {', '.join(_BEFORE_TRAINING)}"
        )
    return stages


def _begun(place: Place) -> bool:
    return place.exists(MANIFEST_FILE) or place.exists(BUILDING_FILE)


def _stage(run: Place, name: str) -> Stage:
    place = run.child(name)
    manifest = Artefact.open(place).manifest if place.exists(MANIFEST_FILE) else None
    return Stage(name, place, manifest)


def _training_names(run: Place) -> list[str]:
    """``training/<candidate>/<stage>``, the stages of a candidate in the order they build on each other."""
    found = []
    for candidate in run.names("training"):
        stages = {name: _stage(run, name) for name in run.names(candidate) if _begun(run.child(name))}

        def depth(name: str, stages: dict[str, Stage] = stages) -> int:
            parents = [parent for parent in stages[name].inputs if parent in stages]
            return 1 + max((depth(parent) for parent in parents), default=0)

        # An unfinished stage has no manifest yet and is the last one begun.
        found += sorted(stages, key=lambda name: (stages[name].manifest is None, depth(name), name))
    return found


def loss_curve(stage: Stage) -> Curve:
    """(step, loss) points of a training stage, also of one still running; steps without a finite loss are left out."""
    if stage.manifest is not None:
        points = stage.manifest["details"].get("loss_curve", [])
    elif stage.place.exists(_METRICS_FILE):
        lines = stage.place.read_bytes(_METRICS_FILE).decode().splitlines()
        records = [record for record in map(_json_object, lines) if "step" in record and "loss" in record]
        points = [(record["step"], record["loss"]) for record in records]
    else:
        points = []
    return [(float(step), float(loss)) for step, loss in points if math.isfinite(float(loss))]


def _json_object(line: str) -> dict[str, Any]:
    """The object of one line; the last line of a killed writer may be cut and counts as empty."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_score_file(stages: list[Stage]) -> dict[str, Any]:
    """``scores.json`` of a finished evaluation, else an empty object."""
    done = [stage for stage in stages if stage.name == "evaluation" and stage.manifest is not None]
    return done[0].place.read_json(_SCORES_FILE) if done else {}


def read_verdict_file(stages: list[Stage], name: str = "gate") -> dict[str, Any]:
    """``verdict.json`` of a finished gate, else ``{"verdict": "not_run"}``."""
    done = [stage for stage in stages if stage.name == name and stage.manifest is not None]
    return done[0].place.read_json(_VERDICT_FILE) if done else {"verdict": "not_run"}


def build_summary(run: Place, stages: list[Stage]) -> dict[str, Any]:
    """Content of ``summary.json``."""
    reranks = any(stage.name == GATE_NODE for stage in stages)
    return {
        "run": run.uri.rstrip("/").rsplit("/", 1)[-1],
        "stages": {stage.name: _figures(stage) for stage in stages},
        "scores": _scores(read_score_file(stages)),
        "gate": read_verdict_file(stages),
        **({"reranker": read_verdict_file(stages, GATE_NODE)} if reranks else {}),
    }


def _figures(stage: Stage) -> dict[str, Any]:
    """Every count of a stage; rows, tokens and seconds are always there, null where a stage has none."""
    counts = stage.counts
    return {
        **counts,
        "state": stage.state,
        "rows": counts.get("rows"),
        "tokens": counts.get("tokens"),
        "seconds": stage.seconds,
    }


def _scores(content: dict[str, Any]) -> dict[str, Any]:
    models = dict(content.get("models", {}))
    scores = {
        "base": models.pop("base", {}),
        "merged": models.pop("merged", {}),
        "candidates": models,
        "baselines": content.get("baselines", {}),
    }
    shown = ("order", "teacher", "intervals", "ranking", "subsets", "prompts")
    return {**scores, **{key: content[key] for key in shown if key in content}}
