"""Reading a run folder back: which artefacts it has, their counts, losses and scores."""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from embedloom.artefacts import BUILDING_FILE, MANIFEST_FILE, Artefact, Manifest
from embedloom.errors import DataError
from embedloom.storage import Place

State = Literal["finished", "unfinished"]
Curve = list[tuple[float, float]]

_BEFORE_TRAINING = ("corpus", "encoder", "synthesis", "mining", "rescoring", "examples")
_AFTER_TRAINING = ("merged", "evaluation", "gate", "vectors")
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


def read_verdict_file(stages: list[Stage]) -> dict[str, Any]:
    """``verdict.json`` of a finished gate, else ``{"verdict": "not_run"}``."""
    done = [stage for stage in stages if stage.name == "gate" and stage.manifest is not None]
    return done[0].place.read_json(_VERDICT_FILE) if done else {"verdict": "not_run"}


def build_summary(run: Place, stages: list[Stage]) -> dict[str, Any]:
    """Content of ``summary.json``."""
    return {
        "run": run.uri.rstrip("/").rsplit("/", 1)[-1],
        "stages": {stage.name: _figures(stage) for stage in stages},
        "scores": _scores(read_score_file(stages)),
        "gate": read_verdict_file(stages),
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
