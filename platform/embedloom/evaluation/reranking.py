"""Reranking: the first documents that an embedding model finds, ordered anew by a reranker, scored beside not doing so."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from embedloom import __version__
from embedloom.config.cluster import PoolConfig
from embedloom.config.evaluation import EvaluationConfig, GateConfig
from embedloom.config.reranker import RERANKER
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.core.progress import note
from embedloom.core.schemas import ScoreTable
from embedloom.core.storage import Place
from embedloom.core.verdict import Verdict
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.registry import NodeModel
from embedloom.errors import ConfigError, StageError
from embedloom.evaluation.evaluator import Evaluator
from embedloom.evaluation.gate import Evidence, decide
from embedloom.evaluation.jobs import Scorer, Unit
from embedloom.evaluation.leaderboard import read_strata, score_intervals
from embedloom.evaluation.results import SCORES_FILE, score_table
from embedloom.evaluation.scorers import make_scorers
from embedloom.evaluation.specs import TaskSpec, expand_tasks
from embedloom.evaluation.tasks import check_task

FIRST = "merged"  # the embedding model whose documents are ordered anew


def evaluate_reranker(
    config: EvaluationConfig,
    top: int,
    corpus: Artefact,
    model: Path | NodeModel,
    reranker: Path | NodeModel,
    pool: PoolConfig,
    out: ArtefactWriter,
    dtype: DTypeName,
    vectors: Place,
) -> Artefact:
    """Score a model with and without the reranker behind it, on those of the tasks that rank documents.

    Args:
        config: its tasks.
        top: documents of each query that are ordered anew.
        corpus: artefact whose held-out split ``heldout`` tasks use.
        model: folder of the embedding model.
        reranker: folder of the reranker.
        pool: actors and what each reserves.
        out: writer of the artefact.
        dtype: compute type of both.
        vectors: where embedded texts are kept for other evaluations.

    Raises:
        ConfigError: no task ranks documents.
        StageError: some scores failed; all others are kept for the next run.
    """
    tasks = [task for task in expand_tasks(config.stated_tasks) if check_task(task, corpus)]
    if not tasks:
        raise ConfigError(
            "reranker: none of evaluation.tasks ranks documents, so there is nothing to show it by; allowed: a heldout or "
            "beir task, or a local or mteb task of retrieval or reranking"
        )
    (plain,), contracts = make_scorers({FIRST: model}, (), None)
    reranked = replace(plain.under(RERANKER), mteb_name=f"embedloom/{RERANKER}", reranker=reranker, top=top)
    units = [Unit(scorer, task) for scorer in (plain, reranked) for task in tasks]
    with Evaluator(tasks, corpus, pool, out.place, vectors, dtype, config.shard_texts) as evaluator:
        failures = evaluator.score(units, contracts)
    if failures:
        named = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
        raise StageError(f"reranker: {len(failures)} scores failed, the others are kept: {named}")
    table = score_table(out.place, units)
    figures = {unit: out.place.read_json(unit.figures_path) for unit in units}
    table["types"] = {unit.task.name: str(figure["type"]) for unit, figure in figures.items()}
    table["intervals"] = score_intervals(out.place, units, config.resamples)
    out.place.write_json(SCORES_FILE, table)
    own = [figures[unit] for unit in units if unit.scorer is reranked]
    counts = {key: sum(figure.get(key, 0) for figure in own) for key in ("queries", "pairs", "pairs_cut")}
    note(RERANKER, f"{counts['pairs']:,} pairs, of which {counts['pairs_cut']:,} were cut")
    return out.commit({"rows": counts["queries"], "tasks": len(tasks), **counts}, {"top": top})


def judge_reranker(config: GateConfig, place: Place, model: Path, reranker: Path) -> Verdict:
    """Whether reranking is better than not, by a paired bootstrap over queries; the content of ``gate.json``.

    Args:
        config: the rules.
        place: of ``evaluate_reranker``.
        model: folder of the embedding model.
        reranker: folder of the reranker.
    """
    table = cast(ScoreTable, place.read_json(SCORES_FILE))
    with_it, without = table["models"][RERANKER], table["models"][FIRST]
    items = {task: (_strata(place, RERANKER, task), _strata(place, FIRST, task)) for task in with_it}
    decision = decide(config, Evidence(with_it, without, items)).as_json()
    for key in ("size_bytes", "parameters"):  # nothing is replaced by it
        del decision[key]
    return cast(
        Verdict,
        {
            **decision,
            "prompts": {},
            "candidate": f"{FIRST} and {RERANKER}",
            "against": FIRST,
            "weights": ModelFolder(reranker).weights,
            "against_weights": ModelFolder(model).weights,
            "rules": config.model_dump(mode="json"),
            "created": datetime.now(tz=UTC).isoformat(timespec="seconds"),
            "version": __version__,
        },
    )


def _strata(place: Place, name: str, task: str) -> Any:
    return read_strata(place, Unit(Scorer(name, "models", "", ""), TaskSpec(task)))
