"""Merging the candidates into one model, tensor by tensor; sidecars and lineage come along."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedloom.artefacts import BUILDING_FILE, MANIFEST_FILE, Artefact, ArtefactWriter
from embedloom.config.model import MergingConfig
from embedloom.errors import ConfigError, DataError
from embedloom.instructions import CONTRACT_FILE, PromptContract
from embedloom.merging.checks import CONFIG_FILE, check_mergeable, check_tensors
from embedloom.merging.linear import check_weights, linear
from embedloom.merging.tensors import TensorFolder, TensorInfo, write_tensors
from embedloom.progress import Progress

LINEAGE_FILE = "lineage.json"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
# What an artefact folder adds to a model folder describes its own making, not the merged model's.
_OWN_FILES = {MANIFEST_FILE, BUILDING_FILE, LINEAGE_FILE, "metrics.jsonl"}


def merge(config: MergingConfig, models: dict[str, Path], out: ArtefactWriter) -> Artefact:
    """Average the models and commit a model folder.

    Everything is checked before a byte is written. Files other than weights come from the first model. One
    model alone is allowed, so that a run with one candidate has the same shape; the merge is then a copy in
    the asked dtype, and ``counts.models`` is 1.

    Args:
        config: the merging section.
        models: name → model folder, in the order of ``config.weights``.
        out: writer of the model artefact; its own folder becomes the model folder.

    Raises:
        ConfigError: no model, or weights that do not fit the models.
        DataError: models that differ in anything but the values of their weights, or a value that is not finite.
    """
    weights = model_weights(config, list(models))
    check_mergeable(models)
    folders = {name: TensorFolder(folder) for name, folder in models.items()}
    check_tensors(folders)
    dtype = getattr(torch, config.dtype)
    first = next(iter(folders.values()))
    infos = [
        TensorInfo(info.name, dtype if info.dtype.is_floating_point else info.dtype, info.shape)
        for info in first.infos.values()
    ]
    progress = Progress("merge", len(infos), "tensors")

    def merged(name: str) -> Tensor:
        tensor = merge_tensor(name, folders, weights, dtype)
        progress.advance(1)
        return tensor

    with out.local_folder() as folder:
        carry_over(next(iter(models.values())), folder, config.dtype)
        files = write_tensors(folder, infos, merged)
        lineage = _lineage(config, models, weights)
        (folder / LINEAGE_FILE).write_text(json.dumps(lineage, indent=2) + "\n")
    averaged = [info for info in infos if info.dtype.is_floating_point]
    counts = {
        "models": len(models),
        "tensors": len(averaged),
        "buffers_copied": len(infos) - len(averaged),
        "parameters": sum(info.elements for info in averaged),
        "weight_files": len(files),
    }
    return out.commit(counts, lineage)


def model_weights(config: MergingConfig, names: list[str]) -> dict[str, float]:
    """Normalised weight of each model.

    Raises:
        ConfigError: no model, another number of weights than models, or weights that cannot be normalised.
    """
    if not names:
        raise ConfigError("merging: no model to merge; training.candidates must name at least one")
    given = config.weights if config.weights is not None else (1.0,) * len(names)
    if len(given) != len(names):
        raise ConfigError(
            f"merging.weights: {len(given)} given for {len(names)} models ({', '.join(names)}); one each is needed"
        )
    total = check_weights(given)
    return {name: weight / total for name, weight in zip(names, given, strict=True)}


def merge_tensor(
    name: str, folders: dict[str, TensorFolder], weights: dict[str, float], dtype: torch.dtype
) -> Tensor:
    """One tensor of the merged model: averaged if floating, else the common value.

    Raises:
        DataError: a buffer that differs between models, or a result that is not finite.
    """
    first, *others = folders
    if not folders[first].infos[name].dtype.is_floating_point:
        buffer = folders[first].load(name)
        for other in others:
            if not torch.equal(buffer, folders[other].load(name)):
                raise DataError(
                    f"merging: tensor {name!r} holds integers that differ between {first!r} and {other!r}; they cannot be averaged"
                )
        return buffer
    heaviest_first = sorted(folders, key=lambda model: -weights[model])

    def tensors() -> Iterator[Tensor]:
        for model in heaviest_first:
            yield folders[model].load(name)

    result = linear(tensors(), [weights[model] for model in heaviest_first])
    # The extremes decide, in one pass: both are NaN if any value is.
    if result.numel() and not all(map(math.isfinite, map(float, torch.aminmax(result)))):
        guilty = [model for model in folders if not torch.isfinite(folders[model].load(name)).all()]
        raise DataError(
            f"merging: tensor {name!r} is not finite in {', '.join(map(repr, guilty)) or 'the average'}"
        )
    return result.to(dtype)


def carry_over(source: Path, target: Path, dtype: str) -> None:
    """Copy everything but weights and artefact files, and state the written dtype in ``config.json``."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith(("_", ".")) for part in relative.parts) or path.name in _OWN_FILES:
            continue
        if path.is_dir():
            (target / relative).mkdir(parents=True, exist_ok=True)
        elif not path.name.endswith(_WEIGHT_SUFFIXES):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)
    config: dict[str, Any] = json.loads((source / CONFIG_FILE).read_text())
    config.pop("torch_dtype", None)
    (target / CONFIG_FILE).write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def _lineage(config: MergingConfig, models: dict[str, Path], weights: dict[str, float]) -> dict[str, Any]:
    """What the merged model was made of; sources that are artefacts are named by fingerprint too."""
    first = next(iter(models.values()))
    contract = PromptContract.load(first).hash if (first / CONTRACT_FILE).is_file() else None
    sources = [
        {"name": name, "weight": weights[name], "fingerprint": _fingerprint(folder)}
        for name, folder in models.items()
    ]
    return {
        "made_by": "merge",
        "method": config.method,
        "dtype": config.dtype,
        "contract_hash": contract,
        "sources": sources,
    }


def _fingerprint(folder: Path) -> str | None:
    manifest = folder / MANIFEST_FILE
    return str(json.loads(manifest.read_text())["fingerprint"]) if manifest.is_file() else None
