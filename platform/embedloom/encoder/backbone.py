"""The transformer below the pooling: what a folder's ``config.json`` describes, loaded, made bidirectional where it is a
decoder, cast for its device, and shared between processes.
"""

import copy
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING,
)

from embedloom.core.contents import is_trusted
from embedloom.core.hardware import has_bf16_instructions
from embedloom.core.progress import note
from embedloom.encoder.own_code import SWITCH, read_as_llama
from embedloom.errors import ConfigError, DataError, first_line, one_line

# What this process can compute with.


DTypeName = Literal["auto", "float32", "bfloat16", "int8"]  # int8: linear layers only (cpu_layers.py), on CPU


def has_gpu() -> bool:
    """Whether this process may compute on a GPU: torch sees one and, in a process of Ray, Ray gave it one.

    A driver, or an actor that reserved none, would take memory of one that somebody else reserved.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and not ray.get_gpu_ids():
        return False
    return bool(torch.cuda.is_available())


def pick_device(name: str = "auto") -> torch.device:
    """``auto``: the GPU that is this process's own (``has_gpu``), else the CPU.

    Raises:
        ConfigError: a CUDA device is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if has_gpu() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {name!r} is asked for, but torch sees no CUDA device; allowed here: 'auto', 'cpu'"
        )
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware; emulated ones are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return has_bf16_instructions()


def as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over an array's memory, to be read only: arrays out of Parquet or Ray's object store are read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def pick_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where it is fast, else float32; so is all of ``int8`` but its linear layers."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


# What kind of model a folder's ``config.json`` describes; code beside the weights is run out of trusted folders alone.


# In transformers' list of causal language models, and yet trained without a causal mask.
_NOT_CAUSAL = {"xlnet", "bert-generation"}
_OWN_CODE_KEYS = ("auto_map", "architectures", "model_type", "torch_dtype", "transformers_version", "dtype")


def read_config(folder: Path) -> Any:
    """The config of a model folder, as transformers' own class.

    Args:
        folder: holds ``config.json``.

    Raises:
        DataError: no model folder, an architecture that transformers does not have, or one that only code beside the
            weights computes.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{folder}: no config.json, so this is not a model folder")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if read_as_llama(content):
        return _bidirectional_llama(content)
    try:
        # Said in words: left open, transformers asks on the terminal whether to run a folder's own code.
        return AutoConfig.from_pretrained(folder, trust_remote_code=is_trusted(folder))
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise DataError(_unreadable(path, content, error)) from error


def _bidirectional_llama(content: dict[str, Any]) -> LlamaConfig:
    config = LlamaConfig(**{key: value for key, value in content.items() if key not in _OWN_CODE_KEYS})
    config.is_causal = False
    config.architectures = ["LlamaModel"]
    return config


def _unreadable(path: Path, content: dict[str, Any], error: Exception) -> str:
    kind = content.get("model_type")
    if content.get("auto_map") and is_trusted(path.parent):
        return (
            f"{path}: the code beside the weights does not run ({type(error).__name__}: {first_line(error)})"
        )
    if content.get("auto_map"):
        return (
            f"{path}: model_type {kind!r} is computed by code that lies beside the weights (auto_map), which is run only by "
            f"{SWITCH}; a base is never one. Allowed without: an architecture that transformers "
            f"{transformers.__version__} has"
        )
    return f"{path}: transformers {transformers.__version__} cannot read model_type {kind!r}: {first_line(error)}"


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model; of a text model the config itself.

    Of an encoder-decoder it is the whole config, whose encoder ``auto_class`` opens.

    Raises:
        DataError: an encoder-decoder without an encoder to open alone, or a multimodal model without a language model to
            take out.
    """
    if is_encoder_decoder(config):
        if config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
            return config
        raise DataError(encoder_decoder(config))
    text = config.get_text_config()
    if text is not config and not is_decoder(text):
        raise DataError(
            f"model_type {config.model_type!r} is multimodal and has no language model to take out "
            f"(its text part is {text.model_type!r}); allowed: encoders and decoders of text"
        )
    return text


def runs_own_code(folder: Path, config: Any) -> bool:
    """Whether the model of a folder is computed by the code in it: a person said so, and its config names a class."""
    return is_trusted(folder) and "AutoModel" in (getattr(config, "auto_map", None) or {})


