"""sentence-transformers teachers against the library's own encode, and the choice of the engine."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from embedloom.config.mining import Teacher
from embedloom.encoder.foreign import read_layout
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import open_model, resolve_model
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.embedder import EncoderSource
from embedloom.retrieval.teachers import EndpointSource, SentenceTransformerSource, teacher_source

TEXTS = ["sort a list", "how do I read a Parquet file, column by column?", "größer", "a"]


def embed(embedder, texts, side="document", instruction=None, task_type="retrieval"):
    return embedder.embed(texts, side, [task_type] * len(texts), [instruction] * len(texts))


@pytest.fixture(scope="module")
def plain_llama(tiny_llama, tmp_path_factory):
    """Without its chat template: sentence-transformers turns texts into chat messages where there is one."""
    folder = tmp_path_factory.mktemp("plain-llama") / "model"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("chat_template*"))
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def make_model(llama, folder, *, dense=True, pooling="mean", normalize=False, **options):
    """A tiny sentence-transformers folder; ``options`` go to SentenceTransformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(3)
    modules = [Transformer(str(llama), max_seq_length=64), Pooling(32, pooling)]
    modules += [Dense(32, 12)] if dense else []
    modules += [Normalize()] if normalize else []
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder), create_model_card=False)
    return folder


def source(folder, **changes):
    return SentenceTransformerSource(name="foreign", folder=folder, dtype="float32", **changes)


@pytest.fixture(scope="module")
def dense_model(plain_llama, tmp_path_factory):
    prompts = {"query": "query: ", "passage": "passage: "}
    return make_model(plain_llama, tmp_path_factory.mktemp("dense") / "model", prompts=prompts)


@pytest.fixture(scope="module")
def library(dense_model):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(dense_model), device="cpu")


def test_minilm_is_the_same_in_our_encoder_and_in_sentence_transformers():
    folder = resolve_model("minilm-l6")
    texts = [*TEXTS, " ".join(["a long text about threads and sockets"] * 40)]
    theirs = source(folder, max_query_tokens=64, max_document_tokens=128).open()
    contract = teacher_source(
        Teacher(model="minilm-l6"), max_query_tokens=64, max_document_tokens=128
    ).contract
    ours = Encoder.load(folder, dtype="float32", contract=contract)
    for side in ("query", "document"):
        found, tokens = embed(theirs, texts, side)
        cosines = (found * ours.embed(texts, side)).sum(axis=1)
        assert cosines.min() > 0.9999
        assert tokens == [len(ids) for ids in ours.tokenize(texts, side)]


def test_both_engines_count_the_same_texts_as_cut_by_the_same_tokens():
    folder = resolve_model("minilm-l6")
    texts = [*TEXTS, " ".join(["a long text about threads and sockets"] * 12)]
    theirs = source(folder, max_query_tokens=64, max_document_tokens=32).open()
    contract = teacher_source(
        Teacher(model="minilm-l6"), max_query_tokens=64, max_document_tokens=32
    ).contract
    ours = Encoder.load(folder, dtype="float32", contract=contract)
    for side in ("query", "document"):
        embed(theirs, texts, side)
        ours.tokenize(texts, side)
        counted = theirs.cuts.take()
        assert counted == ours.cuts.take()
        # Seven words, twelve times, and two special tokens, less the limit.
        assert counted.cut == 1 and counted.left_out == 7 * 12 + 2 - contract.max_tokens(side)


def test_a_prompt_that_fills_the_limit_is_refused_where_a_text_is_cut(dense_model):
    template = "Instruct: {instruction}\nQuery: {text}"
    embedder = source(dense_model, max_query_tokens=40, query_template=template).open()
    embedder.embed(["ab"], "query", ["retrieval"], ["y" * 19])
    with pytest.raises(DataError, match=r"takes 37 tokens of the limit of 40 for a query, which leaves 3"):
        embedder.embed(["abcdefgh"], "query", ["retrieval"], ["y" * 19])


