"""The compiled attention beside torch's own, text by text."""

import importlib.util
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedloom.encoder import attention
from embedloom.encoder.attention import PackedLayout, attend_packed, kernel_for, load_kernel, packed_attention

needs_kernel = pytest.mark.skipif(load_kernel() is None, reason="not compiled, or no AVX2")
# One, and below, at and above every width of vector.
LENGTHS = [40, 33, 17, 16, 15, 13, 9, 8, 7, 5, 4, 3, 1, 1]


def sides(heads: int, kv_heads: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(d)
    tokens = sum(LENGTHS)
    made = [torch.randn(1, tokens, n, d, generator=generator) for n in (heads, kv_heads, kv_heads)]
    return [side.to(dtype).transpose(1, 2) for side in made]


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, scaling: float | None = None
) -> Tensor:
    kernel = kernel_for(query, key, value)
    assert kernel is not None
    return attend_packed(kernel, query, key, value, np.array(LENGTHS), causal, scaling)


def text_by_text(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float | None = None
) -> Tensor:
    parts = []
    for own in zip(*(side.double().split(LENGTHS, dim=2) for side in (query, key, value)), strict=True):
        out = torch.nn.functional.scaled_dot_product_attention(
            *own, is_causal=causal, scale=scaling, enable_gqa=True
        )
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, dim=1)


@pytest.fixture(params=[16, 8, 4])
def lanes(request):
    kernel = load_kernel()
    assert kernel is not None
    if kernel.lanes(request.param) != request.param:
        kernel.lanes(16)
        pytest.skip("this CPU has no vectors so wide")
    yield request.param
    kernel.lanes(16)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"), [(12, 12, 32), (9, 3, 64), (2, 1, 128), (1, 1, 16), (1, 1, 256)]
)
def test_float32_is_torchs_attention_of_each_text_alone(lanes, heads, kv_heads, d, causal):
    query, key, value = sides(heads, kv_heads, d)
    got = attend(query, key, value, causal)
    expected = text_by_text(query, key, value, causal)
    torch.testing.assert_close(got.double(), expected, atol=3e-6, rtol=0)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_bfloat16_is_rounded_once(lanes, causal):
    query, key, value = sides(9, 3, 64, torch.bfloat16)
    got = attend(query, key, value, causal)
    expected = text_by_text(query, key, value, causal)
    assert got.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 bits, and float32's own error beside a rounding boundary.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=3e-6)


@needs_kernel
@torch.no_grad()
def test_strides_scaling_and_large_scores():
    query, key, value = (side.contiguous() for side in sides(4, 4, 32))
    wide = torch.stack([query, query * 0, value], dim=2)[:, :, 0]  # heads far apart
    got = attend(wide, key, value, scaling=20.0)
    expected = text_by_text(query, key, value, False, scaling=20.0)
    # Scores reach hundreds, where a weight's relative error is that of a float32 score.
    torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=0)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(threads):
    given = sides(9, 3, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attend(*given)
        torch.set_num_threads(threads)
        assert torch.equal(attend(*given), alone)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_stays_in_its_text_and_is_not_hidden(bad):
    query, key, value = sides(2, 2, 32)
    first, last = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    key[0, 1, first + 3, 5] = bad
    got = attend(query, key, value)
    spoilt = ~got.isfinite().all(dim=3)[0]
    assert spoilt[first:last, 1].any()
    assert not spoilt[:, 0].any()
    assert not spoilt[:first].any()
    assert not spoilt[last:].any()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_it_is_built_where_there_is_a_compiler():
    # Else every test here would be skipped, and nobody would know.
    assert importlib.util.find_spec("embedloom.encoder._attention") is not None


def test_what_the_loop_does_not_compute_is_left_to_torch():
    fine = sides(2, 2, 32)
    assert kernel_for(*fine) is None  # gradients are enabled
    with torch.no_grad():
        assert kernel_for(*fine) is load_kernel()
        assert kernel_for(*(side.half() for side in fine)) is None
        assert kernel_for(fine[0], fine[1], fine[2].bfloat16()) is None
        assert kernel_for(*sides(2, 2, 24)) is None
        assert (
            kernel_for(*(side.transpose(2, 3)[:, :, :, :32].transpose(2, 3) for side in fine))
            is load_kernel()
        )
        assert kernel_for(*(side[..., ::2] for side in fine)) is None
        assert kernel_for(*(side.to("meta") for side in fine)) is None


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("lengths", [[0, 4], [-1, 5], [300], [100, 100], [100], []])
def test_lengths_that_are_not_those_of_the_row_are_refused(lengths):
    query, key, value = sides(2, 2, 32)
    with pytest.raises(ValueError, match="add up to the tokens"):
        attend_packed(load_kernel(), query, key, value, np.array(lengths), False, None)


@needs_kernel
@torch.no_grad()
def test_lengths_of_another_type_are_refused():
    query, key, value = sides(2, 2, 32)
    with pytest.raises(ValueError, match="must be int64"):
        attend_packed(load_kernel(), query, key, value, np.array(LENGTHS, np.int32), False, None)


@torch.no_grad()
def test_without_the_loop_attention_is_the_same(monkeypatch):
    given = sides(4, 2, 32)
    layout = PackedLayout(LENGTHS, False, torch.device("cpu"))
    with_loop, _ = packed_attention(None, *given, None, layout)
    monkeypatch.setattr(attention, "load_kernel", lambda: None)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    without, _ = packed_attention(module, *given, None, layout)
    torch.testing.assert_close(with_loop, without, atol=3e-6, rtol=0)


@needs_kernel
def test_an_encoder_uses_it(tmp_path: Path, monkeypatch):
    from transformers import BertConfig, BertModel

    from embedloom.encoder.attention import use_packing

    calls = []
    monkeypatch.setattr(
        "embedloom.encoder.attention.attend_packed",
        lambda *args: calls.append(args) or attend_packed(*args),
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=64, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    assert use_packing(BertModel(config).eval(), causal=False)
    assert len(calls) == 3