def is_encoder_decoder(config: Any) -> bool:
    """Whether the architecture has both; T5's encoder alone, once saved, says in its config that it has not."""
    return getattr(config, "is_encoder_decoder", False) or _has_both(config.model_type)


@cache
def _has_both(kind: str) -> bool:
    return kind in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[kind](), "is_encoder_decoder", False))


def encoder_decoder(config: Any) -> str:
    """That a model cannot be taken, as it is an encoder-decoder."""
    return (
        f"model_type {config.model_type!r} is an encoder-decoder, which is not supported here; allowed: encoders such as "
        "BERT and ModernBERT, and decoders such as Llama, Qwen3 and Gemma 3; the encoder of a T5 also, in a "
        "sentence-transformers folder that is not trained further"
    )


def auto_class(config: Any) -> Any:
    """The class of transformers that opens a text model: of an encoder-decoder (T5) its encoder alone."""
    return AutoModelForTextEncoding if is_encoder_decoder(config) else AutoModel


def has_own_code(model: nn.Module) -> bool:
    """Whether a model is of a class that lay beside its weights; how it attends is its own affair."""
    return type(model).__module__.startswith("transformers_modules")


def is_decoder(config: Any) -> bool:
    """Whether the architecture was made with a causal mask (Llama, Mistral, Qwen, ...), told by what it is.

    That is: transformers has a causal language model of it and none with masked tokens; text models inside
    multimodal ones, which are in neither list, are looked at layer by layer.
    """
    kind = config.model_type
    if is_encoder_decoder(config):
        return False  # its encoder is what is opened
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in _NOT_CAUSAL:
        return bool(getattr(config, "is_decoder", False))
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or _has_causal_attention(kind)


def attends_causally(config: Any) -> bool:
    """Whether the model of a config, as it was saved, hides later tokens from earlier ones."""
    return (
        is_decoder(config)
        and getattr(config, "is_causal", True)
        and getattr(config, "use_bidirectional_attention", None) not in (True, "all")
    )


@cache
def _has_causal_attention(kind: str) -> bool:
    """Whether attention layers of this model_type, with the sizes of its default config, say that they are causal."""
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        return False
    model = empty_model(CONFIG_MAPPING[kind]())
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def empty_model(config: Any) -> nn.Module:
    """The model of a config with its first layer alone and without weights (on torch's meta device)."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = list(small.layer_types)[:1]
    with torch.device("meta"):
        model: nn.Module = auto_class(small).from_config(small, trust_remote_code=False)
    return model


def first_position(model: nn.Module) -> int:
    """Row of the position table that a text's first token takes: 2 in RoBERTa's descendants and MPNet, else 0.

    Those put a padding index into their position table, and count from behind it.
    """
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return int(table.padding_idx) + 1
    return 0


def position_limit(config: Any, model: nn.Module | None = None) -> int | None:
    """Most tokens that a text may have by the architecture; None where positions have no end.

    Args:
        config: of the text model.
        model: one of this config, if there is one already; None makes one without weights where the architecture
            may begin its positions behind the padding index.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    if model is None and (is_decoder(config) or type(config) not in MODEL_MAPPING):
        return limit  # of code beside the weights, as its library takes it
    return limit - first_position(model if model is not None else empty_model(config))


def attention_kernel(config: Any) -> str:
    """``sdpa``, or ``eager`` where the architecture has no sdpa or sdpa would drop a part of it without a word.

    No sdpa: MPNet, DeBERTa, gpt-oss. Dropped: the soft cap on attention scores of Gemma 2.
    """
    kind = MODEL_MAPPING.get(type(config), None)
    model_class = kind[0] if isinstance(kind, tuple) else kind
    supported = getattr(model_class, "_supports_sdpa", True)
    return "sdpa" if supported and not getattr(config, "attn_logit_softcapping", None) else "eager"


# Linear layers as the CPU multiplies them fastest, for inference; parameters keep their names, shapes and values.
#
# oneDNN reads a weight whose columns lie contiguous in memory as fast as one it has repacked for itself (within 3 %),
# while torch's own path copies the bias first and, in float32, goes through MKL. On two Zen 4 cores: float32 192 →
# 216 GFLOP/s at 4,096 tokens and 90 → 160 at 16; bfloat16 400 → 420. As nothing is repacked, the weights can lie in
# memory that several processes share.


