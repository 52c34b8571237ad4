"""What a foreign model does to a pooled vector: Dense layers, LayerNorm, normalisation, a cut; read, not trained."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from embedloom.errors import DataError, one_line

# Keys of a Dense layer's config that change nothing of what it computes, or that ``_Dense`` reads.
_DENSE_KEYS = {"in_features", "out_features", "bias", "activation_function", "use_residual"}
_DEFAULT_NAMES = {
    "module_input_name": {None, "sentence_embedding"},
    "module_output_name": {None, "sentence_embedding"},
}


@dataclass(frozen=True, slots=True)
class HeadModule:
    """One module after the pooling: its kind, its settings, and the folder with its weights."""

    kind: str  # Dense, LayerNorm, Normalize, Truncate
    settings: Mapping[str, Any]
    folder: Path

    def problem(self) -> str | None:
        """Why this module cannot be computed as sentence-transformers does; None if it can."""
        for key, allowed in _DEFAULT_NAMES.items():
            if self.settings.get(key) not in allowed:
                return f"its {self.kind} layer has {key} {self.settings[key]!r}"
        if self.kind != "Dense":
            return None
        unknown = sorted(set(self.settings) - _DENSE_KEYS - set(_DEFAULT_NAMES))
        if unknown:
            return f"its Dense layer sets {unknown}"
        name = str(self.settings.get("activation_function", _TANH))
        return None if _activation(name) else f"its Dense layer has the activation {name!r}"


_TANH = "torch.nn.modules.activation.Tanh"


def _activation(name: str) -> nn.Module | None:
    """An activation of torch by its full name; None for what is none of torch's modules."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("torch.nn"):
        return None
    try:
        kind = getattr(importlib.import_module(module), leaf, None)
        return kind() if isinstance(kind, type) and issubclass(kind, nn.Module) else None
    except (ImportError, TypeError):
        return None


class _Dense(nn.Module):
    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        sizes = int(settings["in_features"]), int(settings["out_features"])
        self.linear = nn.Linear(*sizes, bias=bool(settings.get("bias", True)))
        self.activation = _activation(str(settings.get("activation_function", _TANH))) or nn.Tanh()
        self.use_residual = bool(settings.get("use_residual", False))
        if self.use_residual and sizes[0] != sizes[1]:
            self.residual = nn.Linear(*sizes, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, in] to [b, out]."""
        out: Tensor = self.activation(self.linear(vectors))
        if not self.use_residual:
            return out
        return out + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class _LayerNorm(nn.Module):
    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(int(settings["dimension"]))

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, d] to [b, d]."""
        out: Tensor = self.norm(vectors)
        return out


class _Normalize(nn.Module):
    def __init__(self, _: Mapping[str, Any]) -> None:
        super().__init__()

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, d] to unit length."""
        return nn.functional.normalize(vectors, dim=-1)


class _Truncate(nn.Module):
    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.dimensions = int(settings["dimensions"])

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, d] to [b, dimensions]."""
        return vectors[:, : self.dimensions]


_MODULES: dict[str, type[nn.Module]] = {
    "Dense": _Dense, "LayerNorm": _LayerNorm, "Normalize": _Normalize, "Truncate": _Truncate,
}  # fmt: skip
_SIZES = {"Dense": "out_features", "Truncate": "dimensions"}  # settings that say how long a vector becomes


class Head(nn.Module):
    """The modules of a model after its pooling, in float32."""

    def __init__(self, modules: tuple[HeadModule, ...], pooled: int) -> None:
        """Read the modules' weights.

        Args:
            modules: in their order; none leaves vectors as they are.
            pooled: length of a pooled vector.

        Raises:
            DataError: weights are missing or do not fit.
        """
        super().__init__()
        self.layers = nn.ModuleList(_load(module) for module in modules)
        self.dimension: int = pooled
        for module in modules:
            if module.kind in _SIZES:
                size = int(module.settings[_SIZES[module.kind]])
                self.dimension = size if module.kind == "Dense" else min(self.dimension, size)

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, pooled] to [b, dimension], float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            for layer in self.layers:
                vectors = layer(vectors)
        return vectors


def _load(module: HeadModule) -> nn.Module:
    layer = _MODULES[module.kind](module.settings)
    if not any(True for _ in layer.parameters()):
        return layer
    safe, pickled = module.folder / "model.safetensors", module.folder / "pytorch_model.bin"
    if safe.is_file():
        weights = load_file(safe)
    elif pickled.is_file():
        weights = torch.load(pickled, map_location="cpu", weights_only=True)
    else:
        raise DataError(f"{module.folder}: no weights (model.safetensors) of the {module.kind} layer")
    try:
        layer.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise DataError(f"{module.folder}: {one_line(error, 300)}") from error
    return layer.requires_grad_(False).eval()
