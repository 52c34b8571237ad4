"""Training a reranker on Ray Train: the loop, order, checkpoints and sources of the embedding model's stages, on pairs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedloom.compute.shards import run_tasks
from embedloom.config.cluster import TrainingGroup
from embedloom.config.reranker import RerankerConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.progress import note
from embedloom.core.storage import Place, apply_umask
from embedloom.core.trained_prompts import hub_card
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.pair_parity import check_reranker_export
from embedloom.encoder.registry import NodeModel
from embedloom.errors import ConfigError
from embedloom.training.cards import DATA_CARD, MODEL_CARD, Lineage, data_card, stage_facts
from embedloom.training.checkpoints import check_resumable
from embedloom.training.data import Prepared, preparation_counts, prepare_sources
from embedloom.training.loop import LoopConfig
from embedloom.training.metrics import METRICS_FILE
from embedloom.training.stage import (
    CHECKPOINT_FOLDER,
    DATA_FOLDER,
    fit,
    loop_config,
    loss_curve,
    on_worker,
    prompt_facts,
    step_counts,
)

_SETTINGS = (
    "negatives", "global_batch", "learning_rate", "schedule", "warmup_steps", "temperature", "weight_decay", "seed",
)  # fmt: skip
_LOSSES = {
    "infonce": "softmax over a query's positive and its mined negatives",
    "bce": "binary cross-entropy of every pair",
}


def train_reranker(
    config: RerankerConfig,
    mix: dict[str, float],
    base: Path | NodeModel,
    mining: Artefact | None,
    group: TrainingGroup,
    dtype: DTypeName,
    out: ArtefactWriter,
    prepared_data: Place | None = None,
) -> Artefact:
    """Train and commit a reranker's folder; an interrupted run continues from its last checkpoint.

    Args:
        config: the section.
        mix: of the run's own training, where the section states none.
        base: folder of ``prepare_reranker``.
        mining: artefact with ``examples/``; None where its sources do without.
        group: worker group.
        dtype: compute type.
        out: writer of the artefact.
        prepared_data: where prepared sources stay for others; None: they are deleted afterwards.

    Raises:
        ConfigError: a global batch that leaves workers without a query.
        DataError: a source that does not fit, named with its row, or checkpoints of another config.
        StageError: the loss is not finite or has diverged, the workers failed too often, or a reader reads other scores
            than were trained.
    """
    training = config.training(mix)
    stage, run = training.stages[0], training.runs[0]
    if stage.global_batch < group.workers:
        raise ConfigError(
            f"reranker.global_batch: {stage.global_batch} queries cannot be shared out to {group.workers} workers; "
            f"allowed: {group.workers} or more"
        )
    root = out.place.absolute()
    data = root.child(DATA_FOLDER) if prepared_data is None else prepared_data.absolute()
    loop = loop_config(training, stage, run, base, group, dtype, root, data)
    loop = replace(loop, label="train reranker", reranker=config)
    changed = check_resumable(out.place.child(CHECKPOINT_FOLDER), loop.fingerprint_with, loop.rounding)
    if changed:
        note(loop.label, f"goes on with {', '.join(changed)}; these decide rounding only")
    prepared = prepare_sources(
        loop.label, training, stage.negatives, loop.sources, mining, loop.start_model, loop.data, run_tasks
    )
    loop = replace(loop, folders={name: index["folder"] for name, index in prepared.items()})
    facts = stage_facts(training, stage, run, loop.sources, prepared)
    facts |= {"loss": config.loss, "max_tokens": config.max_tokens}
    facts["queries"] = prompt_facts(loop, prepared)["queries"]
    result = fit(loop, group, out.place.child(CHECKPOINT_FOLDER))
    return _commit(loop, config, facts, prepared, result.checkpoint, group, out)


def _commit(
    loop: LoopConfig,
    config: RerankerConfig,
    facts: dict[str, Any],
    prepared: Prepared,
    checkpoint: Any,
    group: TrainingGroup,
    out: ArtefactWriter,
) -> Artefact:
    """Check the finished model, write its cards and make it the artefact; where the check fails, it stays below ``_train``."""
    parity = on_worker(group, _finished_parity, checkpoint)
    with out.local_folder() as folder, checkpoint.as_directory() as final:
        shutil.copytree(final, folder, dirs_exist_ok=True)
        apply_umask(folder)
        records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
        facts |= {"steps": len(records)}
        lineage = Lineage(Path(config.base).name if Path(config.base).is_absolute() else config.base, [facts])
        (folder / MODEL_CARD).write_text(reranker_card(lineage))
        (folder / DATA_CARD).write_text(data_card(lineage))
    for name in (CHECKPOINT_FOLDER, DATA_FOLDER):
        out.place.child(name).remove()
    counts = step_counts(records)
    memory = max(record["memory_mib"] for record in records)
    details = {
        "loss_curve": loss_curve(records), "parity": parity, "base": lineage.base, "stages": lineage.stages,
        "peak_memory_mib": memory,
    }  # fmt: skip
    return out.commit({**counts, **preparation_counts(prepared)}, details)


def _finished_parity(checkpoint: Any) -> dict[str, float]:
    with checkpoint.as_directory() as folder:
        return check_reranker_export(Path(folder))


def reranker_card(lineage: Lineage) -> str:
    """``README.md``: the header the Hub reads, how to read the folder, then base, loss and steps."""
    (facts,) = lineage.stages
    header = {
        "base_model": lineage.base, "base_model_relation": "finetune", "pipeline_tag": "text-ranking",
        "tags": ["sentence-transformers", "cross-encoder", "reranker", "embedloom"],
    }  # fmt: skip
    rows = sum(source["rows"] for source in facts["sources"])
    lines = [
        "# Reranker", "",
        f"A cross-encoder trained from {lineage.base}: it reads a query and a document at once, {facts['max_tokens']} tokens of "
        "both, and gives one logit, whose sigmoid is the score.", "",
        "```python", "from sentence_transformers import CrossEncoder", "",
        'scores = CrossEncoder("FOLDER").predict([("a query", "a document")])', "```", "",
        "## Training", "",
        f"- loss: {facts['loss']} ({_LOSSES[facts['loss']]})",
        f"- steps: {facts['steps']:,} of {facts['global_batch']:,} queries, from {rows:,} examples of {len(facts['sources'])} source(s)",
        *(f"- {key.replace('_', ' ')}: {facts[key]}" for key in _SETTINGS),
    ]  # fmt: skip
    if distillation := facts.get("distillation"):
        weights = f"weight {distillation['weight']:g}, contrastive {distillation['contrastive_weight']:g}"
        lines.append(f"- distillation: {distillation['loss']} from a teacher's scores, {weights}")
    return hub_card(header, [*lines, "", f"What it was trained on is in `{DATA_CARD}`."])
