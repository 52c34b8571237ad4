"""The transformer below the pooling: a decoder made bidirectional, or an encoder as it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from embedloom.encoder.architecture import (
    attention_kernel,
    auto_class,
    is_decoder,
    read_config,
    runs_own_code,
    text_config,
)
from embedloom.encoder.linear import autocast_of
from embedloom.errors import ConfigError, DataError, one_line
from embedloom.progress import note

__all__ = [
    "backbone_config",
    "check_attention",
    "check_layers",
    "is_decoder",
    "load_backbone",
    "widen_windows",
]

# Hidden states of two runs of the same causal prefix differ by float noise only; a mask that lets later tokens
# through moves them by whole units (21 on SmolLM2).
_LEAK_TOLERANCE = 1e-3
# Where an architecture has a switch of its own for seeing later tokens, it is set instead of ``is_causal``: other
# readers (vLLM, TEI) follow that one.
_OWN_SWITCH: dict[str, Any] = {"gemma3_text": True}
# Keys of how far a layer sees, where that is less than the text.
_WINDOW_KEYS = ("sliding_window", "attention_chunk_size")
_LONGEST_PROBE = 1024  # tokens; beyond, the arithmetic of the windows is taken on trust


def load_backbone(
    folder: Path,
    attention: str,
    dtype: torch.dtype,
    num_layers: int | None = None,
    longest: int | None = None,
) -> PreTrainedModel:
    """Load weights without a head and set the attention mask; of a multimodal checkpoint, the text model alone.

    Args:
        folder: of the model.
        attention: ``bidirectional`` or ``causal``.
        dtype: of the weights.
        num_layers: keep the first so many; None: all.
        longest: tokens of the longest text, to which the windows of a bidirectional decoder are widened; None leaves
            them as they are.

    Raises:
        DataError: not a model folder, one without weights, or of an architecture that cannot be read.
        ConfigError: more layers asked for than there are, or an encoder asked to be causal.
    """
    whole = read_config(folder)
    if runs_own_code(folder, whole):
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
    for length in sorted({4, min(limit, _LONGEST_PROBE)}):
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
