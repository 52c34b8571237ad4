"""Model folders that others made, read as sentence-transformers (2 to 6) reads them, with the layers they have after pooling."""

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from embedloom.core.progress import note
from embedloom.core.prompting import CONTRACT_FILE, PLAIN_TEMPLATE, PromptContract
from embedloom.encoder.backbone import attends_causally, position_limit, read_config, text_config
from embedloom.encoder.tokenizer import length_file, load_tokenizer, special_habits
from embedloom.errors import ConfigError, DataError, one_line

# What a foreign model does to a pooled vector: Dense layers, LayerNorm, normalisation, a cut; read, not trained.


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


# Model folders that others made, read as sentence-transformers (2 to 6) reads them.
#
# There is one reading for everything that opens a model: the base of a training, a mining teacher, evaluation, the gate,
# ``embed`` and the endpoint. What our encoder cannot compute has a reason by name (``Layout.beyond``); evaluation, mining
# and ``embed`` then run sentence-transformers itself, the rest refuses with that reason.


_POOLING_FLAGS = {  # in the order in which sentence-transformers puts several behind one another
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last_token",
}
_POOLING_NAMES = {
    "mean_sqrt_len_tokens": "mean_sqrt_len", "weightedmean": "weighted_mean", "lasttoken": "last_token",
}  # fmt: skip
_SIDE_NAMES = ("query", "document")  # what encode_query and encode_document look for
_SETTINGS_FILE = "config_sentence_transformers.json"
_LEAST_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """What the files of a foreign model say."""

    transformer: Path  # folder of config.json, weights and tokenizer
    pooling: str = "mean"
    head: tuple[HeadModule, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    is_transformer: bool = True  # with a pooling behind it
    beyond: str | None = None  # why our encoder would compute something else; None: it would not

    @property
    def left_out(self) -> str | None:
        """Prompts that the library applies to neither side by itself, in words; None where there is none."""
        names = sorted(set(self.prompts) - set(_SIDE_NAMES))
        if not names:
            return None
        return (
            f"its prompts {names} are applied by name only, as in sentence-transformers, whose encode_query and "
            "encode_document take 'query' and 'document'"
        )

    @property
    def query_prompt(self) -> str:
        """What encode_query puts before a text."""
        return self.prompts.get("query") or ""

    @property
    def document_prompt(self) -> str:
        """What encode_document puts before a text."""
        return self.prompts.get("document") or ""

    def contract(self) -> PromptContract:
        """The contract that the files describe: prompts, pooling, lengths and attention.

        Raises:
            DataError: no tokenizer, no limit, or an architecture that cannot be read.
        """
        config = text_config(read_config(self.transformer))
        tokenizer = load_tokenizer(self.transformer)
        limit = max(_LEAST_TOKENS, token_limit(self.transformer, config, tokenizer))
        add_bos, add_eos = special_habits(tokenizer)
        if self.left_out:
            note("model", f"{self.transformer.name}: {self.left_out}")
        return PromptContract(
            **self._templates(),
            add_bos=add_bos,
            add_eos=add_eos,
            max_query_tokens=limit,
            max_document_tokens=limit,
            pooling=self.pooling,
            attention="causal" if attends_causally(config) else "bidirectional",
        )

    def prompts_only(self) -> PromptContract:
        """What can be said as a contract of a model that sentence-transformers runs: its prompts.

        Pooling, lengths and attention are the library's; the fields of that name say nothing here.
        """
        return PromptContract(**self._templates())

    def _templates(self) -> dict[str, Any]:
        """What stands around a text, as fields of a contract; a model without prompts has one plain template."""
        if not (self.query_prompt or self.document_prompt or self.default_prompt):
            return {"template": PLAIN_TEMPLATE}
        return {
            "template": self.query_prompt + PLAIN_TEMPLATE,
            "document_template": self.document_prompt + PLAIN_TEMPLATE,
            "symmetric_template": self.default_prompt + PLAIN_TEMPLATE,
        }


def base_transformer(folder: Path, pooling: str) -> Path:
    """Where the transformer of an ``encoder.base`` lies; what a training would drop of the folder is refused.

    Args:
        folder: any model folder.
        pooling: what ``encoder.pooling`` says.

    Raises:
        ConfigError: the folder has layers after the pooling, or is no transformer.
    """
    if (folder / CONTRACT_FILE).exists() or not (folder / "modules.json").is_file():
        return folder
    layout = read_layout(folder)
    if not layout.is_transformer or layout.head:
        what = ", ".join(module.kind for module in layout.head) or "no Transformer and Pooling"
        raise ConfigError(
            f"encoder.base: {str(folder)!r} has {what} in its modules.json, which training would drop; allowed: a base of a "
            "transformer and a pooling, or a copy of this folder without modules.json, to train its transformer alone"
        )
    if layout.pooling != pooling:
        note("encoder", f"{folder.name} was pooled by {layout.pooling} so far; encoder.pooling is {pooling}")
    return layout.transformer


def token_limit(folder: Path, config: Any, tokenizer: Any) -> int:
    """Most tokens of a text: the least of what the model's files and its position table say.

    sentence-transformers up to 5.3 stores ``max_seq_length`` beside the weights, later ones as the tokenizer's
    ``model_max_length``; the first, where it is stated, replaces the second.
    """
    stated = _read(length_file(folder), {}).get("max_seq_length")
    limits = [stated or tokenizer.model_max_length, position_limit(config)]
    known = [int(limit) for limit in limits if limit is not None and limit < 2**31 and not math.isinf(limit)]
    if not known:
        raise DataError(
            f"{folder}: no file says how long a text may be; allowed: max_seq_length in sentence_bert_config.json"
        )
    return min(known)


def read_layout(folder: Path) -> Layout:
    """What a foreign model folder consists of.

    Raises:
        DataError: a config that cannot be read.
    """
    modules = _read(folder / "modules.json", None)
    if modules is None:
        return _without_modules(folder)
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    root = folder / str(modules[0].get("path") or "") if modules else folder
    own = [
        module["type"] for module in modules if not str(module["type"]).startswith("sentence_transformers.")
    ]
    reason = f"it brings module classes of its own ({', '.join(own)})" if own else None
    if reason is None and kinds[:2] != ["Transformer", "Pooling"]:
        reason = f"its modules are {kinds}, where our encoder computes Transformer, Pooling and what follows"
    if reason is not None:
        prompts, default = _prompts(folder)
        return Layout(root, prompts=prompts, default_prompt=default, is_transformer=False, beyond=reason)
    later = [
        HeadModule(
            kind, _read(folder / str(module["path"]) / "config.json", {}), folder / str(module["path"])
        )
        for kind, module in zip(kinds[2:], modules[2:], strict=True)
        if kind != "Dropout"  # nothing outside training
    ]
    return _with_settings(folder, root, folder / str(modules[1]["path"]) / "config.json", later)


def _without_modules(folder: Path) -> Layout:
    """No files of the library: known only where the model's own config says how to pool, as NVIDIA's recipe writes it."""
    config = read_config(folder).to_dict()
    if config.get("pooling") == "avg":
        return Layout(folder)
    if any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return Layout(folder, beyond="it is a cross-encoder, which gives scores of pairs and no vectors")
    return Layout(folder, beyond="it has no modules.json, so how to pool is unknown")


def _with_settings(folder: Path, root: Path, pooling_file: Path, later: Sequence[HeadModule]) -> Layout:
    settings = _read(folder / _SETTINGS_FILE, {})
    prompts, default = _prompts(folder)
    head = list(later)
    if settings.get("truncate_dim"):
        head.append(HeadModule("Truncate", {"dimensions": settings["truncate_dim"]}, folder))
    pooling = _read(pooling_file, {})
    # A final Normalize is what every contract ends with.
    while head and head[-1].kind == "Normalize" and head[-1].problem() is None:
        head.pop()
    modes = pooling_of(pooling)
    reasons = [
        *_head_problems(head),
        None if modes else f"its pooling is {pooling.get('pooling_mode')!r}",
        "its pooling leaves the prompt's tokens out (include_prompt)"
        if pooling.get("include_prompt") is False and (prompts or default) else None,
        _odd_settings(root),
        _measure(settings, bool(later) and later[-1].kind == "Normalize"),
    ]  # fmt: skip
    beyond = next((reason for reason in reasons if reason), None)
    return Layout(root, modes or "mean", tuple(head), prompts, default, beyond=beyond)


def _prompts(folder: Path) -> tuple[dict[str, str], str]:
    """Prompts by name, empty ones left out, and the one that ``encode`` takes without a name."""
    settings = _read(folder / _SETTINGS_FILE, {})
    prompts = settings.get("prompts") or {}
    default = prompts.get(settings.get("default_prompt_name")) or ""
    return {name: text for name, text in prompts.items() if text}, default


def _head_problems(head: Sequence[HeadModule]) -> list[str | None]:
    unknown = [
        module.kind for module in head if module.kind not in ("Dense", "LayerNorm", "Normalize", "Truncate")
    ]
    if unknown:
        return [f"it has {', '.join(unknown)} after the pooling, which our encoder does not compute"]
    return [module.problem() for module in head]


def pooling_of(content: Mapping[str, Any]) -> str | None:
    """The pooling of a Pooling module's config, in any of its layouts, in a contract's words; None if unknown."""
    stated = content.get("pooling_mode")
    if stated is None:
        found = [mode for flag, mode in _POOLING_FLAGS.items() if content.get(flag)] or ["mean"]
    else:
        found = [_POOLING_NAMES.get(mode, mode) for mode in ([stated] if isinstance(stated, str) else stated)]
    known = set(_POOLING_FLAGS.values())
    return "+".join(found) if found and all(mode in known for mode in found) else None


def _odd_settings(root: Path) -> str | None:
    """Settings of a Transformer module that neither contract nor tokenizer can say, such as chat messages.

    A chat template alone is no such thing: the library takes it where ``modality_config`` names messages, which it writes
    since 5.4, and reads a folder without one as text (``Transformer.load_config``).
    """
    path = length_file(root)
    config = _read(path, {})
    plain = {
        "max_seq_length": config.get("max_seq_length"),
        "do_lower_case": config.get("do_lower_case"),
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    }
    if "message" in (config.get("modality_config") or {}):
        return f"its texts go through a chat template (modality_config of {path.name})"
    odd = sorted(key for key, value in config.items() if value and value != plain.get(key))
    return f"{path.name} sets {odd}" if odd else None


def _measure(settings: Mapping[str, Any], unit: bool) -> str | None:
    measure = settings.get("similarity_fn_name") or "cosine"
    if measure == "cosine" or (unit and measure in ("dot", "euclidean")):
        return None
    return f"it is made for the similarity {measure!r} of vectors that are not of length 1, where everything here compares cosines"


def _read(path: Path, default: Any) -> Any:
    """JSON of a model file, or the default where the model has no such file."""
    return json.loads(path.read_text()) if path.is_file() else default
