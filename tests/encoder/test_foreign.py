"""Foreign model folders against sentence-transformers' own encode_query and encode_document, layout by layout."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedloom.encoder.attention import PACKED_ATTENTION
from embedloom.encoder.foreign import read_layout
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import open_model
from embedloom.errors import DataError
from embedloom.retrieval.teachers import SentenceEncoder
from fakes_foreign import (
    E5,
    KINDS,
    LIBRARY,
    OLD,
    TEXTS,
    gtr_t5,
    lowest_cosines,
    make_transformer,
    routed_model,
    save_library_model,
    static_model,
    two_dense_then_normalize,
    with_dense,
    write,
    write_old_layout,
)  # fmt: skip


@pytest.fixture(scope="module")
def transformers_made(tmp_path_factory):
    """Folders of bare transformers by kind, made once."""
    made = {}

    def get(kind="Bert", **changes):
        key = (kind, str(changes))
        if key not in made:
            made[key] = make_transformer(tmp_path_factory.mktemp(kind), kind, **changes)
        return made[key]

    return get


@pytest.mark.parametrize("name", LIBRARY)
def test_what_the_library_saves_is_read_as_it_reads_it(name, transformers_made, tmp_path):
    folder = save_library_model(tmp_path / "model", transformers_made(limit=300), **LIBRARY[name])
    assert lowest_cosines(folder) > 0.9999


@pytest.mark.parametrize("name", OLD)
def test_older_layouts_are_read_as_the_library_reads_them(name, transformers_made, tmp_path):
    folder = write_old_layout(tmp_path / "model", transformers_made(), **OLD[name])
    assert lowest_cosines(folder) > 0.9999


@pytest.mark.parametrize("kind", KINDS)
def test_architectures_are_computed_as_the_library_computes_them(kind, transformers_made, tmp_path):
    """MPNet and DeBERTa have no sdpa, XLM-R begins its positions at 2, sdpa drops Gemma 2's soft cap."""
    bare = transformers_made(kind, limit=512, **KINDS[kind])
    if kind == "Gemma2":  # as trained: with the cap, which the library's default attention drops
        encoder = Encoder.load(save_library_model(tmp_path / "model", bare), dtype="float32")
        assert encoder.backbone.config._attn_implementation in ("eager", PACKED_ATTENTION)
        return
    assert lowest_cosines(save_library_model(tmp_path / "model", bare)) > 0.9999


def test_a_causal_bert_is_computed_as_one(transformers_made, tmp_path):
    """Heads of 16, which the fused way takes; it attends to both sides."""
    folder = save_library_model(
        tmp_path / "model", transformers_made(limit=300, is_decoder=True, num_attention_heads=2)
    )
    assert open_model(folder).contract.attention == "causal"
    assert lowest_cosines(folder) > 0.9999


def test_the_encoder_of_a_t5_with_its_dense_layer_is_computed_as_the_library_computes_it(tmp_path):
    """gtr-t5 and sentence-t5; its saved config says encoder-decoder or not, depending on who saved it."""
    folder = gtr_t5(tmp_path / "gtr")
    config = json.loads((folder / "config.json").read_text())
    for flag in (True, False):
        write(
            folder / "config.json",
            {**config, "is_encoder_decoder": flag, "architectures": ["T5EncoderModel"]},
        )
        assert lowest_cosines(folder) > 0.9999
    contract = open_model(folder).contract
    assert (contract.max_document_tokens, contract.attention, contract.pooling) == (
        40,
        "bidirectional",
        "mean",
    )
    loaded = Encoder.load(folder, dtype="float32", device="cpu")
    shared = Encoder.load(folder, weights=loaded.share_weights())
    np.testing.assert_array_equal(shared.embed(TEXTS, "query"), loaded.embed(TEXTS, "query"))


def test_a_chat_template_counts_only_where_the_library_takes_it(transformers_made, tmp_path):
    """Without a stated modality the library reads text, as it did when such models (Qwen3-Embedding) were made."""
    bare = shutil.copytree(transformers_made(limit=300), tmp_path / "bare")
    template = "{% for m in messages %}list {{ m['content'] }} of{% endfor %}"
    (bare / "chat_template.jinja").write_text(template)
    old = write_old_layout(tmp_path / "old", bare, {"pooling_mode_mean_tokens": True})
    assert open_model(old).beyond is None
    assert lowest_cosines(old) > 0.9999
    new = save_library_model(tmp_path / "new", bare)  # as the library itself saves it since 5.4
    assert "message" in json.loads((new / "sentence_bert_config.json").read_text())["modality_config"]
    assert (
        "its texts go through a chat template (modality_config of sentence_bert_config.json)"
        in open_model(new).beyond
    )
    assert lowest_cosines(new, lambda path: SentenceEncoder(path, "float32")) > 0.9999


def test_limits_come_from_wherever_they_are_stated(transformers_made, tmp_path):
    bert, xlmr = transformers_made(limit=300), transformers_made("XLMRoberta")
    saved = save_library_model(tmp_path / "saved", bert, max_seq_length=256)
    assert "max_seq_length" not in json.loads(
        (saved / "sentence_bert_config.json").read_text()
    )  # 6.2 keeps it elsewhere
    mean = {"pooling_mode_mean_tokens": True}
    old = write_old_layout(tmp_path / "old", bert, mean, settings={"max_seq_length": 128})
    long = write_old_layout(tmp_path / "long", bert, mean, settings={"max_seq_length": 100_000})
    positions = write_old_layout(tmp_path / "positions", xlmr, mean, settings={"max_seq_length": 514})
    limits = [open_model(folder).contract.max_document_tokens for folder in (saved, old, long, positions)]
    # The table has 514 rows: 514 for BERT, but XLM-R's first token takes row 2.
    assert limits == [256, 128, 514, 512]
    vectors = Encoder.load(positions, dtype="float32", device="cpu").embed(["cats " * 2000], "document")
    assert np.isfinite(vectors).all()


