"""A merge that was checked and laid out: all that a task needs to write one of its files."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from embedloom.config.merging import MergingConfig
from embedloom.errors import ConfigError
from embedloom.merging.alignment import align
from embedloom.merging.checks import BASE, Difference, check_mergeable, check_tensors
from embedloom.merging.layout import WeightFile, weight_files
from embedloom.merging.tensors import TensorFolder, TensorInfo
from embedloom.merging.weights import Weights, check_weights, tensor_weights
from embedloom.storage import Place

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Sources, weights and files; picklable, and holding no tensor."""

    config: MergingConfig
    models: dict[str, TensorFolder]
    base: TensorFolder | None
    weights: Weights
    files: tuple[WeightFile, ...]
    differences: tuple[Difference, ...] = ()  # that were allowed, or decide nothing of the weights
    left_out: tuple[str, ...] = ()  # tensors beside the backbone that not all have

    def tensor_weights(self, tensor: str) -> Weights:
        """Weight of each model for one tensor."""
        return tensor_weights(self.config, self.weights, tensor)

    @property
    def infos(self) -> list[TensorInfo]:
        """All tensors that will be written."""
        return [info for file in self.files for info in file.infos]

    @property
    def remarks(self) -> list[str]:
        """What a person should know of models that are not all alike."""
        first = next(iter(self.models))
        said = [f"{one}; that of {first!r} is taken" for one in self.differences]
        if self.left_out:
            shown = ", ".join(self.left_out[:3]) + (" ..." if len(self.left_out) > 3 else "")
            said.append(f"left out, as not all models have them: {len(self.left_out)} tensors ({shown})")
        return said


def plan_merge(config: MergingConfig, models: dict[str, Place], base: Place | None) -> MergePlan:
    """Check everything that can be checked without reading weights, and lay out the files.

    Args:
        config: the merging section.
        models: name -> model folder, in the order of the weights.
        base: the model all were trained from; read by methods on task vectors, checked by all.

    Raises:
        ConfigError: a method without its base, or weights that do not fit the models.
        DataError: models that differ in anything but the values of their weights and what ``merging.allow`` names.
    """
    if not models:
        raise ConfigError("merging: no model to merge")
    if config.needs_base and base is None:
        raise ConfigError(f"merging: method {config.method} needs the base that the models were trained from")
    given = models if base is None else {**models, BASE: base}
    every = {name: place.absolute() for name, place in given.items()}  # tasks run in other folders
    passed = check_mergeable({name: every[name] for name in models}, every.get(BASE), config.allow)
    read = [*models, *([BASE] if config.needs_base else [])]
    folders, beside = align({name: TensorFolder(every[name]) for name in read})
    left_out = [tensor for tensor, owners in beside.items() if owners != [BASE]]
    check_tensors(folders)
    if base is not None and not config.needs_base:
        check_tensors(align({name: TensorFolder(every[name]) for name in (read[0], BASE)})[0])
    first = folders[next(iter(models))]
    weights = check_weights(config, list(models), list(first.infos))
    dtype = getattr(torch, config.dtype)
    infos = [
        TensorInfo(info.name, dtype if info.dtype.is_floating_point else info.dtype, info.shape)
        for info in first.infos.values()
    ]
    files = weight_files(infos, config.file_mib * _MIB)
    sources = {name: folders[name] for name in models}
    origin = folders.get(BASE) if config.needs_base else None
    return MergePlan(config, sources, origin, weights, tuple(files), tuple(passed), tuple(left_out))


def model_names(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last parts, as few as tell all apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    repeated = next(path for path in paths if paths.count(path) > 1)
    raise ConfigError(f"merging: {repeated!r} is given twice")
