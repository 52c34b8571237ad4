"""The two last artefacts of a run, ``evaluation`` and ``gate``: which models they are about, from what they follow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.cluster.config import Profile
from embedloom.config.run import RunConfig
from embedloom.config.use import EvaluationTask
from embedloom.errors import ConfigError
from embedloom.storage import Place

VERDICT_FILE = "verdict.json"


def task_files(tasks: Sequence[EvaluationTask], pool: str | None = None) -> dict[str, list[int]]:
    """Size and modification time of every file that local tasks and the pool are read from: part of the fingerprint."""
    roots = [Path(task.path).expanduser() for task in tasks if task.path is not None]
    if pool is not None:
        roots.append(Path(pool).expanduser())
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*")))]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}


def open_dev_tasks(config: RunConfig, corpus: Artefact | None) -> Any:
    """What training is to be scored on while it goes on, checked; None without ``training.dev``.

    Raises:
        UserError: a task that cannot be scored, or that the run is judged on.
    """
    if config.training.dev is None:
        return None
    from embedloom.evaluation.in_training import dev_tasks

    return dev_tasks(config.training.dev, config.evaluation.tasks, corpus)


def build_evaluation(
    config: RunConfig, profile: Profile, run: Place, inputs: dict[str, Artefact], out: ArtefactWriter
) -> Artefact:
    """Score base, candidates and merged model beside the baselines.

    Raises:
        UserError: a task, model or baseline that cannot be scored.
        StageError: some scores failed.
    """
    from embedloom.encoder.registry import resolve_model
    from embedloom.evaluation.stage import evaluate

    last = config.training.stages[-1].name
    models = {"base": inputs["encoder"].place.local}
    models |= {c.name: inputs[f"training/{c.name}/{last}"].place.local for c in config.training.candidates}
    models["merged"] = inputs["merged"].place.local
    teacher = config.mining.teachers[0].model
    if "teacher" in config.evaluation.baselines and config.mining.teachers[0].engine == "openai":
        raise ConfigError(
            "evaluation.baselines: 'teacher' needs a model folder, the first teacher is an endpoint"
        )
    baseline = (teacher, resolve_model(teacher)) if "teacher" in config.evaluation.baselines else None
    return evaluate(
        config.evaluation,
        inputs["corpus"],
        models,
        baseline,
        profile.stages.evaluation,
        out,
        config.encoder.dtype,
        run.child("_evaluation_vectors"),
    )


def build_gate(
    config: RunConfig, profile: Profile, inputs: dict[str, Artefact], out: ArtefactWriter
) -> Artefact:
    """Judge the candidate against the current model; the verdict also goes beside the candidate's weights."""
    from embedloom.evaluation.gate_stage import Contender, judge, store_verdict

    rules = config.gate
    candidate, current = (artefact for name, artefact in inputs.items() if name != "evaluation")
    contenders = (
        Contender(rules.candidate, candidate.place.local),
        Contender(rules.against, current.place.local),
    )
    verdict: dict[str, Any] = judge(
        rules,
        inputs["evaluation"].place,
        contenders,
        config.evaluation.pool,
        profile.stages.evaluation,
        config.encoder.dtype,
    )
    out.place.write_json(VERDICT_FILE, verdict)
    store_verdict(candidate.place, verdict)
    return out.commit({"rows": len(verdict["tasks"]), "verdict": verdict["verdict"]})
