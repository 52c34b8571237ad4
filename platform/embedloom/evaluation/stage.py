"""The evaluation stage: every model and baseline on every task, scored by mteb."""

import hashlib
from pathlib import Path
from typing import Any

from embedloom.artefacts import MANIFEST_FILE, Artefact, ArtefactWriter
from embedloom.config.resources import PoolConfig
from embedloom.config.use import EvaluationConfig
from embedloom.encoder.device import DTypeName
from embedloom.errors import ConfigError, DataError, StageError
from embedloom.evaluation.bm25 import BM25_NAME, bm25_revision, check_bm25
from embedloom.evaluation.pool import ScoringPool
from embedloom.evaluation.results import (
    SCORES_FILE,
    Outcome,
    Scorer,
    Unit,
    read_scores,
    save_outcome,
    score_table,
)
from embedloom.evaluation.scoring import EvaluationActor
from embedloom.evaluation.tasks import check_task
from embedloom.progress import Progress
from embedloom.storage import Place

_BLOCK_BYTES = 16 * 2**20


def evaluate(
    config: EvaluationConfig,
    corpus: Artefact,
    models: dict[str, Path],
    teacher: tuple[str, Path] | None,
    pool: PoolConfig,
    out: ArtefactWriter,
    dtype: DTypeName,
) -> Artefact:
    """Score all models and baselines on all tasks; a rerun after a kill computes only what is missing.

    Args:
        config: tasks and baselines.
        corpus: artefact whose held-out split ``heldout`` tasks use.
        models: name -> model folder, in the order they are reported: base, candidates, merged.
        teacher: name and folder of the mining teacher, for the ``teacher`` baseline.
        pool: actors and what each reserves.
        out: writer of the evaluation artefact.
        dtype: compute type.

    Raises:
        UserError: a task, model or baseline that cannot be scored, found before any actor starts.
        StageError: some scores failed; all others are kept for the next run.
    """
    ranks = {task.name: check_task(task, corpus) for task in config.tasks}
    scorers = _model_scorers(models) + _baseline_scorers(config, teacher)
    units = [
        Unit(scorer, task)
        for scorer in scorers
        for task in config.tasks
        if scorer.folder is not None or ranks[task.name]
    ]
    missing = [unit for unit in units if not out.place.exists(unit.result_path)]
    if missing:
        _score(missing, len(units), corpus, pool, out.place, dtype)
    table = score_table(out.place, units)
    if teacher is not None and "teacher" in config.baselines:
        table["teacher"] = teacher[0]
    out.place.write_json(SCORES_FILE, table)
    figures = {unit: out.place.read_json(unit.figures_path) for unit in units}
    return out.commit(_counts(figures), {"tasks": _tasks(figures)})


def _score(
    missing: list[Unit], total: int, corpus: Artefact, pool: PoolConfig, place: Place, dtype: DTypeName
) -> None:
    progress = Progress("evaluate", total, "scores", done=total - len(missing))

    def save(unit: Unit, outcome: Outcome) -> None:
        save_outcome(place, unit, outcome)
        progress.advance(1, **{unit.label: read_scores(place, unit)["main_score"]})

    # An actor may run in another folder, so relative places would point elsewhere there.
    readable = Artefact(Place(str(corpus.place.local)), corpus.manifest) if corpus.place.is_local else corpus
    actors = ScoringPool(EvaluationActor, (readable, dtype, pool.compute_threads), pool, len(missing))
    try:
        failures = actors.run(missing, save)
    finally:
        actors.close()
    if failures:
        named = "; ".join(f"{unit.label}: {reason}" for unit, reason in failures.items())
        raise StageError(f"evaluate: {len(failures)} of {total} scores failed, the others are kept: {named}")


def _model_scorers(models: dict[str, Path]) -> list[Scorer]:
    return [
        Scorer(name, "models", f"embedloom/{name}", model_revision(folder), folder.absolute())
        for name, folder in models.items()
    ]


def _baseline_scorers(config: EvaluationConfig, teacher: tuple[str, Path] | None) -> list[Scorer]:
    scorers = []
    for baseline in config.baselines:
        if baseline == "bm25":
            check_bm25()
            scorers.append(Scorer("bm25", "baselines", BM25_NAME, bm25_revision()))
        elif teacher is None:
            raise ConfigError(
                "evaluation.baselines: names 'teacher', but no teacher was given; allowed here: bm25"
            )
        else:
            name, folder = teacher
            label = f"teacher/{name.rstrip('/').rsplit('/', 1)[-1]}"
            scorers.append(Scorer("teacher", "baselines", label, model_revision(folder), folder.absolute()))
    return scorers


def model_revision(folder: Path) -> str:
    """Identity of a model folder: its artefact's fingerprint, or a hash over weights and configuration.

    Raises:
        DataError: no weights, or a corrupt manifest.
    """
    if (folder / MANIFEST_FILE).is_file():
        return Artefact.open(Place(str(folder))).fingerprint
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise DataError(f"{folder}: no *.safetensors, so this is not a model folder with weights")
    digest = hashlib.blake2b(digest_size=8)
    for path in [*sorted(folder.glob("*.json")), *weights]:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _counts(figures: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    queries = {unit.task.name: figure["queries"] for unit, figure in figures.items()}
    tokens = sum(figure["tokens"] for figure in figures.values())
    padded = sum(figure["padded_tokens"] for figure in figures.values())
    return {
        "rows": sum(queries.values()),
        "tokens": tokens,
        "tasks": len(queries),
        "scores": len(figures),
        "padding_share": round(1 - tokens / padded, 4) if padded else 0.0,
    }


def _tasks(figures: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    """Type, metric and sizes of each task, for the report."""
    return {
        unit.task.name: {
            key: figure[key] for key in ("type", "metric", "queries", "documents") if key in figure
        }
        for unit, figure in figures.items()
    }