class InferenceLinear(nn.Linear):
    """``nn.Linear`` on oneDNN: computes in the weight's dtype whatever the input's, and has no gradient."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] of any float type in, [..., out_features] of the weight's type out."""
        states = states.to(self.weight.dtype)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")
        return product


def has_fast_linear(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN kernels for this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cast_for_inference(model: nn.Module, dtype: torch.dtype) -> None:
    """Freeze a CPU model in place, and lay out the weights of its linear layers by columns, in ``dtype``.

    Norms and embeddings keep their dtype: a float32 residual stream costs 3 % (MiniLM) and, as under autocast, keeps
    the rounding of bfloat16 from adding up over the layers.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = _frozen(module.weight.to(dtype).t().contiguous().t())
            if module.bias is not None:
                module.bias = _frozen(module.bias.to(dtype))
    use_inference_linear(model)


def use_inference_linear(model: nn.Module) -> None:
    """Make every linear layer an ``InferenceLinear``; the weights are taken as they lie."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = InferenceLinear


def autocast_of(model: nn.Module) -> torch.autocast:
    """Autocast where bfloat16 products stand beside a float32 residual stream, so that attention sees one dtype.

    Rotary positions otherwise leave queries and keys in float32 and values in bfloat16.
    """
    parameters = list(model.parameters())
    mixed = len({parameter.dtype for parameter in parameters}) > 1
    return torch.autocast(parameters[0].device.type, dtype=torch.bfloat16, enabled=mixed)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# Hidden states of two runs of the same causal prefix differ by float noise only; a mask that lets later tokens
# through moves them by whole units (21 on SmolLM2).
_LEAK_TOLERANCE = 1e-3
# Where an architecture has a switch of its own for seeing later tokens, it is set instead of ``is_causal``: other
# readers (vLLM, TEI) follow that one.
_OWN_SWITCH: dict[str, Any] = {"gemma3_text": True}
# Keys of how far a layer sees, where that is less than the text.
_WINDOW_KEYS = ("sliding_window", "attention_chunk_size")
LONGEST_PROBE = 1024  # tokens; beyond, the arithmetic of the windows is taken on trust


def load_backbone(
    folder: Path,
    attention: str,
    dtype: torch.dtype,
    num_layers: int | None = None,
    longest: int | None = None,
    layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """Load weights without a head and set the attention mask; of a multimodal checkpoint, the text model alone.

    Args:
        folder: of the model.
        attention: ``bidirectional`` or ``causal``.
        dtype: of the weights.
        num_layers: keep the first so many; None: all.
        longest: tokens of the longest text, to which the windows of a bidirectional decoder are widened; None leaves
            them as they are.
        layers: keep these, counted from 0; None: all. The whole model is in memory for a moment.

    Raises:
        DataError: not a model folder, one without weights, or of an architecture that cannot be read.
        ConfigError: layers asked for that are not there, or an encoder asked to be causal.
    """
    whole = read_config(folder)
    if runs_own_code(folder, whole):
        if layers is not None:
            raise ConfigError(
                f"encoder.layers: {folder.name} runs its own code, which decides its layers; allowed: null"
            )
        return _own_model(folder, whole, dtype)
    config = _prepared(whole, folder, attention, num_layers)
    if longest is not None and is_decoder(config) and attention == "bidirectional":
        changed = widen_windows(config, longest)
        if changed:
            note("encoder", f"{folder.name}: {changed} tokens, so that every layer sees whole texts")
    if not (any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))):
        raise DataError(f"{folder}: no weights (*.safetensors) in this model folder")
    options = {"dtype": dtype, "attn_implementation": attention_kernel(config), "trust_remote_code": False}
    model = auto_class(config).from_pretrained(folder, config=whole, **options)
    if config is not whole:
        model = _text_model(model, config, folder)
    if layers is not None:
        _pick_layers(model, folder, layers)
    check_attention(model, attention)
    return model


