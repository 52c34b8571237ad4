"""Launching one training stage of one candidate on Ray Train."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedloom.compute.shards import run_here, run_tasks
from embedloom.config.cluster import PoolConfig, TrainingGroup
from embedloom.config.training import Candidate, ParityReader, TrainingConfig, TrainingSource, TrainingStage
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.progress import note
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place, apply_umask
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import check_export, embed_golden, reader_verdicts
from embedloom.encoder.registry import NodeModel, local_folder
from embedloom.errors import ConfigError, StageError, last_line
from embedloom.training.cards import Lineage, add_readers, stage_facts, write_cards
from embedloom.training.checkpoints import check_resumable, save_final_model, temporary_folder
from embedloom.training.data import ExampleStore, Prepared, drawn_prompts, preparation_counts, prepare_sources
from embedloom.training.dev import DevTasks, read_dev
from embedloom.training.loop import LoopConfig, train_worker
from embedloom.training.metrics import METRICS_FILE
from embedloom.training.model import prepare_backbone
from embedloom.training.order import order_of, schedule_warnings, steps_of

CHECKPOINT_FOLDER = "_train"
DATA_FOLDER = "_data"
_MANY_EXAMPLES = 100_000  # of an epoch, at 8 bytes; to order fewer takes less than to start a process for it
_CURVE_POINTS = 200


def train_stage(
    config: TrainingConfig,
    stage: TrainingStage,
    candidate: Candidate,
    start_model: Path | NodeModel,
    mining: Artefact | None,
    group: TrainingGroup,
    dtype: DTypeName,
    out: ArtefactWriter,
    prepared_data: Place | None = None,
    dev_tasks: DevTasks | None = None,
) -> Artefact:
    """Train one stage and commit its model folder; an interrupted run continues from its last checkpoint.

    Args:
        config: the training section.
        stage: pretrain or finetune settings.
        candidate: seed and hyper-parameter changes of this run.
        start_model: model the stage starts from (the base, or the stage before).
        mining: artefact with ``examples/``; None where the stage's sources do without.
        group: worker group.
        dtype: compute type.
        out: writer of ``training/<candidate>/<stage>``.
        prepared_data: where prepared sources stay for other stages and candidates; None: they are deleted afterwards.
        dev_tasks: of ``training.dev``.

    Raises:
        ConfigError: a global batch that leaves workers without a query, or an adapter without a place.
        DataError: a source that does not fit, named with its row, or checkpoints of another config.
        StageError: the loss is not finite or has diverged, the workers failed more often than
            ``training.max_failures``, or some reader would read the export as another model.
    """
    start_folder = local_folder(start_model)
    _check(config, stage, start_folder, group)
    root = out.place.absolute()  # Ray Train's workers have another working directory
    data = root.child(DATA_FOLDER) if prepared_data is None else prepared_data.absolute()
    loop = loop_config(config, stage, candidate, start_model, group, dtype, root, data)
    changed = check_resumable(out.place.child(CHECKPOINT_FOLDER), loop.fingerprint_with, loop.rounding)
    if changed:
        note(loop.label, f"goes on with {', '.join(changed)}; these decide rounding only")
    # Before the first worker is asked for, so that no GPU waits for it; what is prepared stays, whatever fails after it.
    prepared = prepare_sources(
        loop.label, config, stage.negatives, loop.sources, mining, loop.start_model, loop.data, run_tasks,
        stage.max_document_tokens,
    )  # fmt: skip
    if stage.name == config.stages[0].name and not out.place.exists(f"{CHECKPOINT_FOLDER}/run"):
        check_readers(loop, group)
    folders = {name: index["folder"] for name, index in prepared.items()}
    loop = replace(loop, folders=folders, dev_tasks=dev_tasks)
    facts = stage_facts(config, stage, candidate, loop.sources, prepared) | prompt_facts(loop, prepared)
    lineage = Lineage.after(start_folder, facts)
    loop = replace(loop, contract=lineage.contract(PromptContract.load(start_folder)))
    result = fit(loop, group, out.place.child(CHECKPOINT_FOLDER))
    return _commit(loop, lineage, candidate, prepared, result.checkpoint, group, out)


def _check(config: TrainingConfig, stage: TrainingStage, start_model: Path, group: TrainingGroup) -> None:
    if stage.global_batch < group.workers:
        raise ConfigError(
            f"training.stages.{stage.name}.global_batch: {stage.global_batch} queries cannot be shared out to {group.workers} workers; "
            f"allowed: {group.workers} or more"
        )
    served = PromptContract.load(start_model).max_document_tokens
    if stage.max_document_tokens is not None and stage.max_document_tokens > served:
        raise ConfigError(
            f"training.stages.{stage.name}.max_document_tokens: {stage.max_document_tokens}, but the model reads {served}; "
            f"allowed: up to {served}, or null"
        )
    if config.lora is not None:
        from embedloom.training.lora import check_targets  # peft takes a second to import

        check_targets(config.lora, start_model, PromptContract.load(start_model).attention)


def prompt_facts(loop: LoopConfig, prepared: Prepared) -> dict[str, Any]:
    """How many queries the stage draws, and by which prompts they go; says what is odd about their number."""
    store = ExampleStore(loop.data, loop.folders, loop.stage.negatives)
    order = order_of(loop.training, loop.stage, loop.sources, store, loop.seed)
    steps = steps_of(loop.stage, order)
    for warning in schedule_warnings(loop.stage, steps, order.epoch_size):
        note(loop.label, f"warning: {warning}")
    tasks = run_tasks if order.epoch_size > _MANY_EXAMPLES else run_here
    (drawn,) = tasks(loop.label, _drawn, [steps * loop.stage.global_batch], loop, cpus=1)
    found = drawn_prompts(loop.sources, prepared, drawn)
    return {"queries": sum(drawn.values()), "prompts": [one.as_json() for one in found]}


def _drawn(examples: int, loop: LoopConfig) -> dict[str, int]:
    """How many of the first examples come from each source; takes 8 bytes a row, so it is not the driver's where they are many."""
    store = ExampleStore(loop.data, loop.folders, loop.stage.negatives)
    return order_of(loop.training, loop.stage, loop.sources, store, loop.seed).drawn(examples)


