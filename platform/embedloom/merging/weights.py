"""The weight of every model for every tensor: the section's own, or those of the first rule that matches."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from embedloom.config.merging import MODEL_COUNTS, SIGNED, LayerWeights, MergingConfig
from embedloom.errors import ConfigError

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
