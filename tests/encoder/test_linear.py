from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from embedloom.encoder.backbone import InferenceLinear, cast_for_inference, has_fast_linear
from embedloom.encoder.model import Encoder

TEXTS = ["a", "a much longer text than the first", "b c", "", "the last one, of middling length"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 12), (3, 5, 12)])
def test_product_is_that_of_the_plain_layer(dtype, tolerance, bias, shape):
    if not has_fast_linear(dtype):
        assert dtype == torch.bfloat16, "every CPU build of torch has oneDNN for float32"
        pytest.skip("this CPU has no oneDNN kernels for bfloat16")
    torch.manual_seed(0)
    layer, states = nn.Linear(12, 7, bias=bias), torch.randn(shape)
    with torch.no_grad():
        expected = layer(states)
        model = nn.Sequential(layer)
        cast_for_inference(model, dtype)
        assert isinstance(model[0], InferenceLinear)
        product = model(states)
    assert product.dtype == dtype
    torch.testing.assert_close(product.float(), expected, atol=tolerance, rtol=tolerance)


def test_weights_keep_names_shapes_and_values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast_for_inference(model, torch.float32)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_norms_stay_float32_beside_bfloat16_products():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    cast_for_inference(model, torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        "0.weight": torch.bfloat16,
        "0.bias": torch.bfloat16,
        "1.weight": torch.float32,
        "1.bias": torch.float32,
    }


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
def test_inference_gives_the_vectors_of_the_plain_model(tiny_model: Path, dtype, least):
    plain = Encoder.load(tiny_model, dtype="float32", device="cpu", trainable=True)
    assert not any(isinstance(module, InferenceLinear) for module in plain.backbone.modules())
    fast = Encoder.load(tiny_model, dtype=dtype, device="cpu")
    cosines = (plain.embed(TEXTS, "document") * fast.embed(TEXTS, "document")).sum(axis=1)
    assert cosines.min() > least


def test_a_trainable_encoder_gives_every_linear_weight_a_gradient(tiny_model: Path):
    encoder = Encoder.load(tiny_model, dtype="float32", device="cpu", trainable=True)
    encoder.forward(encoder.tokenize(TEXTS, "document"))[0, 0].backward()
    weights = [module.weight for module in encoder.backbone.modules() if isinstance(module, nn.Linear)]
    assert weights
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


def test_asking_an_inference_encoder_for_gradients_is_an_error(tiny_model: Path):
    encoder = Encoder.load(tiny_model, dtype="float32", device="cpu")
    with pytest.raises(RuntimeError, match="does not require grad"):
        encoder.forward(encoder.tokenize(TEXTS, "document"))[0, 0].backward()


def test_weights_can_still_be_saved(tiny_model: Path, tmp_path: Path):
    Encoder.load(tiny_model, dtype="float32", device="cpu").backbone.save_pretrained(tmp_path)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny_model))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
