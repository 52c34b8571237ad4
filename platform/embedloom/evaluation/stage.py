"""The evaluation stage: every model and baseline on every task, scored by mteb, ranked, with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from embedloom.config.cluster import PoolConfig
from embedloom.config.evaluation import EvaluationConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import ScoredPrompts
from embedloom.core.storage import Place
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.registry import NodeModel
from embedloom.errors import StageError
from embedloom.evaluation.evaluator import Evaluator
from embedloom.evaluation.jobs import Unit
from embedloom.evaluation.leaderboard import check_pool, score_intervals, standings
from embedloom.evaluation.results import SCORES_FILE, score_table
from embedloom.evaluation.scorers import make_scorers
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.tasks import check_task
from embedloom.retrieval.vector_files import CUT_COUNTS

VECTORS_FOLDER = "_vectors"
Figures = dict[Unit, dict[str, Any]]


def evaluate(
    config: EvaluationConfig,
    corpus: Artefact | None,
    models: Mapping[str, Path | NodeModel],
    teacher: tuple[str, Path | NodeModel] | None,
    pool: PoolConfig,
    out: ArtefactWriter,
    dtype: DTypeName,
    vectors: Place | None = None,
) -> Artefact:
    """Score all models and baselines on all tasks; a rerun after a kill computes only what is missing.

    Args:
        config: tasks and baselines.
        corpus: artefact whose held-out split ``heldout`` tasks use.
        models: name -> model folder or model by name, in the order they are reported: base, candidates, merged.
        teacher: name of the mining teacher and what finds it, for the ``teacher`` baseline.
        pool: actors and what each reserves.
        out: writer of the evaluation artefact.
        dtype: compute type.
        vectors: where embedded texts are kept for later evaluations; None: within the artefact.

    Raises:
        UserError: a task, model or baseline that cannot be scored, found before any actor starts.
        StageError: some scores failed; all others are kept for the next run.
    """
    kept = out.place.child(VECTORS_FOLDER) if vectors is None else vectors
    figures = score_models(config, corpus, models, teacher, pool, out.place, dtype, kept)
    return out.commit(_counts(figures), {"tasks": _tasks(figures)})


def score_models(
    config: EvaluationConfig,
    corpus: Artefact | None,
    models: Mapping[str, Path | NodeModel],
    teacher: tuple[str, Path | NodeModel] | None,
    pool: PoolConfig,
    place: Place,
    dtype: DTypeName,
    vectors: Place,
) -> Figures:
    """Score everything into ``place`` and write ``scores.json``; arguments and errors as of ``evaluate``."""
    tasks = expand_tasks(config.stated_tasks)
    ranks = {task: check_task(task, corpus) for task in tasks}
    scorers, contracts = make_scorers(models, config.baselines, teacher)
    check_pool(config.pool, [task.name for task in tasks], [scorer.name for scorer in scorers])
    units = [
        Unit(scorer, task) for scorer in scorers for task in tasks if ranks[task] or not scorer.only_ranks
    ]
    with Evaluator(tasks, corpus, pool, place, vectors, dtype, config.shard_texts) as evaluator:
        failures = evaluator.score(units, contracts)
    if failures:
        named = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
        raise StageError(f"evaluate: {len(failures)} tasks or scores failed, the others are kept: {named}")
    table = score_table(place, units)
    if teacher is not None and "teacher" in config.baselines:
        table["teacher"] = teacher[0]
    figures = {unit: place.read_json(unit.figures_path) for unit in units}
    table["types"] = {unit.task.name: str(figure["type"]) for unit, figure in figures.items()}
    table["prompts"] = _prompts(figures)
    table["intervals"] = score_intervals(place, units, config.resamples)
    table["ranking"] = standings(table, table["types"], config.pool)
    place.write_json(SCORES_FILE, table)
    return figures


def _prompts(figures: Figures) -> dict[str, dict[str, ScoredPrompts]]:
    """What stood before the queries: task -> model -> texts, as the gate reads and the scorecard shows them."""
    found: dict[str, dict[str, ScoredPrompts]] = {}
    for unit, figure in figures.items():
        if unit.scorer.group == "models" and "prompts" in figure:
            stated = {"of": unit.task.prompts_of, "stated": unit.task.prompts is not None}
            prompts = cast(ScoredPrompts, {**figure["prompts"], **stated})
            found.setdefault(unit.task.name, {})[unit.scorer.name] = prompts
    return found


def _counts(figures: Figures) -> dict[str, Any]:
    queries = {unit.task.name: figure["queries"] for unit, figure in figures.items()}
    tokens = sum(figure["tokens"] for figure in figures.values())
    padded = sum(figure["padded_tokens"] for figure in figures.values())
    return {
        "rows": sum(queries.values()),
        "tokens": tokens,
        "tasks": len(queries),
        "scores": len(figures),
        "padding_share": round(1 - tokens / padded, 4) if padded else 0.0,
        **{key: count for key in CUT_COUNTS if (count := sum(f.get(key, 0) for f in figures.values()))},
    }


def _tasks(figures: Figures) -> dict[str, Any]:
    """Type, metric and sizes of each task, for the report."""
    return {
        unit.task.name: {
            key: figure[key] for key in ("type", "metric", "queries", "documents") if key in figure
        }
        for unit, figure in figures.items()
    }
