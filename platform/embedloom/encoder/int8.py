"""Linear layers in 8 bits, for endpoints on CPU: weights a quarter of float32's bytes, products on VNNI.

Each output of a layer has a scale of its own, set when the model is loaded; so has each token, set when it comes (dynamic
quantization, as ONNX Runtime's ``avx512_vnni`` and torchao have it), so no calibration data is needed. Everything between
the products stays float32. What that costs in quality differs from model to model; ``evaluation/int8_check.py`` measures it.
The loop is ``_int8.c``: torch's own 8-bit product takes one scale for all tokens, and is not to be had for every shape.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

from embedloom.encoder.packed_kernel import parallel_address
from embedloom.errors import ConfigError

_LEVELS = 127
_OUTPUTS = 64  # of a block of weights in the kernel
_STEP = 16  # what inputs and outputs are multiples of


@functools.cache
def load_int8_kernel() -> ModuleType | None:
    """The compiled loop, or None where it was not built or the CPU has no AVX-512 VNNI."""
    try:
        kernel = importlib.import_module("embedloom.encoder._int8")
    except ImportError:
        return None
    return kernel if kernel.supported() else None


class Int8Linear(nn.Module):
    """A linear layer whose weights are bytes; float32 in and out."""

    codes: Tensor  # int8 [blocks, in / 4, 64, 4]
    scales: Tensor  # float32 [out]
    offsets: Tensor  # int32 [out], 128 times the sum of an output's codes
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kernel: ModuleType) -> None:
        """Quantize a layer of float32 weights.

        Args:
            linear: inputs and outputs are multiples of 16.
            kernel: from ``load_int8_kernel``.
        """
        super().__init__()
        self._kernel = kernel
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1) / _LEVELS
        codes = torch.round(weight / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1))
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", (128 * codes.sum(dim=1)).to(torch.int32))
        self.register_buffer("codes", _packed(codes.to(torch.int8)))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] of any float type in, float32 [..., out_features] out."""
        return self.product(states)

    def product(self, states: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """The product and what follows it: GELU (exact), then the sum with a float32 residual of the result's shape."""
        rows = states.float().contiguous()
        if residual is not None:
            residual = residual.float().contiguous()
        found = torch.empty((*states.shape[:-1], self.out_features), dtype=torch.float32)
        if not rows.numel():
            return found
        self._kernel.linear(
            rows.numel() // self.in_features,
            self.in_features,
            self.out_features,
            rows.data_ptr(),
            self.codes.data_ptr(),
            self.scales.data_ptr(),
            self.offsets.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            found.data_ptr(),
            gelu,
            parallel_address(),
            torch.get_num_threads(),
        )
        return found


def quantize_linears(model: nn.Module) -> None:
    """Put an ``Int8Linear`` in the place of every linear layer of a frozen CPU model whose shape allows it.

    Raises:
        ConfigError: no kernel for this CPU, or no layer of a shape that it takes.
    """
    kernel = load_int8_kernel()
    if kernel is None:
        raise ConfigError(
            "compute_dtype: 'int8' needs a CPU with AVX-512 VNNI and the loop that gcc builds when embedloom is installed; "
            "allowed here: 'auto', 'float32', 'bfloat16'"
        )
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and not (child.in_features % _STEP or child.out_features % _STEP)
    ]
    if not found:
        raise ConfigError(
            f"compute_dtype: 'int8' needs linear layers whose sizes are multiples of {_STEP}; this model has none"
        )
    for parent, name, child in found:
        setattr(parent, name, Int8Linear(child, kernel))


def _packed(codes: Tensor) -> Tensor:
    """int8 [out, in] as the kernel reads it; outputs are filled up with zeros to whole blocks."""
    outputs, inputs = codes.shape
    filled = torch.zeros(-(-outputs // _OUTPUTS) * _OUTPUTS, inputs, dtype=torch.int8)
    filled[:outputs] = codes
    return filled.view(-1, _OUTPUTS, inputs // 4, 4).transpose(1, 2).contiguous()
