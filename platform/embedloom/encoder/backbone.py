"""The transformer below the pooling: a decoder made bidirectional, or an encoder as it is."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from embedloom.encoder.linear import autocast_of
from embedloom.errors import ConfigError, DataError

# Hidden states of two runs of the same causal prefix differ by float noise only; a mask that lets later tokens
# through moves them by whole units (21 on SmolLM2).
_LEAK_TOLERANCE = 1e-3


def is_decoder(config: Any) -> bool:
    """Whether the architecture was trained with a causal mask (Llama, Mistral, Qwen, ...)."""
    names = " ".join(config.architectures or []) + type(config).__name__
    return "CausalLM" in names or config.model_type in {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
    }


def load_backbone(
    folder: Path, attention: str, dtype: torch.dtype, num_layers: int | None = None
) -> PreTrainedModel:
    """Load weights without a head and set the attention mask.

    Raises:
        DataError: not a model folder, or one without weights.
        ConfigError: more layers asked for than there are, or an encoder asked to be causal.
    """
    config = backbone_config(folder, attention, num_layers)
    if not (any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))):
        raise DataError(f"{folder}: no weights (*.safetensors) in this model folder")
    model = AutoModel.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa")
    check_attention(model, attention)
    return model


def backbone_config(folder: Path, attention: str, num_layers: int | None = None) -> Any:
    """The folder's config with the attention mask set.

    ``config.is_causal`` is the one switch that holds with and without padding, in sdpa and eager, and in every
    reader of the saved config; setting it on the attention modules alone turns causal again under padding.

    Raises:
        DataError: not a model folder.
        ConfigError: more layers asked for than there are, or an encoder asked to be causal.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json, so this is not a model folder")
    config = AutoConfig.from_pretrained(folder)
    if num_layers is not None:
        if num_layers > config.num_hidden_layers:
            raise ConfigError(
                f"encoder.num_layers: {num_layers} asked for, {folder.name} has {config.num_hidden_layers}"
            )
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    if is_decoder(config):
        config.is_causal = attention == "causal"
        config.use_cache = False
    elif attention == "causal":
        raise ConfigError(
            f"encoder.attention: 'causal' does not fit {config.model_type}, which is an encoder; allowed: 'bidirectional'"
        )
    return config


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
                f"hidden state (config.is_causal={getattr(model.config, 'is_causal', None)}); transformers >= 5 is needed"
            )
        if attention == "causal" and leak > _LEAK_TOLERANCE:
            raise DataError(
                f"{model.config.model_type} attends bidirectionally {case} (leak {leak:.3g}), its contract says causal"
            )
    model.train(training)