def test_bare_roberta_counts_positions_from_two(transformers_made, tmp_path):
    from embedloom.encoder.backbone import position_limit, read_config

    kinds = {"XLMRoberta": 512, "MPNet": 512, "Roberta": 512, "Bert": 514}
    found = {kind: position_limit(read_config(transformers_made(kind))) for kind in kinds}
    assert found == kinds


def test_what_our_encoder_cannot_compute_goes_through_the_library_or_is_refused_by_name(
    transformers_made, tmp_path
):
    from sentence_transformers import SentenceTransformer

    bert = transformers_made(limit=300)
    mean = {"pooling_mode_mean_tokens": True}
    apart = {"prompts": {"query": "query : "}, "default_prompt_name": None}
    models = {
        "Router": routed_model(tmp_path / "routed", bert),
        "StaticEmbedding": static_model(tmp_path / "static"),
        "include_prompt": write_old_layout(
            tmp_path / "apart", bert, {**mean, "include_prompt": False}, prompts=apart
        ),
    }
    for word, folder in models.items():
        assert word in str(open_model(folder).beyond)
        with pytest.raises(
            DataError, match=f"our encoder would compute other vectors than its authors'.*{word}"
        ):
            Encoder.load(folder)
        library, ours = SentenceTransformer(str(folder), device="cpu"), SentenceEncoder(folder, "float32")
        for side, encode in (("query", library.encode_query), ("document", library.encode_document)):
            theirs = encode(TEXTS, normalize_embeddings=True)
            np.testing.assert_allclose(ours.embed(TEXTS, side), theirs, atol=1e-5)
        assert ours.dimension == theirs.shape[1]
        assert ours.tokens.real > 0


def test_without_files_of_the_library_pooling_is_not_guessed(transformers_made):
    with pytest.raises(DataError, match=r"it has no modules\.json, so how to pool is unknown"):
        _ = open_model(transformers_made()).contract


def test_vectors_made_for_dot_products_are_refused_by_name(transformers_made, tmp_path):
    folder = save_library_model(tmp_path / "dot", transformers_made(), similarity_fn_name="dot")
    assert "similarity 'dot' of vectors that are not of length 1" in open_model(folder).beyond


def test_texts_that_play_the_same_part_take_what_encode_without_a_name_takes(transformers_made, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = save_library_model(
        tmp_path / "model",
        transformers_made(),
        prompts={"query": "query : ", "own": "big "},
        default_prompt_name="own",
    )
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    ours = Encoder.load(folder, dtype="float32", device="cpu")
    for side in ("query", "document"):
        np.testing.assert_allclose(ours.embed(TEXTS, side, "sts"), theirs, atol=1e-5)


def test_a_head_is_shared_with_other_processes_and_counts_in_a_contract_s_vectors(
    transformers_made, tmp_path
):
    folder = save_library_model(tmp_path / "model", transformers_made(), later=with_dense)
    loaded = Encoder.load(folder, dtype="float32", device="cpu")
    shared = Encoder.load(folder, weights=loaded.share_weights())
    np.testing.assert_array_equal(shared.embed(TEXTS, "query"), loaded.embed(TEXTS, "query"))
    assert loaded.dimension == 12
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"2_Dense: no weights .* of the Dense layer"):
        Encoder.load(folder)


@pytest.fixture
def no_terminal(monkeypatch):
    """Reading from the terminal fails, as it would hang a run."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))


def test_an_unknown_model_type_is_named(transformers_made, tmp_path):
    folder = write_old_layout(tmp_path / "model", transformers_made(), {"pooling_mode_mean_tokens": True})
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "model_type": "not_yet_known"})
    with pytest.raises(DataError, match="cannot read model_type 'not_yet_known'"):
        Encoder.load(folder)


def test_the_recipe_s_own_model_is_read_as_a_llama_without_causal_mask(tiny_llama, tmp_path, no_terminal):
    """nvidia/llama-embed-nemotron-8b: model_type llama_bidirec, auto_map, keys of LlamaModel, pooling avg."""
    from transformers import AutoTokenizer, LlamaModel

    folder = tmp_path / "nemotron"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("chat_template*"))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {
        "AutoConfig": "llama_bidirectional_model.LlamaBidirectionalConfig",
        "AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel",
    }
    own = {
        "model_type": "llama_bidirec",
        "architectures": ["LlamaBidirectionalModel"],
        "auto_map": auto_map,
        "pooling": "avg",
    }
    write(folder / "config.json", {**config, **own})
    (folder / "llama_bidirectional_model.py").write_text("raise SystemExit('ran')\n")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    encoder = Encoder.load(folder, dtype="float32", device="cpu")
    assert (encoder.contract.pooling, encoder.contract.attention) == ("mean", "bidirectional")
    model = LlamaModel.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    model.config.is_causal = False
    batch = AutoTokenizer.from_pretrained(tiny_llama)(["cats"], return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(dim=1)).numpy()
    np.testing.assert_allclose(encoder.embed(["cats"], "document"), expected, atol=1e-5)


def test_layouts_are_read_without_opening_weights(transformers_made, tmp_path):
    folder = save_library_model(
        tmp_path / "model", transformers_made(), later=two_dense_then_normalize, prompts=E5
    )
    layout = read_layout(folder)
    assert [module.kind for module in layout.head] == ["Dense", "Dense"]  # every contract ends at length 1
    assert (layout.query_prompt, layout.document_prompt) == ("query : ", "")
    assert "['passage'] are applied by name only" in str(layout.left_out)
