"""``embedloom gate`` and ``embedloom leaderboard`` without a run config: any model folders, tasks and pools."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedloom.artefacts import Artefact
from embedloom.cluster.config import ClusterConfig
from embedloom.config.base import FrozenConfig, apply_overrides, validate
from embedloom.config.gate import GateConfig
from embedloom.config.use import EvaluationConfig
from embedloom.contents import is_trusted
from embedloom.encoder.registry import check_model_name
from embedloom.errors import ConfigError, DataError
from embedloom.judging import VERDICT_FILE
from embedloom.launch import execute
from embedloom.model_folder import ModelFolder
from embedloom.run import Run
from embedloom.storage import Place
from embedloom.verdict import REFUSED

EXIT_REFUSED = 1


class GateSections(FrozenConfig):
    """The two sections that a gate reads."""

    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()


@dataclass(frozen=True, slots=True)
class GateRequest:
    """What the command line asks for."""

    candidate: str
    against: str
    tasks: Sequence[str]  # paths, mteb tasks or benchmarks; empty: the run's
    split: str
    limit: int | None
    pool: str | None
    out: str
    overrides: Sequence[str]
    prompts: str | None = None  # of mteb tasks and benchmarks
    trust_remote_code: bool = False  # whether code beside the weights of either is run


def gate_sections(request: GateRequest, run: Run | None) -> GateSections:
    """The rules and tasks: the run's, if given, with what the command line says on top.

    Raises:
        ConfigError: no task, or a key that does not exist.
    """
    content: dict[str, Any] = {"evaluation": {"baselines": ["bm25"]}, "gate": {}}
    if run is not None:
        content = {
            "evaluation": run.config.evaluation.model_dump(mode="json"),
            "gate": run.config.gate.model_dump(mode="json"),
        }
        content["evaluation"]["baselines"] = ["bm25"]  # the teacher took no part in what is compared here
    if request.tasks:
        content["evaluation"]["tasks"] = [task_entry(task, request) for task in request.tasks]
    elif run is None:
        raise ConfigError(
            "--task: needed; a folder of local tasks, a BEIR folder, an mteb task or benchmark, or give --config"
        )
    if request.prompts is not None:
        content["evaluation"]["prompts"] = request.prompts
    if request.pool is not None:
        content["evaluation"]["pool"] = request.pool
    return validate(GateSections, apply_overrides(content, list(request.overrides)), "gate")


def task_entry(task: str, request: GateRequest) -> dict[str, Any]:
    """The config entry of a ``--task``."""
    path = Path(task).expanduser()
    if path.exists():
        kind = "beir" if (path / "corpus.jsonl").is_file() else "local"
        entry = {"name": path.stem, "kind": kind, "path": str(path), "split": request.split}
        return {**entry, "limit": request.limit} if request.limit is not None else entry
    if task.startswith((".", "/", "~")):
        raise DataError(f"--task: {task} does not exist; allowed: a path, an mteb task or an mteb benchmark")
    return {"name": task, "kind": "benchmark" if "(" in task else "mteb"}


def gate_models(
    request: GateRequest, run: Run | None, cluster: ClusterConfig, profile: str, dry_run: bool = False
) -> tuple[str, int]:
    """Evaluate two models, judge the first, store the verdict; what to print, and the exit code.

    A verdict lies beside the weights of a model that embedloom made, else in the results' folder.

    Raises:
        UserError: models, tasks, pool or rules that cannot be used.
    """
    sections = gate_sections(request, run)
    for name, where in ((request.candidate, "CANDIDATE"), (request.against, "--against")):
        check_model_name(name, where)
    if dry_run:
        tasks = ", ".join(task.name for task in sections.evaluation.tasks)
        return f"would judge {request.candidate} against {request.against} on {tasks}\n{request.out}", 0
    from embedloom.encoder.registry import resolve_model

    names, trust = (request.candidate, request.against), request.trust_remote_code
    models = [ModelFolder(resolve_model(name, trust)) for name in names]
    machine = cluster.profile(profile)
    from embedloom.cluster.session import ray_session

    with ray_session(machine, cluster.auth):
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.evaluation.gate_stage import Contender, judge, store_verdict, verdict_text
        from embedloom.evaluation.stage import score_models

        candidate, current = (
            Contender(f"{model.path.name}-{model.revision}", model.path) for model in models
        )
        if candidate.name == current.name:
            raise DataError(
                f"gate: {request.candidate} and {request.against} hold the same model {candidate.name}"
            )
        place = Place(request.out)
        dtype = "auto" if run is None else run.config.encoder.dtype
        workers = machine.stages.evaluation
        folders = {contender.name: contender.folder for contender in (candidate, current)}
        score_models(
            sections.evaluation, _corpus(run), folders, None, workers, place, dtype, place.child("_vectors")
        )
        verdict = judge(sections.gate, place, (candidate, current), sections.evaluation.pool, workers, dtype)
    if trusted := [model.name for model in (candidate, current) if is_trusted(model.folder)]:
        verdict["trust_remote_code"] = trusted
    where = store_verdict(Place(str(candidate.folder)), verdict, place)
    return f"{verdict_text(verdict)}\n{where}", EXIT_REFUSED if verdict["verdict"] == REFUSED else 0


def gate_run(run: Run, dry_run: bool) -> tuple[str, int]:
    """Judge a run's own models; what to print, and the exit code."""
    planned = execute(run, "gate", dry_run)
    if dry_run:
        return planned, 0
    from embedloom.evaluation.gate_stage import verdict_text

    place = run.place.child("gate")
    verdict = place.read_json(VERDICT_FILE)
    code = EXIT_REFUSED if verdict["verdict"] == REFUSED else 0
    return f"{verdict_text(verdict)}\n{place.uri}/{VERDICT_FILE}", code


