"""Checkpoints of a worker group: what they hold, whether one fits the run, and going on with other workers or ZeRO stages."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from embedloom.config.training import TrainingConfig
from embedloom.core.storage import Place
from embedloom.encoder.export import save_model
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import Embedded, exact_golden, save_golden
from embedloom.errors import DataError
from embedloom.training.metrics import METRICS_FILE, StepRecord, metrics_text, read_metrics

# Going on with another number of workers or another ZeRO stage: ZeRO checkpoints are cut for those that wrote them.
#
# DeepSpeed's universal form holds every weight's states whole, so any number of workers can load it. Converting costs a
# copy of the checkpoint on each node's disk, once a change; checkpoints stay as they are written.


def load_resized(engine: Any, folder: Path, tag: str, name: str, before: int, now: int) -> None:
    """Load weights and optimizer state that another number of workers, or another ZeRO stage, saved.

    Args:
        engine: a DeepSpeed engine of ZeRO stage 1, 2 or 3.
        folder: of the checkpoint, on this node.
        tag: of the checkpoint in the folder.
        name: the same on all workers and different for different checkpoints.
        before: ZeRO stage that saved, 1 to 3.
        now: ZeRO stage of the engine.

    Raises:
        DataError: DeepSpeed cannot convert the checkpoint.
    """
    root = Path(tempfile.gettempdir()) / f"embedloom-universal-{name}"
    converts = os.environ.get("LOCAL_RANK", "0") == "0"
    groups = engine.optimizer.param_groups
    kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    if converts:
        _convert(folder / tag, root / tag)
        if (before == 3) != (now == 3):
            _to_zero_3(root / tag) if now == 3 else _from_zero_3(root / tag, len(groups))
    dist.barrier()
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(root), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    for group, values in zip(groups, kept, strict=True):
        group.update(values)  # ZeRO-3 would give every group the weight decay of the first
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
        raise DataError(f"{source}: not convertible for other workers: {error}") from error


# The universal form of ZeRO-3 and that of the lower stages hold the same tensors in other wrappings (DeepSpeed 0.19.8:
# checkpoint/ds_to_universal.py, and the loaders in runtime/zero/stage3.py and runtime/base_optimizer.py).
_COMMON = "zero/optimizer_state.pt"
_WHOLE, _PARTED = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def _to_zero_3(folder: Path) -> None:
    common = _load(folder / _COMMON)
    step = _load(next(folder.glob("zero/*/step.pt")))
    common["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": common["param_groups"]}
    torch.save(common, folder / _COMMON)
    shutil.copy(folder / _WHOLE, folder / _PARTED)


def _from_zero_3(folder: Path, groups: int) -> None:
    import deepspeed

    common = _load(folder / _COMMON)
    step = common["optimizer_state_dict"]["state"][0]["step"]
    for weight in sorted((folder / "zero").iterdir()):
        for path in weight.glob("*.pt") if weight.is_dir() else ():
            torch.save({"param": _load(path)}, path)
        if weight.is_dir():
            torch.save(step, weight / "step.pt")
    common |= {"param_groups": [{}] * groups, "ds_version": deepspeed.__version__}
    torch.save(common, folder / _COMMON)
    shutil.copy(folder / _PARTED, folder / _WHOLE)


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


# By what a run's checkpoints are known: its fingerprint, where it had the given values of settings that decide rounding only.
FingerprintWith = Callable[[Mapping[str, Any]], str]


def check_resumable(storage: Place, fingerprint: FingerprintWith, rounding: Mapping[str, Any]) -> list[str]:
    """Before any worker starts: the checkpoints of an interrupted run must be of this config.

    Args:
        storage: where they are.
        fingerprint: of this run.
        rounding: its settings that decide rounding only, which may be others than a checkpoint was made with.

    Returns:
        In words, which of them are others than the newest checkpoint was made with.

    Raises:
        DataError: one is of another config, or of a ZeRO stage that cannot be gone on from.
    """
    changed: list[str] = []
    for name in sorted(storage.names("run")):
        path = f"{name}/{STATE_FILE}"
        if storage.exists(path):
            changed = _check_state(f"{storage.uri}/{name}", storage.read_json(path), fingerprint, rounding)
    return changed


def _check_state(
    where: str, state: Mapping[str, Any], fingerprint: FingerprintWith, rounding: Mapping[str, Any]
) -> list[str]:
    # One of an earlier version does not say them: it can only be gone on from with those it was made with.
    before = state.get("rounding", rounding)
    if state.get("fingerprint") != fingerprint(before):
        raise DataError(
            f"{where}: checkpoint of another config (fingerprint {state.get('fingerprint')!r}, this run has "
            f"{fingerprint(before)!r}); delete its folder to begin again"
        )
    stages = before.get("zero_stage"), rounding.get("zero_stage")
    if 0 in stages and stages[0] != stages[1]:
        raise DataError(
            f"{where}: checkpoint of training.zero_stage {stages[0]}, which zero_stage {stages[1]} cannot go on from; "
            f"allowed: {'0' if stages[0] == 0 else '1, 2, 3'}, or delete its folder to begin again"
        )
    return [
        f"{key} {rounding[key]} (until now {before[key]})"
        for key in sorted(before)
        if before[key] != rounding.get(key)
    ]


def load_checkpoint(
    engine: Any, folder: Path, expected: dict[str, Any], fingerprint: FingerprintWith
) -> tuple[dict[str, Any], list[StepRecord]]:
    """Load weights and optimizer state of a checkpoint; returns its cursor (``save_checkpoint``) and the records so far.

    Args:
        engine: a DeepSpeed engine.
        folder: of the checkpoint.
        expected: what this run's state would say at its start.
        fingerprint: of this run.

    Raises:
        DataError: a checkpoint of another config, or one that cannot be cut for this number of workers.
    """
    path = folder / STATE_FILE
    state = json.loads(path.read_text()) if path.is_file() else {}
    _check_state(str(folder), state, fingerprint, expected["rounding"])
    before, now = state["zero_stage"], expected["zero_stage"]
    if now > 0 and (state["world_size"], before) != (expected["world_size"], now):
        name = f"{state['fingerprint']}-{state['examples_seen']}"
        load_resized(engine, folder, ENGINE_TAG, name, before, now)
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
