"""BERT's layers in as few calls as there are products, for packed rows on CPU without gradient.

A short query spends 1.2 ms of its 4.5 (MiniLM, one thread) between transformers' modules, every call of which holds
Python's lock while the event loop of an endpoint waits for it. Here a layer is nine calls on the same weights; GELU
and the residual sums are done by the products themselves. Decoders keep transformers' own way: their layers are wider, so
the calls between are a small part.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from embedloom.encoder.int8 import Int8Linear
from embedloom.encoder.packed_kernel import attend_packed, kernel_for
from embedloom.encoder.packing import PackedLayout

_TOLERANCE = 1e-3  # of hidden states in float32, relative to the largest; as packing.py asks
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

    def __call__(self, row: Tensor, layout: PackedLayout) -> Tensor:
        """Hidden states of a packed row: int64 [1, tokens] in, float32 [tokens, d] out."""
        embeddings = self._embeddings
        states = embeddings.word_embeddings.weight[row[0]]
        states += embeddings.position_embeddings.weight[layout.positions[0]]
        states += embeddings.token_type_embeddings.weight[0]
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
        config.model_type == "bert"
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
    layout = PackedLayout([9, 4, 1], False, torch.device("cpu"))
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
