"""Layers that CPUs compute faster without gradient: 8-bit linear layers, and BERT's layers fused."""

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from embedloom.encoder.attention import PackedLayout, attend_packed, kernel_for, parallel_address
from embedloom.encoder.backbone import first_position
from embedloom.errors import ConfigError

# Linear layers in 8 bits, for endpoints on CPU: weights a quarter of float32's bytes, products on VNNI.
#
# Each output of a layer has a scale of its own, set when the model is loaded; so has each token, set when it comes (dynamic
# quantization, as ONNX Runtime's ``avx512_vnni`` and torchao have it), so no calibration data is needed. Everything between
# the products stays float32. What that costs in quality differs from model to model; ``evaluation/int8_check.py`` measures it.
# The loop is ``_int8.c``: torch's own 8-bit product takes one scale for all tokens, and is not to be had for every shape.


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


# BERT's layers in as few calls as there are products, for packed rows on CPU without gradient.
#
# A short query spends 1.2 ms of its 4.5 (MiniLM, one thread) between transformers' modules, every call of which holds
# Python's lock while the event loop of an endpoint waits for it. Here a layer is nine calls on the same weights; GELU
# and the residual sums are done by the products themselves. Decoders keep transformers' own way: their layers are wider, so
# the calls between are a small part.


_FAMILIES = {"bert", "roberta", "xlm-roberta", "camembert"}  # whose modules have BERT's names
_TOLERANCE = 1e-3  # of hidden states in float32, relative to the largest; as attention.py asks
_COARSE_TOLERANCE = 0.1  # in bfloat16 and int8
_multiply = torch.ops.mkldnn._linear_pointwise.default
_multiply_add = torch.ops.mkldnn._linear_pointwise.binary


Linear: TypeAlias = nn.Linear | Int8Linear


@dataclass(frozen=True, slots=True)
class _Layer:
    """The modules of one layer; weights are read from them at every call, so they may be replaced."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    out_norm: nn.LayerNorm
    up: Linear
    down: Linear
    down_norm: nn.LayerNorm


class FusedBert:
    """The same hidden states as the backbone's own forward, to rounding."""

    def __init__(self, backbone: Any, kernel: ModuleType) -> None:
        self._kernel = kernel
        self._embeddings = backbone.embeddings
        self._heads = int(backbone.config.num_attention_heads)
        self._layers = [
            _Layer(
                layer.attention.self.query,
                layer.attention.self.key,
                layer.attention.self.value,
                layer.attention.output.dense,
                layer.attention.output.LayerNorm,
                layer.intermediate.dense,
                layer.output.dense,
                layer.output.LayerNorm,
            )
            for layer in backbone.encoder.layer
        ]

    def __call__(
        self, input_ids: Tensor, layout: PackedLayout, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states of a packed row: int64 [1, tokens] in, float32 [tokens, d] out; without types all are of the first."""
        embeddings = self._embeddings
        states = embeddings.word_embeddings.weight[input_ids[0]]
        states += embeddings.position_embeddings.weight[layout.positions[0]]
        types = embeddings.token_type_embeddings.weight
        states += types[0] if token_type_ids is None else types[token_type_ids[0]]
        states = _norm(states, embeddings.LayerNorm)
        for layer in self._layers:
            states = self._run(layer, states, layout)
        return states

    def _run(self, layer: _Layer, states: Tensor, layout: PackedLayout) -> Tensor:
        dtype = _dtype(layer.query)
        entering = states.to(dtype)
        query, key, value = (
            _product(linear, entering).view(1, len(states), self._heads, -1).transpose(1, 2)
            for linear in (layer.query, layer.key, layer.value)
        )
        attended = attend_packed(self._kernel, query, key, value, layout.lengths_array, False, None)
        attended = attended.view(len(states), -1)
        states = _norm(_product_add(layer.out, attended, states), layer.out_norm)
        inner = _product(layer.up, states.to(dtype), "gelu")
        return _norm(_product_add(layer.down, inner, states), layer.down_norm)


def fuse(backbone: Any) -> FusedBert | None:
    """The fused way through a packed backbone, or None where there is none or it gives other hidden states."""
    config = backbone.config
    plain = (
        config.model_type in _FAMILIES
        and not config.is_decoder  # causal
        and config.hidden_act == "gelu"
        and getattr(config, "position_embedding_type", None) in (None, "absolute")
        and all(type(module) is not nn.Linear for module in backbone.encoder.modules())
    )
    parameters = list(backbone.parameters())
    if not plain or any(parameter.requires_grad or parameter.is_cuda for parameter in parameters):
        return None
    kernel = _kernel_of(backbone)
    fused = FusedBert(backbone, kernel) if kernel is not None else None
    return fused if fused is not None and _agrees(backbone, fused) else None


@torch.no_grad()
def _kernel_of(backbone: Any) -> ModuleType | None:
    """The compiled attention, if it computes heads like this model's."""
    heads, query = backbone.config.num_attention_heads, backbone.encoder.layer[0].attention.self.query
    side = torch.empty(1, heads, 1, query.out_features // heads, dtype=_dtype(query))
    return kernel_for(side, side, side)


@torch.inference_mode()
def _agrees(backbone: Any, fused: FusedBert) -> bool:
    layout = PackedLayout([9, 4, 1], False, torch.device("cpu"), first_position(backbone))
    row = torch.arange(5, 19).unsqueeze(0) % backbone.config.vocab_size
    query = backbone.encoder.layer[0].attention.self.query
    exact = _dtype(query) == torch.float32 and not isinstance(query, Int8Linear)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_dtype(query) == torch.bfloat16):
        own = (
            backbone(input_ids=row, position_ids=layout.positions, packed=layout).last_hidden_state[0].float()
        )
        difference = (own - fused(row, layout)).abs().max() / own.abs().max()
    return bool(difference < (_TOLERANCE if exact else _COARSE_TOLERANCE))


def _norm(states: Tensor, norm: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _dtype(linear: Linear) -> torch.dtype:
    """What a layer gives."""
    return torch.float32 if isinstance(linear, Int8Linear) else linear.weight.dtype


def _product(linear: Linear, states: Tensor, activation: str = "none") -> Tensor:
    if isinstance(linear, Int8Linear):
        return linear.product(states, gelu=activation == "gelu")
    found: Tensor = _multiply(
        states, linear.weight, linear.bias, activation, [], "none" if activation == "gelu" else ""
    )
    return found


def _product_add(linear: Linear, states: Tensor, residual: Tensor) -> Tensor:
    """The product plus the residual, float32: a bfloat16 sum would round the stream in every layer."""
    if isinstance(linear, Int8Linear):
        return linear.product(states, residual=residual)
    if linear.weight.dtype != torch.float32:
        return _product(linear, states).float() + residual
    found: Tensor = _multiply_add(states, residual, linear.weight, linear.bias, "add")
    return found
