"""The two last artefacts of a run, ``evaluation`` and ``gate``: which models they are about, from what they follow."""

from collections.abc import Mapping, Sequence
from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.cluster.config import Profile
from embedloom.config.run import RunConfig
from embedloom.config.use import EvaluationTask
from embedloom.contents import Contents, digest, path_contents
from embedloom.encoder.registry import local_contents
from embedloom.errors import ConfigError
from embedloom.formats import files_at
from embedloom.storage import Place

VERDICT_FILE = "verdict.json"


def task_contents(tasks: Sequence[EvaluationTask], pool: str | None = None) -> dict[str, Contents]:
    """What the files hold that local tasks and the pool are read from, by the path the config names."""
    paths = [task.path for task in tasks if task.path is not None] + ([] if pool is None else [pool])
    return {path: path_contents(path) for path in paths if files_at(path)}


def without_paths(section: dict[str, Any], contents: Mapping[str, Contents]) -> dict[str, Any]:
    """An evaluation or dev section without where its files lie: what they hold decides."""
    tasks = [{**task, "path": None} if task["path"] in contents else task for task in section["tasks"]]
    found = {**section, "tasks": tasks}
    return {**found, "pool": None} if section.get("pool") in contents else found


def evaluation_node(config: RunConfig) -> tuple[tuple[Any, ...], dict[str, Contents]]:
    """What of the config decides the scores, and the contents of the files that are read for them."""
    section, teacher = config.evaluation, config.mining.teachers[0]
    tasks = task_contents(section.tasks, section.pool)
    reads = dict(tasks)
    scored, code = "teacher" in section.baselines, teacher.trust_remote_code
    if scored and (held := local_contents(teacher.model, code=code)) is not None:
        reads[teacher.model] = held
    files = {number: digest(held) for number, held in enumerate(tasks.values())}
    settings: tuple[Any, ...] = (without_paths(section.model_dump(mode="json"), tasks), teacher.model, files)
    settings += ("trust_remote_code",) if scored and code else ()
    return (*settings, digest(reads[teacher.model])) if teacher.model in reads else settings, reads


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
    trust = config.mining.teachers[0].trust_remote_code
    baseline = (teacher, resolve_model(teacher, trust)) if "teacher" in config.evaluation.baselines else None
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
