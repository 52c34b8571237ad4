"""The fused way through BERT against transformers' own, text by text."""

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from embedloom.encoder.attention import PackedLayout, load_kernel, use_packing
from embedloom.encoder.backbone import cast_for_inference, has_fast_linear
from embedloom.encoder.cpu_layers import fuse

TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8, 9], [9, 8, 7], [2, 3, 4], [6]]
pytestmark = pytest.mark.skipif(load_kernel() is None, reason="needs the compiled attention")


def bert(act: str = "gelu", causal: bool = False) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, attn_implementation="sdpa", hidden_act=act, is_decoder=causal,
    )  # fmt: skip
    model = BertModel(config).eval()
    with torch.no_grad():  # norms and biases as trained ones: zeros and ones would hide one that is left out
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def llama() -> LlamaModel:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    config.is_causal = False
    return LlamaModel(config).eval()


def prepared(
    model: torch.nn.Module, dtype: torch.dtype = torch.float32, causal: bool = False
) -> torch.nn.Module:
    cast_for_inference(model, dtype)
    assert use_packing(model, causal)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_states_are_those_of_each_text_alone_in_transformers(dtype, tolerance):
    if not has_fast_linear(dtype):
        assert dtype == torch.bfloat16, "every CPU build of torch has oneDNN for float32"
        pytest.skip("this CPU has no oneDNN kernels for bfloat16")
    with torch.no_grad():
        expected = [bert()(input_ids=torch.tensor([text])).last_hidden_state[0] for text in TEXTS]
        fused = fuse(prepared(bert(), dtype))
        assert fused is not None
        layout = PackedLayout([len(text) for text in TEXTS], False, torch.device("cpu"))
        row = torch.tensor([[token for text in TEXTS for token in text]])
        found = fused(row, layout)
    assert found.dtype == torch.float32
    for text, states in zip(expected, found.split([len(text) for text in TEXTS]), strict=True):
        torch.testing.assert_close(states, text, atol=tolerance, rtol=tolerance)


def test_models_it_does_not_know_keep_their_own_way():
    assert fuse(prepared(bert("relu"))) is None
    assert fuse(prepared(llama())) is None
    assert fuse(prepared(bert(causal=True), causal=True)) is None


def test_a_model_that_will_be_trained_keeps_its_own_way():
    model = bert()
    assert use_packing(model, False)
    assert fuse(model) is None


def test_a_model_that_computes_something_else_keeps_its_own_way():
    model = prepared(bert())
    layer = model.encoder.layer[1].output
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert fuse(model) is None