def test_dense_layers_and_prompts_count(dense_model, library):
    embedder = source(dense_model, batch_size=2).open()
    queries, tokens = embed(embedder, TEXTS, "query")
    documents, _ = embed(embedder, TEXTS)
    assert queries.shape == (4, 12)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    options = {"normalize_embeddings": True}
    np.testing.assert_allclose(queries, library.encode_query(TEXTS, **options), atol=1e-5)
    # The library's encode_document takes the prompt of this name alone; "passage" is one that a template asks for.
    np.testing.assert_allclose(documents, library.encode_document(TEXTS, **options), atol=1e-5)
    passages, _ = embed(source(dense_model, document_template="passage: {text}").open(), TEXTS)
    np.testing.assert_allclose(
        passages, library.encode(TEXTS, prompt_name="passage", task="document", **options), atol=1e-5
    )
    # one token a byte, cut at the model's 64
    assert tokens == [min(64, len(f"query: {text}".encode())) for text in TEXTS]


def test_templates_put_the_instruction_of_each_text(dense_model, library):
    template = "Instruct: {instruction}\nQuery: {text}!"
    embedder = source(dense_model, query_template=template, document_template="{text}").open()
    texts, own = ["one", "two", "one"], ["Find it", None, "Look"]
    found, _ = embedder.embed(texts, "query", ["retrieval", "sts", "retrieval"], own)
    asked = ["Find it", "Retrieve semantically similar text", "Look"]
    written = [f"Instruct: {task}\nQuery: {text}!" for task, text in zip(asked, texts, strict=True)]
    np.testing.assert_allclose(
        found, library.encode(written, prompt="", normalize_embeddings=True), atol=1e-5
    )
    symmetric, _ = embed(embedder, ["two"], "document", None, "sts")
    np.testing.assert_allclose(symmetric[0], found[1], atol=1e-5)


def test_poolings_that_leave_the_prompt_out_do_so(plain_llama, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = make_model(plain_llama, tmp_path / "model", prompts={"query": "query: "})
    library = SentenceTransformer(str(folder), device="cpu")
    library.set_pooling_include_prompt(False)
    library.save(str(folder), create_model_card=False)
    found, _ = embed(source(folder).open(), TEXTS, "query")
    np.testing.assert_allclose(found, library.encode_query(TEXTS, normalize_embeddings=True), atol=1e-5)


def test_limits_cut_each_side(dense_model, library):
    embedder = source(
        dense_model,
        max_query_tokens=10,
        max_document_tokens=20,
        query_template="{text}",
        document_template="{text}",
    ).open()
    long, cut = "abcdefghijklmnopqrstuvwxyz", "abcdefghij"
    found, tokens = embed(embedder, [long, cut], "query")
    assert tokens == [10, 10]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert embed(embedder, [long])[1] == [20]
    assert embed(embedder, [long], "query")[1] == [10]


def test_static_embeddings_are_counted_and_cut(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.eye(4, 5, dtype=np.float32)
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=weights)], device="cpu").save(
        str(tmp_path / "model"), create_model_card=False
    )
    embedder = source(tmp_path / "model", max_document_tokens=2).open()
    vectors, tokens = embed(embedder, ["a", "a b c", "c"])
    assert tokens == [1, 2, 1]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(vectors, [[0, 1, 0, 0, 0], [0, half, half, 0, 0], [0, 0, 0, 1, 0]], atol=1e-6)


