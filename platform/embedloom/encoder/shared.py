"""Weights as plain numpy arrays, and an encoder's backbone over such arrays without a copy.

The arrays of one process, put into Ray's object store, are mapped read-only by every process of the node, so the
second actor costs no memory for weights. Arrays and not tensors, because Ray maps only what pickles out of band.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedloom.encoder.architecture import attention_kernel, auto_class, read_config, runs_own_code
from embedloom.encoder.backbone import backbone_config, check_attention
from embedloom.encoder.device import as_tensor
from embedloom.encoder.linear import InferenceLinear, use_inference_linear
from embedloom.errors import DataError


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Parameters and buffers of a backbone by name; tied ones are one array under two names."""

    arrays: dict[str, np.ndarray[Any, Any]]
    bfloat16: frozenset[str]  # names whose arrays are the bits of bfloat16 in uint16, which numpy lacks
    dtype: torch.dtype  # what the linear layers compute in
    inference_linear: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, tied ones counted once."""
        return sum({id(array): array.nbytes for array in self.arrays.values()}.values())


def export_weights(backbone: nn.Module, dtype: torch.dtype) -> SharedWeights:
    """Views of a CPU model's weights; nothing is copied, strides are kept.

    Args:
        backbone: the model, laid out as the readers shall compute with it.
        dtype: what its linear layers compute in.
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
