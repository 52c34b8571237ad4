"""Rerankers: pairs as the tokenizer makes them, logits as sentence-transformers' CrossEncoder has them, and the saved folder."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from embedloom.encoder.model import Encoder
from embedloom.encoder.pair_parity import check_reranker_export, golden_logits, save_golden_logits
from embedloom.encoder.pairs import PairEncoder, PairTemplate, prepare_reranker, save_reranker, types_of
from embedloom.encoder.registry import resolve_model
from embedloom.encoder.tokenizer import load_tokenizer
from embedloom.encoder.vllm_reader import ENVIRONMENT as VLLM_ENVIRONMENT
from embedloom.errors import ConfigError, DataError, StageError
from fakes_mining import make_tiny_cross_encoder

PAIRS = [
    ("sort a list", "sorted() gives a new list"),
    ("größer, 日本語", "émigré Ω"),
    ("read a Parquet file", "a long text about columns " * 20),
    ("query " * 40, "short"),
    ("query " * 40, "long " * 60),
    ("", "only a document"),
    ("only a query", ""),
    ("[SEP] odd", "[CLS] odder"),
]
SIZES = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=1)


def roberta_like(folder, kind):
    """A random classifier over bytes whose pairs are <s> a </s></s> b </s>, without token types."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {byte: n + 3 for n, byte in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", cls_token="<s>", sep_token="</s>", model_max_length=100
    ).save_pretrained(folder)
    torch.manual_seed(4)
    if kind == "xlm-roberta":
        config = XLMRobertaConfig(
            **SIZES, intermediate_size=64, max_position_embeddings=128, type_vocab_size=1, pad_token_id=0,
            initializer_range=0.5,
        )  # fmt: skip
        XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    else:
        config = DistilBertConfig(
            vocab_size=300, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=128, num_labels=1,
            initializer_range=0.5,
        )  # fmt: skip
        DistilBertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = make_tiny_cross_encoder(tmp_path_factory.mktemp("bert") / "model")
    path = folder / "tokenizer_config.json"  # as BERT's own tokenizer says it
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    return folder


@pytest.fixture(scope="module")
def folders(bert, tmp_path_factory):
    root = tmp_path_factory.mktemp("others")
    return {"bert": bert} | {kind: roberta_like(root / kind, kind) for kind in ("xlm-roberta", "distilbert")}


def library_logits(folder, pairs=PAIRS, max_tokens=None):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        str(folder), device="cpu", max_length=max_tokens, model_kwargs={"dtype": torch.float32}
    )
    return model.predict([list(pair) for pair in pairs], activation_fn=torch.nn.Identity())


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert"])
def test_logits_are_the_librarys(folders, family):
    encoder = PairEncoder.open(folders[family], dtype="float32", device="cpu")
    expected = library_logits(folders[family], max_tokens=encoder.pairs.max_tokens)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(encoder.score(*zip(*PAIRS, strict=True)), expected, atol=1e-4)
    assert encoder.packed == (family != "distilbert")
    if encoder.packed:  # no token is computed that is not there, but for the few that round a row up
        assert encoder.tokens.padding_share < 0.04


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("max_tokens", [16, 17, 40, 101])
def test_pairs_are_the_tokenizers_own_with_the_longer_text_cut_first(folders, family, max_tokens):
    tokenizer = load_tokenizer(folders[family])
    template = PairTemplate.of(tokenizer, max_tokens, family == "bert")
    drawn = random.Random(max_tokens)
    texts = ["", "a", "größer", *("x" * drawn.randint(1, 130) for _ in range(12))]
    for query in texts:
        for document in texts:
            own = [template.bare(tokenizer(text)["input_ids"]) for text in (query, document)]
            ids, types = types_of(torch.tensor(template.pair(*own)))
            wanted = tokenizer(
                [[query, document]],
                truncation="longest_first",
                max_length=max_tokens,
                return_token_type_ids=True,
            )
            tokenizer.backend_tokenizer.no_truncation()
            assert [ids.tolist()] == wanted["input_ids"]
            if family == "bert":
                assert [types.tolist()] == wanted["token_type_ids"]
            assert template.length(*(len(tokenizer(text)["input_ids"]) for text in (query, document))) == len(
                ids
            )


def test_what_a_pair_leaves_out_is_counted_by_pair(bert):
    encoder = PairEncoder.open(bert, dtype="float32", device="cpu")
    assert encoder.pairs.max_tokens == 128  # its positions; a byte a token, and three special ones
    ids, cut = encoder.tokenize_pairs(["abc", "abc", "abc"], ["x" * 122, "x" * 123, "y" * 9000])
    assert list(map(len, ids)) == [128, 128, 128] and cut == [False, True, True]
    assert (encoder.cuts.texts, encoder.cuts.cut, encoder.cuts.read) == (3, 2, 384)
    assert encoder.cuts.left_out == pytest.approx(1 + 9000 - 122, rel=0.01)


