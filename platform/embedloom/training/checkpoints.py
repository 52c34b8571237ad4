"""Checkpoints of a worker group: what they hold, whether one fits the run, and going on with another number of workers."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from embedloom.config.training import TrainingConfig
from embedloom.core.storage import Place
from embedloom.encoder.export import save_model
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import Embedded, exact_golden, save_golden
from embedloom.errors import DataError
from embedloom.training.metrics import METRICS_FILE, StepRecord, metrics_text, read_metrics

# Going on with another number of workers: ZeRO checkpoints are cut for the number that wrote them.
#
# DeepSpeed's universal form holds every weight's states whole, so any number of workers can load it. Converting costs a
# copy of the checkpoint on each node's disk, once a change; checkpoints stay as they are written.


def load_resized(engine: Any, folder: Path, tag: str, name: str) -> None:
    """Load weights and optimizer state that another number of workers saved.

    Args:
        engine: a DeepSpeed engine of ZeRO stage 1, 2 or 3.
        folder: of the checkpoint, on this node.
        tag: of the checkpoint in the folder.
        name: the same on all workers and different for different checkpoints.

    Raises:
        DataError: DeepSpeed cannot convert the checkpoint.
    """
    root = Path(tempfile.gettempdir()) / f"embedloom-universal-{name}"
    converts = os.environ.get("LOCAL_RANK", "0") == "0"
    if converts:
        _convert(folder / tag, root / tag)
    dist.barrier()
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(root), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    dist.barrier()
    if converts:
        shutil.rmtree(root, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target.parent, ignore_errors=True)
    target.mkdir(parents=True)
    settings = Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(settings)
    except Exception as error:
        raise DataError(f"{source}: not convertible for another number of workers: {error}") from error


ENGINE_TAG = "engine"
STATE_FILE = "training_state.json"
MODEL_CHECKPOINT = "model"


def is_model(folder: Path) -> bool:
    """Whether a checkpoint is the finished model of its stage."""
    return (folder / "config.json").is_file()


def save_checkpoint(
    engine: Any, folder: Path, state: dict[str, Any], records: list[StepRecord] | None
) -> None:
    """This worker's part of a checkpoint; ``records`` are rank 0's.

    ``state`` is the cursor: the next example is number ``examples_seen`` of the order, whatever the world size.
    """
    engine.save_checkpoint(str(folder), tag=ENGINE_TAG, client_state=state)
    if records is not None:
        (folder / METRICS_FILE).write_text(metrics_text(records))
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def check_resumable(storage: Place, fingerprint: str) -> None:
    """Before any worker starts: the checkpoints of an interrupted run must be of this config.

    Raises:
        DataError: one is not.
    """
    for name in storage.names("run"):
        path = f"{name}/{STATE_FILE}"
        if storage.exists(path):
            _check_fingerprint(f"{storage.uri}/{name}", storage.read_json(path), fingerprint)


def _check_fingerprint(where: str, state: dict[str, Any], fingerprint: str) -> None:
    if state.get("fingerprint") != fingerprint:
        raise DataError(
            f"{where}: checkpoint of another config (fingerprint {state.get('fingerprint')!r}, this run has {fingerprint!r}); "
            "delete its folder to begin again"
        )


def load_checkpoint(
    engine: Any, folder: Path, expected: dict[str, Any]
) -> tuple[dict[str, Any], list[StepRecord]]:
    """Load weights and optimizer state of a checkpoint; returns its cursor (``save_checkpoint``) and the records so far.

    Args:
        engine: a DeepSpeed engine.
        folder: of the checkpoint.
        expected: what this run's state would say at its start.

    Raises:
        DataError: a checkpoint of another config, or one that cannot be cut for this number of workers.
    """
    path = folder / STATE_FILE
    state = json.loads(path.read_text()) if path.is_file() else {}
    _check_fingerprint(str(folder), state, expected["fingerprint"])
    if state["world_size"] != expected["world_size"] and expected["zero_stage"] > 0:
        load_resized(engine, folder, ENGINE_TAG, f"{state['fingerprint']}-{state['examples_seen']}")
    else:
        engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
    return state, read_metrics(folder)


def save_final_model(encoder: Encoder, folder: Path, config: TrainingConfig, trained: Embedded) -> None:
    """Write a model folder: plain weights, the prefixes it is trained for in contract and config, golden vectors.

    Args:
        encoder: with whole weights, not a worker's part of them.
        folder: written anew.
        config: says which prefixes, and whether adapters have to be merged.
        trained: what the encoder, as it is trained, makes of the golden texts.
    """
    contract, backbone = encoder.contract, encoder.backbone
    if config.matryoshka is not None:
        dimensions = sorted(config.matryoshka.dimensions)
        contract = contract.model_copy(update={"matryoshka_dimensions": tuple(dimensions)})
        backbone.config.is_matryoshka = True
        backbone.config.matryoshka_dimensions = dimensions
    if config.lora is not None:
        from embedloom.training.lora import merged_backbone  # peft takes a second to import

        backbone = merged_backbone(backbone)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model(backbone, encoder.tokenizer, contract, folder)
    save_golden(exact_golden(encoder, backbone), folder, trained, encoder.dtype)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for a checkpoint on its way to the run's storage."""
    return tempfile.TemporaryDirectory(prefix="embedloom-checkpoint-")
