"""Low-rank adapters (peft) inside a backbone, and the plain weights they amount to.

The adapters are injected into the backbone itself, without peft's wrapper, so pooling, packing and DeepSpeed see the
same module as ever. An export is merged: no reader needs peft.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from embedloom.config.training import LoraConfig
from embedloom.encoder.backbone import backbone_config
from embedloom.errors import ConfigError

_WRAPPED = ".base_layer"


def linear_names(backbone: nn.Module) -> set[str]:
    """Last parts of the names of all linear layers; GPT-2's are of a class of their own, with the weights transposed."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def check_targets(config: LoraConfig, folder: Path, attention: str) -> None:
    """Fail before any worker starts if an adapter would have nowhere to sit; no weight is read.

    Args:
        config: the adapters.
        folder: model folder.
        attention: of its contract.

    Raises:
        ConfigError: a target that is no linear layer of the model.
    """
    with torch.device("meta"):
        known = linear_names(AutoModel.from_config(backbone_config(folder, attention)))
    for name in config.target_modules or ():
        if name not in known:
            raise ConfigError(
                f"training.lora.target_modules: {name!r} is no linear layer of {folder.name}; allowed: {', '.join(sorted(known))}"
            )


def add_adapters(backbone: Any, config: LoraConfig) -> None:
    """Put adapters beside the target layers, freeze everything else; B starts at zero, so nothing changes yet."""
    targets = config.target_modules or tuple(sorted(linear_names(backbone)))
    settings = PeftLora(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in backbone.modules()),
    )  # fmt: skip
    backbone.requires_grad_(False)
    inject_adapter_in_model(settings, backbone)


def has_adapters(backbone: nn.Module) -> bool:
    """Whether adapters were added."""
    return any(isinstance(module, LoraLayer) for module in backbone.modules())


def merged_backbone(backbone: Any) -> Any:
    """A model of plain weights, base + alpha / rank x B A, that computes what the backbone does; the same without adapters.

    The backbone is left as it is and goes on training. Sums are made in float32 and rounded once, to the base's dtype.
    """
    if not has_adapters(backbone):
        return backbone
    deltas = {
        f"{name}.weight": module.get_delta_weight("default")
        for name, module in backbone.named_modules()
        if isinstance(module, LoraLayer)
    }
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in backbone.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(_WRAPPED, "")
        merged = tensor.detach()
        if plain in deltas:
            merged = (merged.float() + deltas[plain].detach().float()).to(tensor.dtype)
        weights[plain] = merged
    with torch.device("meta"):
        model = type(backbone)(backbone.config)
    model.load_state_dict(weights, assign=True)
    return model