def _commit(
    loop: LoopConfig,
    lineage: Lineage,
    candidate: Candidate,
    prepared: Prepared,
    checkpoint: Any,
    group: TrainingGroup,
    out: ArtefactWriter,
) -> Artefact:
    """Check the finished model, write its cards and make it the artefact.

    Where the check fails, the finished model stays below ``_train``: the next run checks it again, without training.
    """
    config, stage, facts = loop.training, loop.stage, lineage.stages[-1]
    # Between stages only our own code reads the model; the last stage's is an export.
    is_last = stage.name == config.stages[-1].name
    parity = on_worker(group, _finished_parity, checkpoint, config.parity) if is_last else None
    with out.local_folder() as folder, checkpoint.as_directory() as final:
        shutil.copytree(final, folder, dirs_exist_ok=True)
        apply_umask(folder)  # the checkpoint of an object store came through a temporary folder
        records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
        facts |= {"steps": len(records), "dev": read_dev(folder)}
        write_cards(folder, lineage)
        readers = [] if parity is None else reader_verdicts(folder, parity)
        if readers:
            add_readers(folder, readers)
    for name in (CHECKPOINT_FOLDER, DATA_FOLDER):
        out.place.child(name).remove()
    details = {
        "loss_curve": loss_curve(records), "stage": stage.name, "candidate": candidate.name, "parity": parity,
        "readers": [verdict.as_json() for verdict in readers] or None,
        "dev": facts["dev"], "base": lineage.base, "stages": lineage.stages,
    }  # fmt: skip
    return out.commit({**step_counts(records), **preparation_counts(prepared)}, details)


def check_readers(loop: LoopConfig, group: TrainingGroup) -> dict[str, float]:
    """Export the start model as the trained one will be and ask every reader of ``training.parity`` for it.

    Before the first step: what a reader cannot read then costs a minute, and not the hours of a run. Each base and
    setting is asked once in a process, as the candidates of a run share theirs.

    Raises:
        StageError: a reader reads another model, or cannot be had on a worker.
    """
    training = loop.training
    asked = (loop.start_model, loop.dtype, training.parity, training.lora, training.matryoshka)
    if asked not in _READABLE:
        _READABLE[asked] = on_worker(group, _start_parity, loop)
    return _READABLE[asked]


_READABLE: dict[tuple[Any, ...], dict[str, float]] = {}


def _start_parity(loop: LoopConfig) -> dict[str, float]:
    encoder = Encoder.load(local_folder(loop.start_model), dtype=loop.dtype, trainable=True)
    prepare_backbone(encoder.backbone, loop.training, loop.stage)
    with temporary_folder() as folder:
        save_final_model(encoder, Path(folder), loop.training, embed_golden(encoder))
        return check_export(Path(folder), loop.training.parity)


def _finished_parity(checkpoint: Any, readers: tuple[ParityReader, ...]) -> dict[str, float]:
    with checkpoint.as_directory() as folder:
        return check_export(Path(folder), readers)