def test_a_base_is_given_a_head_by_its_seed_and_a_cross_encoder_keeps_its_own(bert, tmp_path):
    base = tmp_path / "base"
    load_tokenizer(bert).save_pretrained(base)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(base)
    logits = {}
    for name, folder, seed in (("a", base, 1), ("b", base, 1), ("c", base, 2), ("kept", bert, 3)):
        (tmp_path / name).mkdir()
        assert prepare_reranker(folder, 64, seed, tmp_path / name)["layers"] == 2
        encoder = PairEncoder.open(tmp_path / name, dtype="float32", device="cpu")
        assert encoder.pairs.max_tokens == 64
        logits[name] = encoder.score(*zip(*PAIRS, strict=True))
        np.testing.assert_allclose(logits[name], library_logits(tmp_path / name), atol=1e-4)
    np.testing.assert_array_equal(logits["a"], logits["b"])
    assert not np.allclose(logits["a"], logits["c"])
    np.testing.assert_allclose(logits["kept"], library_logits(bert, max_tokens=64), atol=1e-4)


def test_gradients_of_unpadded_pairs_are_those_of_transformers(bert):
    ours = PairEncoder.open(bert, dtype="float32", device="cpu", trainable=True)
    ids, _ = ours.tokenize_pairs(*zip(*PAIRS, strict=True))
    weights = torch.linspace(-1, 1, len(ids))
    (ours.forward(ids)[:, 0] * weights).sum().backward()
    model, tokenizer = BertForSequenceClassification.from_pretrained(bert).eval(), load_tokenizer(bert)
    for (query, document), weight in zip(PAIRS, weights, strict=True):
        batch = tokenizer(
            [[query, document]], truncation="longest_first", max_length=128, return_tensors="pt"
        )
        (model(**batch).logits[0, 0] * weight).backward()
    peer = dict(model.named_parameters())
    for name, own in ours.model.named_parameters():
        scale = float(peer[name].grad.abs().max())
        torch.testing.assert_close(own.grad, peer[name].grad, atol=1e-4 * max(1.0, scale), rtol=1e-4)


def test_a_saved_folder_is_read_alike_by_its_readers_and_another_model_is_found_out(bert, tmp_path):
    encoder = PairEncoder.open(bert, dtype="float32", device="cpu", trainable=True)
    save_reranker(encoder.model, encoder.tokenizer, 48, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and config["id2label"] == {
        "0": "LABEL_0"
    }
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    again = PairEncoder.open(tmp_path, dtype="float32", device="cpu", trainable=True)
    save_golden_logits(golden_logits(again), torch.float32, tmp_path)
    found = check_reranker_export(tmp_path)
    assert set(found) == {"trainer (float32)", "transformers", "sentence-transformers"}
    assert max(found.values()) < 1e-5
    with torch.no_grad():
        again.model.classifier.bias.add_(1.0)
    save_golden_logits(golden_logits(again), torch.float32, tmp_path)
    with pytest.raises(StageError, match=r"trainer \(float32\) has other logits .* allowed: 0\.0001"):
        check_reranker_export(tmp_path)


def test_other_folders_are_refused_by_name(tiny_model, tmp_path, bert):
    with pytest.raises(DataError, match=r"no reranker, its config\.json has architectures \['Llama"):
        PairEncoder.open(tiny_model)
    two = make_tiny_cross_encoder(tmp_path / "two", labels=2)
    with pytest.raises(DataError, match="this cross-encoder has 2 labels; allowed: 1"):
        PairEncoder.open(two)
    with pytest.raises(DataError, match=r"reranker\.base: .*: model_type 'llama' is no encoder"):
        prepare_reranker(tiny_model, 64, 0, tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"reranker\.max_tokens: 512 is above the 128 positions of 'model'; allowed: 16 to 128",
    ):
        prepare_reranker(bert, 512, 0, tmp_path)
    with pytest.raises(DataError, match="it is a cross-encoder, which gives scores of pairs and no vectors"):
        Encoder.load(bert)
    broken = tmp_path / "broken"
    broken.mkdir()
    prepare_reranker(bert, 64, 0, broken)
    (broken / "reranker.json").write_text('{"version": 9, "max_tokens": 4}')
    with pytest.raises(DataError, match=r"reranker\.json: version 9, this version reads 1"):
        PairEncoder.open(broken)


VLLM = """
import json, sys
import torch
from vllm import LLM

torch.set_num_threads(1)
folder, pairs = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model=folder, runner="pooling", dtype="float32", enforce_eager=True, max_num_seqs=8, enable_chunked_prefill=False)
found = [llm.score([query], [document], use_tqdm=False)[0].outputs.score for query, document in pairs]
print(json.dumps([float(score) for score in found]))
"""


@pytest.mark.slow
def test_vllms_score_api_gives_the_sigmoids(tmp_path):
    prepare_reranker(resolve_model("minilm-l6"), 64, 0, tmp_path)
    (tmp_path / "contract.json").unlink()  # a trained one has none
    pairs = [
        ("sort a list", "sorted() gives a new list"),
        ("größer", "Paris is the capital of France"),
        ("a", "b"),
    ]
    logits = PairEncoder.open(tmp_path, dtype="float32", device="cpu").score(*zip(*pairs, strict=True))
    run = subprocess.run(
        [sys.executable, "-c", VLLM, str(tmp_path), json.dumps(pairs)],
        env={**os.environ, **VLLM_ENVIRONMENT}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    scores = json.loads(run.stdout.strip().splitlines()[-1])
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=1e-4)
