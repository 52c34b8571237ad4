"""An export that some reader would read differently is stopped, with the reason."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedloom.config.encoder import EncoderConfig
from embedloom.core.prompting import PromptContract
from embedloom.encoder.export import prepare_base
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import (
    GOLDEN_TEXTS,
    check_export,
    embed_golden,
    golden_texts,
    lowest_cosine,
    save_golden,
)
from embedloom.encoder.registry import resolve_model
from embedloom.encoder.tokenizer import InstructionTooLong
from embedloom.errors import StageError
from embedloom.training.checkpoints import save_final_model
from fakes_training import training_config


@pytest.fixture
def export(tiny_model, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(tiny_model, folder)
    encoder = Encoder.load(folder, dtype="float32")
    save_golden(embed_golden(encoder), folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_export_is_the_trained_model_in_every_reader(export):
    found = check_export(export)
    assert set(found) == {"embedloom", "transformers", "sentence-transformers"}
    assert min(found.values()) > 0.999999


def test_pooling_that_sentence_transformers_reads_differently_is_named(export):
    edit(export / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    with pytest.raises(
        StageError, match=r"sentence-transformers reads another model.*cause: pooling .*by cls"
    ):
        check_export(export)


def test_a_causal_mask_is_named(export):
    edit(export / "config.json", is_causal=True)
    with pytest.raises(
        StageError, match=r"transformers reads another model.*cause: mask \(it attends causally"
    ):
        check_export(export)


def test_a_missing_bos_is_named(export):
    path = export / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(StageError, match="cause: BOS"):
        check_export(export)


def test_other_weights_are_named(export):
    path = export / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = weights[name] + torch.randn(
        weights[name].shape, generator=torch.Generator().manual_seed(0)
    )
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"embedloom reads another model.*cause: weights"):
        check_export(export)


def test_lowest_cosine_is_that_of_the_worst_row():
    one = np.array([[1.0, 0.0], [1.0, 1.0]], dtype=np.float32)
    other = np.array([[2.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    assert lowest_cosine(one, other) == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("limit", [8, 16])
def test_an_instruction_that_fills_the_limit_stops_no_export(tiny_model, tmp_path, limit):
    """Rows may bring shorter ones, or none; the golden texts are cut like any reader cuts them."""
    folder = tmp_path / "export"
    shutil.copytree(tiny_model, folder)
    contract = PromptContract.load(folder).model_copy(update={"max_query_tokens": limit})
    (folder / "contract.json").write_bytes(contract.as_file())
    encoder = Encoder.load(folder, dtype="float32")
    golden = embed_golden(encoder)
    whole = encoder.tokenizer([golden_texts(encoder.contract)[0]])["input_ids"][0]
    assert golden[0][0] == whole[:limit]
    with pytest.raises(InstructionTooLong):
        encoder.embed([GOLDEN_TEXTS[0][0]], "query")
    save_golden(golden, folder)
    assert min(check_export(folder).values()) > 0.9999


@pytest.mark.parametrize("layers", [12, 30])
@pytest.mark.parametrize("bf16_weights", [False, True])
def test_a_deep_model_trained_in_bfloat16_passes_and_its_noise_is_reported(layers, bf16_weights, tmp_path):
    """SmolLM2-135M by the trainer's own export: 12 layers gave 0.9989 and 30 gave 0.9987, which ended runs before."""
    base, folder = tmp_path / "base", tmp_path / "model"
    base.mkdir()
    prepare_base(EncoderConfig(base="smollm2-135m", num_layers=layers), resolve_model("smollm2-135m"), base)
    encoder = Encoder.load(base, dtype="bfloat16", device="cpu", trainable=True)
    if bf16_weights:  # as DeepSpeed keeps them on a GPU
        encoder.backbone.to(torch.bfloat16)
    save_final_model(encoder, folder, training_config(), embed_golden(encoder))
    found = check_export(folder, ("embedloom", "transformers"))
    assert min(found["embedloom"], found["transformers"]) > 0.99999
    assert 0.99 < found["trainer (bfloat16)"] < 0.9999


def test_a_trainer_in_float32_must_compute_what_its_weights_say(tiny_model, tmp_path):
    encoder = Encoder.load(tiny_model, dtype="float32")
    ids, vectors = embed_golden(encoder)
    save_golden((ids, vectors), tmp_path, (ids, vectors + 0.05), torch.float32)
    with pytest.raises(StageError, match="not those trained"):
        check_export(tmp_path, ())


def test_noise_of_bfloat16_is_a_warning_and_no_error(tiny_model, tmp_path, capsys):
    encoder = Encoder.load(tiny_model, dtype="float32")
    ids, vectors = embed_golden(encoder)
    save_golden((ids, vectors), tmp_path, (ids, vectors + 0.05), torch.bfloat16)
    found = check_export(tmp_path, ())
    assert found["trainer (bfloat16)"] == pytest.approx(lowest_cosine(vectors, vectors + 0.05), abs=1e-6)
    assert "compute_dtype: float32" in capsys.readouterr().err