def _own_model(folder: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model by the code beside its weights, which decides itself how it attends: nothing is set or proven."""
    try:
        model: PreTrainedModel = AutoModel.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=True
        )
    except Exception as error:  # whatever code of others leads to
        raise DataError(
            f"{folder}: the code beside the weights does not run ({type(error).__name__}: {one_line(error, 300)})"
        ) from error
    return model


def _text_model(model: PreTrainedModel, config: Any, folder: Path) -> PreTrainedModel:
    """The language model inside a multimodal one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(config):
            note(
                "model",
                f"{folder.name}: {model.config.model_type} is multimodal; its text model ({config.model_type}) is taken",
            )
            return module
    raise DataError(
        f"{folder}: {type(model).__name__} has no text model of type {config.model_type!r} to take out"
    )


def backbone_config(folder: Path, attention: str, num_layers: int | None = None) -> Any:
    """The config of the folder's text model with the attention mask set.

    ``config.is_causal`` is the one switch that holds with and without padding, in sdpa and eager, and in every
    reader of the saved config; setting it on the attention modules alone turns causal again under padding.

    Raises:
        DataError: not a model folder, or of an architecture that cannot be read.
        ConfigError: more layers asked for than there are, or an encoder asked to be causal.
    """
    return _prepared(read_config(folder), folder, attention, num_layers)


def _prepared(whole: Any, folder: Path, attention: str, num_layers: int | None) -> Any:
    """The text part of a config, changed in place."""
    try:
        config = text_config(whole)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    if num_layers is not None:
        _keep_layers(config, folder, num_layers)
    if is_decoder(config):
        _set_attention(config, attention)
    elif attention == "causal":
        raise ConfigError(
            f"encoder.attention: 'causal' does not fit {config.model_type}, which is an encoder; allowed: 'bidirectional'"
        )
    return config


def _keep_layers(config: Any, folder: Path, num_layers: int) -> None:
    if num_layers > config.num_hidden_layers:
        raise ConfigError(
            f"encoder.num_layers: {num_layers} asked for, {folder.name} has {config.num_hidden_layers}"
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def _pick_layers(model: PreTrainedModel, folder: Path, layers: Sequence[int]) -> None:
    """Take all but some layers out of a loaded model, and out of what its config says of each."""
    config = model.config
    count = config.num_hidden_layers
    if max(layers) >= count:
        raise ConfigError(
            f"encoder.layers: {max(layers)} asked for, {folder.name} has {count}; allowed: 0 to {count - 1}"
        )
    stacks = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise ConfigError(
            f"encoder.layers: {folder.name} ({config.model_type}) has {len(stacks)} stacks of {count} layers; allowed: models with one"
        )
    parent, name, stack = stacks[0]
    kept = [stack[at] for at in layers]
    setattr(parent, name, nn.ModuleList(kept))
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    # Such as layer_types and no_rope_layers: what kind each layer is.
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[at] for at in layers])
    config.num_hidden_layers = len(kept)


def _set_attention(config: Any, attention: str) -> None:
    causal = attention == "causal"
    config.use_cache = False
    switch = _OWN_SWITCH.get(config.model_type)
    if switch is None or not getattr(config, "is_causal", True):
        config.is_causal = causal
    if switch is not None and (causal or getattr(config, "is_causal", True)):
        config.use_bidirectional_attention = False if causal else switch


def widen_windows(config: Any, limit: int) -> str | None:
    """Let every layer of a bidirectional model see texts of ``limit`` tokens whole; says what was changed.

    A causal layer with a window sees the tokens before it; a text longer than that is what a bidirectional model is
    for, so the window is set to what holds all of it.
    """
    changed = []
    for key in _WINDOW_KEYS:
        window = getattr(config, key, None)
        if isinstance(window, int) and 0 < window < limit:
            setattr(config, key, limit)
            changed.append(f"{key} {window}")
    return f"{', '.join(changed)} widened to {limit}" if changed else None