def test_the_contract_hash_follows_what_the_texts_go_through(dense_model, tmp_path):
    one = source(dense_model)
    copy = tmp_path / "copy"
    shutil.copytree(dense_model, copy)
    hashes = [
        changed.open().contract_hash
        for changed in (
            one,
            replace(one, folder=copy, name="b", batch_size=3),
            replace(one, max_query_tokens=32),
            replace(one, query_template="{text}"),
        )
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    content = json.loads((copy / "2_Dense" / "config.json").read_text())
    content["activation_function"] = "torch.nn.modules.linear.Identity"
    (copy / "2_Dense" / "config.json").write_text(json.dumps(content))
    assert replace(one, folder=copy).open().contract_hash not in hashes
    assert pickle.loads(pickle.dumps(one)) == one


def test_models_for_other_measures_than_the_cosine_are_refused(plain_llama, tmp_path):
    free = make_model(plain_llama, tmp_path / "free", similarity_fn_name="dot")
    with pytest.raises(DataError, match=r"similarity_fn_name is 'dot' .* mining compares cosines"):
        embed(source(free).open(), TEXTS)
    unit = make_model(plain_llama, tmp_path / "unit", similarity_fn_name="dot", normalize=True)
    assert len(embed(source(unit).open(), TEXTS)[0]) == 4


def test_models_with_code_of_their_own_are_refused(dense_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dense_model, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "modeling_own.Head"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(DataError, match=r"cannot load this model.*modeling_own\.Head.* is run only by"):
        source(folder).open()
    assert open_model(folder).beyond is not None


def test_auto_takes_our_encoder_only_where_nothing_is_lost(
    plain_llama, tiny_llama, tiny_model, dense_model, tmp_path
):
    def engine(folder, **changes):
        return type(teacher_source(Teacher(model=str(folder), **changes)))

    plain = make_model(plain_llama, tmp_path / "plain", dense=False, normalize=True)
    assert engine(tiny_model) is EncoderSource
    assert engine(plain) is EncoderSource
    assert engine(resolve_model("minilm-l6")) is EncoderSource
    assert engine(dense_model) is EncoderSource
    assert engine(plain, query_template="query: {text}") is SentenceTransformerSource
    assert engine(plain, engine="sentence_transformers") is SentenceTransformerSource
    prompted = make_model(plain_llama, tmp_path / "prompts", dense=False, prompts={"query": "q: "})
    assert engine(prompted) is EncoderSource
    most = make_model(plain_llama, tmp_path / "max", dense=False, pooling="max")
    assert engine(most) is EncoderSource
    chatty = make_model(tiny_llama, tmp_path / "chat", dense=False)
    assert engine(chatty) is SentenceTransformerSource
    with pytest.raises(
        ConfigError, match=r"engine 'encoder' cannot run it: its texts go through a chat template"
    ):
        engine(chatty, engine="encoder")
    with pytest.raises(
        ConfigError, match=r"query_template and document_template do not fit, its contract\.json"
    ):
        engine(tiny_model, query_template="{text}")


def test_limits_and_instructions_of_the_stage_fill_what_the_section_leaves_open(tiny_model, dense_model):
    options = {"max_query_tokens": 48, "max_document_tokens": 40, "instructions": {"retrieval": "Look it up"}}
    ours = teacher_source(Teacher(model=str(tiny_model), max_query_tokens=16), **options)
    assert (ours.contract.max_query_tokens, ours.contract.max_document_tokens) == (16, 40)
    assert ours.contract.instruction_for("retrieval") == "Look it up"
    theirs = teacher_source(
        Teacher(model=str(dense_model), query_template="{instruction}: {text}"), **options
    )
    assert (theirs.max_query_tokens, theirs.max_document_tokens) == (48, 40)
    assert theirs.instructions["retrieval"] == "Look it up"
    with pytest.raises(ConfigError, match="max_document_tokens: 4096 is above the 1024 positions of"):
        teacher_source(Teacher(model=str(dense_model)), max_document_tokens=4096)


def test_an_endpoint_needs_no_folder():
    section = Teacher(
        model="served",
        engine="openai",
        url="http://h/v1",
        api_key_env="KEY",
        query_template="{instruction} {text}",
    )
    found = teacher_source(section, max_query_tokens=64, instructions={"sts": "Same?"})
    assert isinstance(found, EndpointSource)
    assert (found.url, found.model, found.api_key_env) == ("http://h/v1", "served", "KEY")
    assert found.templates.around("query", "sts", None) == ("Same? ", "")


def test_lower_casing_mixed_poolings_and_what_is_beyond_the_encoder(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("minilm-l6"), folder)
    assert open_model(folder).beyond is None
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256, "do_lower_case": true}')
    assert open_model(folder).beyond is None
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256, "query_length": 16}')
    assert open_model(folder).beyond == "sentence_bert_config.json sets ['query_length']"
    (folder / "sentence_bert_config.json").unlink()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "pooling_mode_cls_token": True}))
    assert read_layout(folder).pooling == "cls+mean"
    pooling.write_text(json.dumps({"pooling_mode": "attention"}))
    assert "its pooling is 'attention'" in open_model(folder).beyond
    (folder / "modules.json").unlink()
    assert "it has no modules.json" in open_model(folder).beyond
