"""What kind of model a folder's ``config.json`` describes; code beside the weights is run out of trusted folders alone."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding, LlamaConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING,
)

from embedloom.encoder.own_code import SWITCH, is_trusted, read_as_llama
from embedloom.errors import DataError, first_line

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