@torch.no_grad()
def check_attention(model: PreTrainedModel, attention: str) -> None:
    """Prove the mask by experiment: the last token must move the first hidden state iff bidirectional.

    Checked with padding too, where some versions of some libraries fall back to a causal mask.

    Raises:
        DataError: the model does not attend as its contract says.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.config.vocab_size
    first = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 7, 9, 0]], device=device) % vocabulary
    masks = {
        "without padding": torch.ones_like(first[:, :4]),
        "with padding": torch.tensor([[1, 1, 1, 1, 0]] * 2, device=device),
    }
    for case, mask in masks.items():
        with autocast_of(model):
            output = model(input_ids=first[:, : mask.shape[1]], attention_mask=mask)
        hidden = output.last_hidden_state.float()
        leak = (hidden[0, 0] - hidden[1, 0]).abs().max().item()
        if attention == "bidirectional" and leak == 0.0:
            raise DataError(
                f"{model.config.model_type} attends causally {case}: changing the last token does not change the first "
                f"hidden state (config.is_causal={getattr(model.config, 'is_causal', None)}), so transformers "
                f"{transformers.__version__} cannot compute it as 'bidirectional'"
            )
        if attention == "causal" and leak > _LEAK_TOLERANCE:
            raise DataError(
                f"{model.config.model_type} attends bidirectionally {case} (leak {leak:.3g}), its contract says causal"
            )
    model.train(training)


@torch.no_grad()
def check_layers(model: PreTrainedModel, limit: int) -> None:
    """Prove that every layer of a bidirectional model lets the last token of a text move the first one's state.

    Each layer is asked by itself, with its own input of a text of four tokens and of one of ``limit`` (1,024 at most),
    with and without padding: through the whole model, one full-attention layer among many causal ones would do.

    Raises:
        DataError: naming the layers that do not, and what they are.
    """
    training = model.training
    model.eval()
    layers = _layers(model)
    for length in sorted({4, min(limit, LONGEST_PROBE)}):
        for padding in (0, 1):
            causal = [
                number for number, leak in enumerate(_leaks(model, layers, length, padding)) if leak == 0.0
            ]
            if causal:
                raise DataError(_causal_layers(model.config, causal, len(layers), length))
    model.train(training)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers, in order.

    Raises:
        DataError: it is not built of a list of layers.
    """
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise DataError(
        f"{type(model).__name__} has no list of {count} layers that could be asked how they attend"
    )


def _leaks(model: PreTrainedModel, layers: list[nn.Module], length: int, padding: int) -> Iterator[float]:
    """By how much each layer's first output moves when its last input does."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: calls.update({number: (args, kwargs)}), with_kwargs=True
        )
        for number, layer in enumerate(layers)
    ]
    device = next(model.parameters()).device
    ids = (torch.arange(length + padding, device=device) + 5).unsqueeze(0) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[:, length:] = 0
    try:
        with autocast_of(model):
            model(input_ids=ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    for number, layer in enumerate(layers):
        args, kwargs = calls[number]
        with autocast_of(model):
            before = _first_output(layer, args, kwargs)
            after = _first_output(layer, *_with_other_last(args, kwargs, length - 1))
        yield float((after - before).abs().max())


def _first_output(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    out = layer(*args, **kwargs)
    states: Tensor = out[0] if isinstance(out, tuple) else out
    return states.reshape(-1, states.shape[-1])[0].float()


def _with_other_last(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another state at ``position``."""
    states: Tensor = (args[0] if args else kwargs["hidden_states"]).clone()
    states[:, position] = states[:, position].flip(-1) + 1.0
    return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})


def _causal_layers(config: Any, causal: list[int], count: int, length: int) -> str:
    kinds = getattr(config, "layer_types", None)
    named = ", ".join(f"{number} ({kinds[number]})" if kinds else str(number) for number in causal)
    return (
        f"encoder.attention: 'bidirectional' does not fit {config.model_type}: of its {count} layers, {named} do not let the "
        f"last of {length} tokens change the first; allowed: 'causal', with pooling last_token, or another base"
    )


# Weights as plain numpy arrays, and an encoder's backbone over such arrays without a copy.
#
# The arrays of one process, put into Ray's object store, are mapped read-only by every process of the node, so the
# second actor costs no memory for weights. Arrays and not tensors, because Ray maps only what pickles out of band.


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Parameters and buffers of a backbone by name; tied ones are one array under two names."""

    arrays: dict[str, np.ndarray[Any, Any]]
    bfloat16: frozenset[str]  # names whose arrays are the bits of bfloat16 in uint16, which numpy lacks
    dtype: (
        torch.dtype | None
    )  # what the linear layers compute in; None: as the files hold them, each reader decides
    inference_linear: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, tied ones counted once."""
        return sum({id(array): array.nbytes for array in self.arrays.values()}.values())