def on_worker(
    group: TrainingGroup, work: Callable[..., dict[str, float]], *arguments: Any
) -> dict[str, float]:
    """Call ``work`` on a machine of the training pool: a reader such as vLLM needs what those have, the driver may have no GPU."""
    pool = PoolConfig(cpus=group.cpus, gpus=group.gpus)
    (found,) = run_tasks("parity", _applied, [arguments], work, pool=pool)
    return found


def _applied(arguments: tuple[Any, ...], work: Callable[..., dict[str, float]]) -> dict[str, float]:
    return work(*arguments)


def loop_config(
    config: TrainingConfig,
    stage: TrainingStage,
    candidate: Candidate,
    start_model: Path | NodeModel,
    group: TrainingGroup,
    dtype: DTypeName,
    root: Place,
    data: Place,
) -> LoopConfig:
    """What every worker is told; the sources' folders are known once they are prepared."""
    return LoopConfig(
        label=f"train {candidate.name}/{stage.name}",
        training=config,
        stage=stage,
        sources=stage.sources or mined_sources(candidate.mix or config.mix),
        # Stages of one candidate must not repeat each other's order.
        seed=candidate.seed * 1000 + [s.name for s in config.stages].index(stage.name),
        learning_rate_scale=candidate.learning_rate_scale,
        dtype=dtype,
        start_model=start_model.absolute() if isinstance(start_model, Path) else start_model,
        data=data,
        folders={},
        logs=root,
        threads=group.compute_threads,
        group=group,
    )


def mined_sources(mix: dict[str, float]) -> tuple[TrainingSource, ...]:
    """The run's own mined examples, a source for each origin with a share above 0."""
    return tuple(
        TrainingSource(name=name, format="mined", dataset=name, weight=share)
        for name, share in sorted(mix.items())
        if share > 0
    )


def worker_environment(group: TrainingGroup) -> dict[str, str]:
    """Environment variables of a training worker."""
    found = {"OMP_NUM_THREADS": str(group.compute_threads), "DS_ACCELERATOR": "cuda" if group.gpus else "cpu"}
    if group.gpus:
        # Every micro-batch has another length, and fixed segments of the allocator would be left half full.
        found["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return found


def fit(loop: LoopConfig, group: TrainingGroup, storage: Place) -> Any:
    """Run the loop on a worker group; what Ray Train says of it, the last checkpoint being the finished model.

    Raises:
        StageError: the loop stopped itself, or the workers failed too often.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from embedloom.training.elastic import LostMachines

    gpu = group.gpus > 0
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=loop,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=group.workers if group.min_workers is None else (group.min_workers, group.workers),
            elastic_resize_monitor_interval_s=group.grow_seconds,
            use_gpu=gpu,
            resources_per_worker={"CPU": group.cpus, **({"GPU": group.gpus} if gpu else {})},
        ),
        run_config=RunConfig(
            # The same name and storage path is what makes Ray Train resume.
            name="run",
            **_storage_of(storage),
            failure_config=FailureConfig(max_failures=loop.training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=loop.training.checkpoints_kept),
            worker_runtime_env={"env_vars": worker_environment(group)},
            callbacks=[] if group.min_workers is None else [LostMachines(loop.label)],
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise StageError(f"{loop.label}: {last_line(error)}") from error
    if result.return_value is not None:
        raise StageError(str(result.return_value))
    if result.checkpoint is None:
        raise StageError(f"{loop.label}: Ray Train ended without a checkpoint")
    return result


def _storage_of(storage: Place) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints: in an object store by the client, and so the credentials, of all other files."""
    if storage.is_local:
        return {"storage_path": str(storage.local)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = storage.filesystem()
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


def step_counts(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What all steps come to, for the manifest."""
    seconds = sum(record["seconds"] for record in records)
    tokens = sum(record["tokens"] for record in records)
    padded = sum(record["tokens"] / (1 - record["padding_share"]) for record in records)
    return {
        "rows": sum(record["queries"] for record in records),
        "steps": len(records),
        "tokens": tokens,
        "padding_share": round(1 - tokens / padded, 4),
        "imbalance": round(sum(record["imbalance"] for record in records) / len(records), 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "step_seconds": round(seconds, 1),
    }


def loss_curve(records: list[dict[str, Any]]) -> list[list[float]]:
    """At most 200 (step, mean loss) points, for the report."""
    width = max(1, -(-len(records) // _CURVE_POINTS))
    chunks = [records[start : start + width] for start in range(0, len(records), width)]
    return [[chunk[-1]["step"], round(sum(r["loss"] for r in chunk) / len(chunk), 5)] for chunk in chunks]
