"""The cross-encoder against sentence-transformers' own predict, and the folders it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch

from embedloom.config.mining import MiningConfig
from embedloom.core.prompting import Templates
from embedloom.encoder.registry import local_folder
from embedloom.errors import ConfigError, DataError
from embedloom.mining.stage import rescoring_source
from embedloom.retrieval.cross_encoder import CrossEncoderSource
from fakes_mining import make_tiny_cross_encoder

PAIRS = [
    ("sort a list", "sorted() gives a new list"),
    ("a", "größer"),
    ("read a Parquet file", "a long text about columns " * 20),
    ("sort a list", ""),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "model")


def source(folder, template="{text}", **changes):
    options = {"max_tokens": 100, "batch_size": 2, "dtype": "float32"} | changes
    return CrossEncoderSource("tiny", folder, Templates(query=template), **options)


def score(scorer, pairs=PAIRS, instructions=None):
    queries, documents = zip(*pairs, strict=True)
    return scorer.score(queries, documents, ["retrieval"] * len(pairs), instructions or [None] * len(pairs))


def test_scores_are_the_librarys_sigmoids_whatever_activation_the_model_names(model, tmp_path):
    from sentence_transformers import CrossEncoder

    library = CrossEncoder(str(model), max_length=100, device="cpu")
    expected = library.predict(PAIRS)
    assert np.ptp(expected) > 0.05 and expected.min() > 0 and expected.max() < 1
    np.testing.assert_allclose(score(source(model).open()), expected, atol=1e-6)
    # models trained on logits name Identity; the rules still see 0 to 1
    raw = shutil.copytree(model, tmp_path / "raw")
    config = json.loads((raw / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (raw / "config.json").write_text(json.dumps(config))
    logits = CrossEncoder(str(raw), max_length=100, device="cpu").predict(PAIRS)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), expected, atol=1e-6)
    np.testing.assert_allclose(score(source(raw).open()), expected, atol=1e-6)


def test_the_query_takes_the_template_and_a_pair_is_cut_at_its_limit(model):
    plain, instructed = source(model).open(), source(model, "{instruction}: {text}").open()
    pairs = [("Find it: a", "b"), ("Answer: a", "b")]
    found = score(instructed, [("a", "b"), ("a", "b")], ["Find it", "Answer"])
    np.testing.assert_allclose(found, score(plain, pairs), atol=1e-6)
    assert plain.contract_hash != instructed.contract_hash
    short = source(model, max_tokens=20).open()
    assert short.contract_hash != plain.contract_hash
    # a byte a token: [CLS], 3, [SEP], 14, [SEP]
    np.testing.assert_allclose(
        score(short, [("abc", "x" * 14)]), score(plain, [("abc", "x" * 14)]), atol=1e-6
    )
    np.testing.assert_allclose(
        score(short, [("abc", "x" * 14 + "yyy")]), score(plain, [("abc", "x" * 14)]), atol=1e-6
    )
    assert not np.allclose(score(plain, [("abc", "x" * 14 + "yyy")]), score(plain, [("abc", "x" * 14)]))


def test_a_reranking_llm_saved_for_sentence_transformers(tiny_llama, tmp_path):
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    modules = [Transformer(str(tiny_llama), transformer_task="text-generation"), LogitScore(50, 60)]
    library = CrossEncoder(modules=modules, device="cpu")
    library.save(str(tmp_path / "llm"), create_model_card=False)
    np.testing.assert_allclose(
        score(source(tmp_path / "llm", max_tokens=1024).open()), library.predict(PAIRS), atol=1e-5
    )


def test_other_folders_are_refused_by_name(model, tiny_model, tmp_path):
    with pytest.raises(DataError, match=r"no cross-encoder, its config\.json has architectures \['Llama"):
        source(tiny_model).open()
    two = make_tiny_cross_encoder(tmp_path / "two", labels=2)
    with pytest.raises(DataError, match=r"two: this cross-encoder has 2 labels; allowed: 1"):
        source(two).open()
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"broken: sentence-transformers cannot load this model"):
        source(broken).open()
    (broken / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not readable as JSON"):
        source(broken).open()


def test_a_score_that_is_not_finite_is_refused(model):
    scorer = source(model).open()
    with torch.no_grad():
        scorer._model.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="cross-encoder 'tiny': 4 of 4 scores are not finite"):
        score(scorer)


def test_the_section_opens_the_model_and_knows_its_positions(model):
    section = {"model": str(model), "top": 5, "max_tokens": 64, "query_template": "{instruction} {text}"}
    found = rescoring_source(MiningConfig(teachers=["t"], rescoring=section))
    assert (found.name, local_folder(found.folder), found.max_tokens) == (str(model), model, 64)
    assert score(found.open()).shape == (4,)
    with pytest.raises(ConfigError, match=r"mining\.rescoring: max_tokens: 512 is above the 128 positions"):
        rescoring_source(MiningConfig(teachers=["t"], rescoring={"model": str(model), "top": 5}))
