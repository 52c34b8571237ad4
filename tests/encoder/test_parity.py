"""An export that some reader would read differently is stopped, with the reason."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import (
    GOLDEN_TEXTS,
    check_export,
    embed_golden,
    golden_texts,
    lowest_cosine,
    save_golden,
)
from embedloom.encoder.tokenizer import InstructionTooLong
from embedloom.errors import StageError
from embedloom.instructions import PromptContract


@pytest.fixture
def export(tiny_model, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(tiny_model, folder)
    encoder = Encoder.load(folder, dtype="float32")
    save_golden(embed_golden(encoder), torch.float32, folder)
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
    save_golden(golden, torch.float32, folder)
    assert min(check_export(folder).values()) > 0.9999
