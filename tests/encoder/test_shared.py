import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from embedloom.encoder.backbone import SharedWeights, export_weights, has_fast_linear, shared_backbone
from embedloom.encoder.model import Encoder
from embedloom.errors import DataError

TEXTS = ["a", "a much longer text than the first", "b c", "", "the last one, of middling length"]


def mapped(weights: SharedWeights) -> SharedWeights:
    """As another process gets them: pickled with the buffers aside, which come back read-only."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(weights, protocol=5, buffer_callback=buffers.append)
    assert sum(buffer.raw().nbytes for buffer in buffers) == weights.nbytes  # nothing travels in band
    return pickle.loads(content, buffers=[bytes(buffer.raw()) for buffer in buffers])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_are_bit_identical_to_those_of_a_loaded_encoder(tiny_model: Path, dtype):
    loaded = Encoder.load(tiny_model, dtype=dtype, device="cpu")
    shared = Encoder.load(tiny_model, weights=mapped(loaded.share_weights()))
    assert shared.dtype == loaded.dtype
    assert shared.packed == loaded.packed
    np.testing.assert_array_equal(shared.embed(TEXTS, "document"), loaded.embed(TEXTS, "document"))


def test_the_encoder_computes_on_the_arrays_themselves(tiny_model: Path):
    weights = mapped(Encoder.load(tiny_model, dtype="float32", device="cpu").share_weights())
    shared = Encoder.load(tiny_model, weights=weights)
    tensors = [*shared.backbone.named_parameters(), *shared.backbone.named_buffers()]
    assert tensors
    for name, tensor in tensors:
        assert tensor.data_ptr() == weights.arrays[name].ctypes.data
        assert not weights.arrays[name].flags.writeable


def test_bfloat16_weights_take_half_the_memory(tiny_model: Path):
    full, half = (
        Encoder.load(tiny_model, dtype=dtype, device="cpu").share_weights()
        for dtype in ("float32", "bfloat16")
    )
    linear = {name for name in half.arrays if name in half.bfloat16}
    if not has_fast_linear(torch.bfloat16):  # there, autocast casts plain float32 weights
        assert not linear and not half.inference_linear
        return
    assert any("q_proj" in name for name in linear)
    assert sum(half.arrays[name].nbytes for name in linear) * 2 == sum(
        full.arrays[name].nbytes for name in linear
    )


def test_position_ids_and_rotary_frequencies_travel_along(tmp_path: Path):
    sizes = dict(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    for model, buffer in (
        (BertModel(BertConfig(**sizes)), "embeddings.position_ids"),
        (LlamaModel(LlamaConfig(**sizes)), "rotary_emb.inv_freq"),
    ):
        folder = tmp_path / model.config.model_type
        model.eval().save_pretrained(folder)
        attention = "bidirectional" if model.config.model_type == "bert" else "causal"
        copy = shared_backbone(folder, attention, export_weights(model, torch.float32))
        torch.testing.assert_close(copy.get_buffer(buffer), model.get_buffer(buffer), atol=0, rtol=0)
        assert not any(tensor.is_meta for tensor in [*copy.parameters(), *copy.buffers()])


def test_tied_weights_are_one_array_and_one_tensor():
    module = torch.nn.ModuleDict({"one": torch.nn.Linear(3, 3), "two": torch.nn.Linear(3, 3)})
    module["two"].weight = module["one"].weight
    weights = export_weights(module, torch.float32)
    assert weights.arrays["one.weight"] is weights.arrays["two.weight"]
    assert weights.nbytes == 4 * (9 + 3 + 3)


def test_weights_of_another_model_are_refused(tiny_model: Path):
    weights = Encoder.load(tiny_model, dtype="float32", device="cpu").share_weights()
    missing = dict(weights.arrays)
    missing.pop("norm.weight")
    broken = SharedWeights(missing, frozenset(), torch.float32, True)
    with pytest.raises(DataError, match=r"another model; on one side only: norm\.weight"):
        Encoder.load(tiny_model, weights=broken)
    reshaped = SharedWeights(
        weights.arrays | {"norm.weight": np.ones(3, np.float32)}, frozenset(), torch.float32, True
    )
    with pytest.raises(DataError, match=r"norm\.weight has shape \(3,\), the model \(32,\)"):
        Encoder.load(tiny_model, weights=reshaped)


def test_attention_other_than_the_contracts_is_found(tiny_model: Path):
    loaded = Encoder.load(tiny_model, dtype="float32", device="cpu")
    weights = loaded.share_weights()
    # Zero value projections let no token see another, which is what a causal mask looks like from the first.
    silent = {
        name: np.zeros_like(array) if "v_proj" in name else array for name, array in weights.arrays.items()
    }
    with pytest.raises(DataError, match="attends causally"):
        Encoder.load(tiny_model, weights=SharedWeights(silent, frozenset(), torch.float32, True))
