"""Launching one training stage of one candidate on Ray Train."""

import json
import shutil
from pathlib import Path
from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.resources import TrainingGroup
from embedloom.config.training import Candidate, TrainingConfig, TrainingStage
from embedloom.encoder.device import DTypeName
from embedloom.errors import StageError
from embedloom.storage import Place
from embedloom.training.loop import METRICS_FILE, LoopConfig, train_worker

CHECKPOINT_FOLDER = "_train"
_CURVE_POINTS = 200


def train_stage(
    config: TrainingConfig,
    stage: TrainingStage,
    candidate: Candidate,
    start_model: Path,
    mining: Artefact,
    group: TrainingGroup,
    dtype: DTypeName,
    out: ArtefactWriter,
) -> Artefact:
    """Train one stage and commit its model folder; an interrupted run continues from its last checkpoint.

    Args:
        config: the training section.
        stage: pretrain or finetune settings.
        candidate: seed and hyper-parameter changes of this run.
        start_model: model folder the stage starts from (the base, or the stage before).
        mining: artefact with ``examples/``.
        group: worker group.
        dtype: compute type.
        out: writer of ``training/<candidate>/<stage>``.

    Raises:
        StageError: the workers failed more often than ``training.max_failures``.
    """
    loop = LoopConfig(
        label=f"train {candidate.name}/{stage.name}",
        training=config,
        stage=stage,
        shares=candidate.mix or config.mix,
        # Stages of one candidate must not repeat each other's order.
        seed=candidate.seed * 1000 + [s.name for s in config.stages].index(stage.name),
        learning_rate_scale=candidate.learning_rate_scale,
        dtype=dtype,
        start_model=start_model.absolute(),
        examples=Place(str(mining.place.local)) if mining.place.is_local else mining.place,
        threads=group.compute_threads,
    )
    result = _fit(loop, group, out.place.child(CHECKPOINT_FOLDER))
    with out.local_folder() as folder, result.checkpoint.as_directory() as final:
        shutil.copytree(final, folder, dirs_exist_ok=True)
        records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    out.place.child(CHECKPOINT_FOLDER).remove()
    return out.commit(
        _counts(records, result.metrics or {}),
        {"loss_curve": _curve(records), "stage": stage.name, "candidate": candidate.name},
    )


def _fit(loop: LoopConfig, group: TrainingGroup, storage: Place) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = group.gpus > 0
    environment = {"OMP_NUM_THREADS": str(loop.threads), "DS_ACCELERATOR": "cuda" if gpu else "cpu"}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=loop,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=group.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": group.cpus, **({"GPU": group.gpus} if gpu else {})},
        ),
        run_config=RunConfig(
            # The same name and storage path is what makes Ray Train resume.
            name="run",
            storage_path=str(storage.local) if storage.is_local else storage.uri,
            failure_config=FailureConfig(max_failures=loop.training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=loop.training.checkpoints_kept),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise StageError(f"{loop.label}: {_last_line(error)}") from error
    if result.checkpoint is None:
        raise StageError(f"{loop.label}: Ray Train ended without a checkpoint")
    return result


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _counts(records: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, Any]:
    seconds = sum(record["seconds"] for record in records)
    tokens = sum(record["tokens"] for record in records)
    padded = sum(record["tokens"] / (1 - record["padding_share"]) for record in records)
    return {
        "rows": sum(record["queries"] for record in records),
        "steps": len(records),
        "tokens": tokens,
        "padding_share": round(1 - tokens / padded, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "step_seconds": round(seconds, 1),
        "repeated_negatives": metrics.get("repeated_negatives", 0),
    }


def _curve(records: list[dict[str, Any]]) -> list[list[float]]:
    """At most 200 (step, mean loss) points, for the report."""
    width = max(1, -(-len(records) // _CURVE_POINTS))
    chunks = [records[start : start + width] for start in range(0, len(records), width)]
    return [[chunk[-1]["step"], round(sum(r["loss"] for r in chunk) / len(chunk), 5)] for chunk in chunks]
