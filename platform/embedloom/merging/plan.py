"""A merge that was checked and laid out, with the weight of every model for every tensor."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from embedloom.config.merging import MODEL_COUNTS, SIGNED, LayerWeights, MergingConfig
from embedloom.core.storage import Place
from embedloom.errors import ConfigError
from embedloom.merging.checks import BASE, Difference, check_mergeable, check_tensors
from embedloom.merging.tensors import TensorFolder, TensorInfo, WeightFile, align, weight_files

# The weight of every model for every tensor: the section's own, or those of the first rule that matches.


_LAYER = re.compile(
    r"(?:^|\.)(\d+)\."
)  # "layers.11.mlp.up_proj.weight", "encoder.layer.11.output.dense.bias"

Weights = tuple[float, ...]


def layer_of(tensor: str) -> int | None:
    """Number of the layer a tensor belongs to: the first number in its name."""
    found = _LAYER.search(tensor)
    return int(found.group(1)) if found else None


def check_weights(config: MergingConfig, names: Sequence[str], tensors: Sequence[str]) -> Weights:
    """The weights of tensors that no rule of ``merging.layers`` names, as they are used.

    Args:
        config: the merging section.
        names: of the models.
        tensors: names of the tensors, which the rules must match.

    Raises:
        ConfigError: too few or many models for the method, another number of weights than models, weights the method
            cannot use, or a rule that matches no tensor.
    """
    fewest, most = MODEL_COUNTS.get(config.method, (1, None))
    if len(names) < fewest or (most is not None and len(names) > most):
        allowed = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        raise ConfigError(
            f"merging: {len(names)} models given ({', '.join(names) or 'none'}); method {config.method} takes {allowed}"
        )
    for number, rule in enumerate(config.layers):
        where = f"merging.layers.{number}"
        _check(rule.weights, config, names, f"{where}.weights")
        if not any(_matches(rule, tensor) for tensor in tensors):
            seen = sorted({layer for layer in map(layer_of, tensors) if layer is not None})
            layers = f"layers {seen[0]} to {seen[-1]}" if seen else "no layers"
            wanted = f"layers {list(rule.layers)}" if rule.layers else f"tensors {rule.tensors!r}"
            raise ConfigError(
                f"{where}: {wanted} match no tensor; the models have {layers}, such as {tensors[0]!r}"
            )
    given = config.weights if config.weights is not None else (1.0,) * len(names)
    _check(given, config, names, "merging.weights")
    return _used(given, config, equal=config.weights is None)


def tensor_weights(config: MergingConfig, default: Weights, tensor: str) -> Weights:
    """Weights of one tensor; ``default`` comes from ``check_weights``."""
    rule = next((rule for rule in config.layers if _matches(rule, tensor)), None)
    return default if rule is None else _used(rule.weights, config, equal=False)


def _matches(rule: LayerWeights, tensor: str) -> bool:
    if rule.layers is None:
        return fnmatchcase(tensor, str(rule.tensors))
    layer = layer_of(tensor)
    return layer is not None and rule.layers[0] <= layer <= rule.layers[1]


def _used(given: Weights, config: MergingConfig, *, equal: bool) -> Weights:
    """Shares of one, but for sums of task vectors, where given weights count as they are."""
    if config.method in SIGNED and not equal:
        return given
    total = sum(given)
    return tuple(weight / total for weight in given)


def _check(given: Weights, config: MergingConfig, names: Sequence[str], where: str) -> None:
    if len(given) != len(names):
        raise ConfigError(
            f"{where}: {len(given)} given for {len(names)} models ({', '.join(names)}); one each is needed"
        )
    if config.method in SIGNED:
        if any(abs(weight) == float("inf") or weight != weight for weight in given) or not any(given):
            raise ConfigError(f"{where}: {list(given)}; each must be finite, and one at least not 0")
    elif any(not 0 <= weight < float("inf") for weight in given) or sum(given) <= 0:
        raise ConfigError(f"{where}: {list(given)}; each must be 0 or more, and their sum positive")


# A merge that was checked and laid out: all that a task needs to write one of its files.


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