def stored_weights(folder: Path, attention: str) -> SharedWeights:
    """The weights of a folder in the type that its files hold them in, for readers that put them onto devices of their own.

    Raises:
        DataError: see ``load_backbone``.
    """
    return export_weights(load_backbone(folder, attention, file_dtype(folder)).eval(), None)


def file_dtype(folder: Path) -> torch.dtype:
    """The type of a folder's weights, so that nothing is rounded; float32 where files differ or are no safetensors."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(
        found.pop() if len(found) == 1 else "", torch.float32
    )


def placed(backbone: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Parameters in ``dtype`` on ``device``, buffers (rotary frequencies) in their own type, as loading a folder gives them.

    Layer by layer, so that a host copy that is mapped is never doubled.
    """
    made: dict[int, Tensor] = {}  # by the address of the host copy: tied ones stay one
    for module in backbone.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                key = parameter.data_ptr()
                if key not in made:
                    made[key] = parameter.data.to(device=device, dtype=dtype)
                module._parameters[name] = nn.Parameter(made[key], requires_grad=False)
    return backbone.to(device)


def export_weights(backbone: nn.Module, dtype: torch.dtype | None) -> SharedWeights:
    """Views of a CPU model's weights; nothing is copied, strides are kept.

    Args:
        backbone: the model, laid out as the readers shall compute with it.
        dtype: what its linear layers compute in; None: each reader decides.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    bfloat16 = set()
    seen: dict[tuple[int, Any], np.ndarray[Any, Any]] = {}
    for name, tensor in _named_tensors(backbone):
        if tensor.dtype == torch.bfloat16:
            bfloat16.add(name)
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            plain = tensor.detach()
            seen[key] = (plain.view(torch.uint16) if name in bfloat16 else plain).numpy()
        arrays[name] = seen[key]
    fast = any(isinstance(module, InferenceLinear) for module in backbone.modules())
    return SharedWeights(arrays, frozenset(bfloat16), dtype, fast)


def shared_backbone(folder: Path, attention: str, weights: SharedWeights) -> PreTrainedModel:
    """The model of a folder over given arrays: no weight is read, allocated or copied; inference only.

    Raises:
        DataError: the arrays are not those of this folder's model, or it does not attend as ``attention`` says.
    """
    own = runs_own_code(folder, config := read_config(folder))
    config = config if own else backbone_config(folder, attention)
    kernel = {} if own else {"attn_implementation": attention_kernel(config)}
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=own, **kernel)
    expected = dict(_named_tensors(model))
    if expected.keys() != weights.arrays.keys():
        odd = sorted(expected.keys() ^ weights.arrays.keys())
        raise DataError(f"{folder}: shared weights of another model; on one side only: {', '.join(odd[:3])}")
    made: dict[int, Tensor] = {}
    for name, before in expected.items():
        array = weights.arrays[name]
        if before.shape != array.shape:
            raise DataError(
                f"{folder}: shared {name} has shape {array.shape}, the model {tuple(before.shape)}"
            )
        if id(array) not in made:
            made[id(array)] = _tensor(array, name in weights.bfloat16)
        _assign(model, name, made[id(array)])
    if weights.inference_linear:
        use_inference_linear(model)
    model.eval()
    if not own:
        check_attention(model, attention)
    return model


def check_kernels(weights: SharedWeights) -> None:
    """Raise DataError where this CPU cannot compute with weights that were laid out on another machine, perhaps: the kernel
    itself would fail with less to say."""
    if weights.inference_linear and weights.dtype is not None and not has_fast_linear(weights.dtype):
        raise DataError(f"shared {weights.dtype} weights: this CPU has no kernels for them; set dtype")


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, also those no checkpoint holds (rotary frequencies), and tied ones twice."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _tensor(array: np.ndarray[Any, Any], bfloat16: bool) -> Tensor:
    tensor = as_tensor(array)
    return tensor.view(torch.bfloat16) if bfloat16 else tensor


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