def leaderboard(source: str, pool: str | None, top: int, partial_in_means: bool, html: Path | None) -> str:
    """Rank a run's models, an mteb results folder or a Parquet file of scores; the table, and the page if asked for.

    Args:
        source: a run folder, an evaluation artefact, a results folder or a Parquet file.
        pool: models to rank among, of the same forms.
        top: rows shown from the first on; our own models and their neighbours always are.
        partial_in_means: count scores on some of a task's subsets in the means.
        html: where to draw it.
    """
    from embedloom.evaluation.pinned import load_pool
    from embedloom.evaluation.ranking import rank_models
    from embedloom.evaluation.standings import ranked_among, shown_standings
    from embedloom.report.leaderboard import leaderboard_page, leaderboard_table

    own, types = _own_scores(Path(source).expanduser())
    if own is None:
        found = load_pool(Path(source).expanduser())
        if pool is None:
            ranked = rank_models(found.scores, found.types, found.partial, partial_in_means=partial_in_means)
            names: set[str] = set()
            about = f"{len(ranked)} models, {len(found.types)} tasks"
            about += (
                f"; left out, as no model has them whole: {', '.join(found.dropped)}" if found.dropped else ""
            )
        else:
            own, types = found.scores, found.types
    if own is not None:
        pinned = None if pool is None else load_pool(Path(pool).expanduser(), types)
        ranked, tasks = ranked_among(own, types, pinned)
        names = set(own)
        about = f"{len(ranked)} models, {len(tasks)} tasks" + (
            f", pool {pinned.source} ({pinned.fingerprint})" if pinned else ""
        )
    shown = [{"own": standing.model in names, "model": standing.model, **standing.as_json()}
             for standing in shown_standings(ranked, names, top)]  # fmt: skip
    text = leaderboard_table(shown, about)
    if html is None:
        return text
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(leaderboard_page(shown, about))
    return f"{text}\n{html}"


def _own_scores(source: Path) -> tuple[dict[str, dict[str, float]] | None, dict[str, str]]:
    """Models and baselines of a run or an evaluation; (None, {}) where the source is neither."""
    for folder in (source, source / "evaluation"):
        if (folder / "scores.json").is_file():
            table = Place(str(folder)).read_json("scores.json")
            return {**table["models"], **table["baselines"]}, dict(table.get("types", {}))
    return None, {}


def _corpus(run: Run | None) -> Artefact | None:
    """The run's corpus, for ``heldout`` tasks, if it is built."""
    if run is None or not run.place.exists("corpus/manifest.json"):
        return None
    return Artefact.open(run.place.child("corpus"), "corpus")
