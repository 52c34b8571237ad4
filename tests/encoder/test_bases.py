"""Bases of many families: made bidirectional in every layer, or refused by name; what is saved is a base again."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedloom.config.encoder import EncoderConfig
from embedloom.encoder.backbone import load_backbone
from embedloom.encoder.export import prepare_base
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import check_export, embed_golden, lowest_cosine, save_golden
from embedloom.encoder.registry import open_model
from embedloom.errors import ConfigError, DataError
from fakes import byte_tokenizer
from fakes_bases import FAMILIES, HEADS, HYBRIDS, MULTIMODAL, make_base, multimodal, prepare
from fakes_foreign import make_transformer, save_library_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_bidirectional_in_every_layer_and_its_folder_a_base_again(family, tmp_path):
    base = make_base(tmp_path / "base", family, **FAMILIES[family])
    folder = prepare(base, tmp_path / "first")
    # transformers alone, a text of 60 tokens: the last one moves the first state after the first layer already.
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(60).unsqueeze(0) + 20
    other = ids.clone()
    other[0, -1] = 9
    with torch.no_grad():
        one, two = (model(x, output_hidden_states=True).hidden_states for x in (ids, other))
    assert all(float((a - b)[0, 0].abs().max()) > 0 for a, b in zip(one[1:], two[1:], strict=True))
    encoder = Encoder.load(folder, dtype="float32", device="cpu")
    texts = [[20 + i for i in range(60)], [9, 8, 7], [200]]
    alone = np.concatenate([encoder.embed_tokens([text]) for text in texts])
    np.testing.assert_allclose(encoder.embed_tokens(texts), alone, atol=2e-5)
    again = prepare(folder, tmp_path / "again", add_eos=True)
    assert Encoder.load(again, dtype="float32", device="cpu").contract.add_eos
    save_golden(embed_golden(encoder), folder)
    assert min(check_export(folder).values()) > 0.9999


@pytest.mark.parametrize("family", ["SmolLM3", "Ministral3", "Olmo2", "Qwen3Moe", "Gemma3Text"])
def test_a_decoder_may_stay_causal_before_and_after_saving(family, tmp_path):
    base = make_base(tmp_path / "base", family, **FAMILIES[family])
    folder = prepare(base, tmp_path / "model", attention="causal", pooling="last_token")
    encoder = Encoder.load(folder, dtype="float32", device="cpu")
    assert (encoder.contract.attention, encoder.is_decoder) == ("causal", True)
    again = prepare(folder, tmp_path / "again", attention="causal", pooling="last_token", add_eos=True)
    assert Encoder.load(again, dtype="float32", device="cpu").is_decoder


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("Lfm2", r"0 \(conv\), 1 \(conv\), 3 \(conv\)"),
        ("Qwen3_5Text", r"0 \(linear_attention\), 1 \(linear_attention\), 2 \(linear_attention\)"),
        ("Qwen3Next", r"0 \(linear_attention\), 1"),
    ],
)  # fmt: skip
def test_hybrids_are_refused_naming_the_layers_that_stay_causal(family, layers, tmp_path):
    base = make_base(tmp_path / "base", family, **HYBRIDS[family])
    with pytest.raises(
        DataError, match=rf"'bidirectional' does not fit .* of its 4 layers, {layers}.*allowed: 'causal'"
    ):
        prepare(base, tmp_path / "open")
    assert (
        Encoder.load(
            prepare(base, tmp_path / "causal", attention="causal"), dtype="float32"
        ).contract.attention
        == "causal"
    )


def test_windows_that_hold_the_texts_stay_as_they_are(tmp_path):
    wide = prepare(make_base(tmp_path / "wide", "Mistral", sliding_window=64), tmp_path / "a")
    narrow = prepare(make_base(tmp_path / "narrow", "Mistral", sliding_window=63), tmp_path / "b")
    causal = prepare(tmp_path / "narrow", tmp_path / "c", attention="causal")
    windows = [
        json.loads((folder / "config.json").read_text())["sliding_window"]
        for folder in (wide, narrow, causal)
    ]
    assert windows == [64, 64, 63]


@pytest.mark.parametrize("bos", [True, False])
def test_null_means_bos_where_the_tokenizer_has_one(bos, tmp_path):
    base = make_base(tmp_path / "base", "Qwen3", **HEADS)
    tokenizer = byte_tokenizer()
    if not bos:  # as all of Qwen's
        tokenizer.bos_token = None
    tokenizer.save_pretrained(base)
    encoder = Encoder.load(prepare(base, tmp_path / "model"), dtype="float32")
    (ids,) = encoder.tokenize(["ab"], "document")
    assert (encoder.contract.add_bos, len(ids), ids[0] == 1) == (bos, 2 + bos, bos)
    if not bos:
        with pytest.raises(
            ConfigError, match=r"encoder\.add_bos: true, but the tokenizer of this base has no BOS token"
        ):
            prepare(base, tmp_path / "asked", add_bos=True)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_model_inside_a_multimodal_checkpoint_is_taken(kind, tmp_path, capsys):
    """By the config and the names of weights that the authors ship; the expected states are of the model they came from."""
    inside = multimodal(tmp_path / "base", kind)
    folder = prepare(tmp_path / "base", tmp_path / "model", attention="causal")
    assert f"is multimodal; its text model ({MULTIMODAL[kind]}) is taken" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["model_type"] == MULTIMODAL[kind]
    encoder = Encoder.load(folder, dtype="float32", device="cpu")
    ids = [[1, *range(20, 110)]]  # beyond what Ministral's rope was made for, so that its scaling counts
    with torch.no_grad():
        expected = inside(input_ids=torch.tensor(ids)).last_hidden_state.mean(dim=1).numpy()
    assert lowest_cosine(encoder.embed_tokens(ids), expected) > 0.99999
    if kind == "Qwen3_5":
        with pytest.raises(
            DataError, match=r"of its 4 layers, 0 \(linear_attention\), 1 .*, 2 .* do not let"
        ):
            prepare(tmp_path / "base", tmp_path / "open")
        return
    opened = prepare(tmp_path / "base", tmp_path / "open")
    again = prepare(opened, tmp_path / "again")
    vectors = [
        Encoder.load(each, dtype="float32", device="cpu").embed_tokens(ids) for each in (opened, again)
    ]
    np.testing.assert_allclose(*vectors, atol=1e-6)
    assert lowest_cosine(vectors[0], expected) < 0.999


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_encoder_decoders_are_refused_in_one_sentence(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(
        d_model=16, num_layers=1, encoder_layers=1, decoder_layers=1, vocab_size=259
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(
        DataError,
        match=rf"model_type '{kind.lower()}' is an encoder-decoder.* allowed: encoders such as BERT",
    ):
        prepare(tmp_path / "base", tmp_path / "out")


def test_positions_that_begin_at_two_leave_two_fewer(tmp_path):
    base = make_transformer(tmp_path / "base", "XLMRoberta")  # a table of 514 rows
    with pytest.raises(ConfigError, match=r"encoder\.max_document_tokens: 514 is above the 512 positions of"):
        prepare_base(EncoderConfig(base=str(base), max_document_tokens=514), base, tmp_path)
    (tmp_path / "model").mkdir()
    prepare_base(EncoderConfig(base=str(base), max_document_tokens=512), base, tmp_path / "model")
    encoder = Encoder.load(tmp_path / "model", dtype="float32", device="cpu")
    assert np.isfinite(encoder.embed(["cats " * 2000], "document")).all()


def test_layers_that_training_would_drop_are_refused(tmp_path, capsys):
    from sentence_transformers.base.modules import Dense

    bare = make_transformer(tmp_path / "bare", "Bert")
    headed = save_library_model(tmp_path / "headed", bare, later=lambda: [Dense(32, 8)])
    with pytest.raises(
        ConfigError, match=r"encoder\.base: .* has Dense in its modules\.json, which training would drop"
    ):
        prepare(headed, tmp_path / "out")
    plain = save_library_model(tmp_path / "plain", bare, pooling="cls")
    prepare(plain, tmp_path / "model")
    assert "was pooled by cls so far; encoder.pooling is mean" in capsys.readouterr().err


def test_a_foreign_causal_decoder_of_any_family_is_read(tmp_path):
    base = make_base(tmp_path / "base", "SmolLM3")
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("chat_template*"))
    folder = save_library_model(tmp_path / "model", bare, pooling="lasttoken")
    assert (open_model(folder).contract.attention, open_model(folder).contract.pooling) == (
        "causal",
        "last_token",
    )
    assert Encoder.load(folder, dtype="float32", device="cpu").is_decoder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_prepared_base_is_in_the_type_of_its_files_and_holds_the_same_numbers(dtype, tmp_path, tiny_llama):
    """Every training worker reads it: half the bytes where the base has 16 bits, and no weight is rounded."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    own = load_file(base / "model.safetensors")
    prepared = load_file(prepare(base, tmp_path / "prepared") / "model.safetensors")
    assert {tensor.dtype for tensor in prepared.values()} == {dtype}
    for name, tensor in prepared.items():
        assert torch.equal(tensor, own[f"model.{name}"]), name
    read = load_backbone(tmp_path / "prepared", "bidirectional", torch.float32, None, 64)
    assert {tensor.dtype for tensor in read.parameters()} == {torch.float32}
