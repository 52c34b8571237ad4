"""8-bit linear layers against integer arithmetic in NumPy, and an encoder made of them against the float32 one."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from embedloom.encoder import cpu_layers
from embedloom.encoder.cpu_layers import Int8Linear, load_int8_kernel, quantize_linears
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError
from fakes import make_tiny_encoder, make_tiny_llama

needs_kernel = pytest.mark.skipif(
    load_int8_kernel() is None, reason="needs AVX-512 VNNI and the compiled loop"
)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_the_loop_is_built_where_a_compiler_is():
    # Else every test here would be skipped, and nobody would know.
    assert importlib.util.find_spec("embedloom.encoder._int8") is not None


def by_hand(linear: nn.Linear, states: torch.Tensor) -> np.ndarray:
    """The same quantization with NumPy's whole numbers."""
    weight, rows = linear.weight.detach().numpy(), states.numpy().reshape(-1, linear.in_features)
    outputs = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    tokens = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(weight / np.maximum(outputs, 1e-30)).astype(np.int64)
    factors = np.where(tokens > 0, np.float32(127) / np.maximum(127 * tokens, 1e-30), 0).astype(np.float32)
    sums = np.rint(rows * factors).astype(np.int64) @ codes.T
    found = sums * tokens.astype(np.float64) * outputs.T
    if linear.bias is not None:
        found = found + linear.bias.detach().numpy()
    return found.reshape(*states.shape[:-1], linear.out_features)


@needs_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 16), (6, 16), (2, 7, 48), (13, 384), (40, 80)])
@pytest.mark.parametrize("outputs", [16, 64, 80, 192])
def test_product_is_the_whole_numbers_product(shape, outputs, bias):
    torch.manual_seed(outputs)
    linear, states = nn.Linear(shape[-1], outputs, bias=bias), 3 * torch.randn(shape)
    layer = Int8Linear(linear, load_int8_kernel())
    found = layer(states)
    assert found.dtype == torch.float32
    expected = by_hand(linear, states)
    # A code that lies between two whole numbers may round the other way: a step of one output's and one token's scale.
    assert np.abs(found.numpy() - expected).max() < 1e-3 * np.abs(expected).max() + 1e-6
    exact = linear(states).detach()
    assert (found - exact).norm() < 0.02 * exact.norm()


@needs_kernel
def test_what_follows_the_product_is_gelu_then_the_residual():
    torch.manual_seed(0)
    layer, states, residual = (
        Int8Linear(nn.Linear(64, 96), load_int8_kernel()),
        5 * torch.randn(29, 64),
        torch.randn(29, 96),
    )
    plain = layer(states)
    expected = nn.functional.gelu(plain.double()) + residual
    torch.testing.assert_close(layer.product(states, True, residual).double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(layer.product(states, residual=residual), plain + residual)


@needs_kernel
def test_several_threads_give_what_one_gives():
    torch.manual_seed(0)
    layer, states = Int8Linear(nn.Linear(384, 1536), load_int8_kernel()), torch.randn(333, 384)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = layer(states)
        torch.set_num_threads(3)
        assert torch.equal(layer(states), one)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_zeros_stay_zeros_and_what_is_no_number_stays_none():
    linear = nn.Linear(32, 16)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = Int8Linear(linear, load_int8_kernel())
    states = torch.ones(4, 32)
    states[0], states[1, 5], states[2, 30] = 0, float("nan"), float("inf")
    found = layer(states)
    assert torch.equal(found[0], linear.bias.detach())
    assert found[1].isnan().all() and found[2].isnan().all()
    assert found[3].isfinite().all() and found[3, 3] == linear.bias[3]
    assert layer(torch.empty(0, 32)).shape == (0, 16)


@needs_kernel
def test_an_encoder_gives_near_vectors_whatever_shares_its_batch(tmp_path):
    folder = make_tiny_encoder(make_tiny_llama(tmp_path / "llama"), tmp_path / "encoder")
    plain, small = (Encoder.load(folder, dtype=dtype) for dtype in ("float32", "int8"))
    ids = [[5, 6, 7, 8, 9, 10], [3], [9, 8, 7, 6], [11] * 17]
    found = small.embed_tokens(ids)
    assert (found * plain.embed_tokens(ids)).sum(axis=1).min() > 0.98
    assert any(isinstance(module, Int8Linear) for module in small.backbone.modules())
    for row, text in enumerate(ids):
        assert (found[row] * small.embed_tokens([text])[0]).sum() > 0.999


@needs_kernel
def test_layers_of_other_sizes_stay_as_they_are():
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 7))
    quantize_linears(model)
    assert [type(layer) for layer in model] == [Int8Linear, nn.Linear]
    with pytest.raises(ConfigError, match="multiples of 16"):
        quantize_linears(nn.Sequential(nn.Linear(12, 7)))


def test_a_cpu_without_vnni_is_told_what_else_there_is(monkeypatch):
    monkeypatch.setattr(cpu_layers, "load_int8_kernel", lambda: None)
    with pytest.raises(ConfigError, match=r"'int8' needs a CPU with AVX-512 VNNI.*'float32'"):
        quantize_linears(nn.Sequential(nn.Linear(16, 16)))


def test_int8_is_not_for_training(tmp_path):
    with pytest.raises(ConfigError, match="inference on CPU"):
        Encoder.load(tmp_path, dtype="int8", device="cpu", trainable=True)
