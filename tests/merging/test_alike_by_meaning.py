"""Models that compute alike merge, however their files put it; what they differ in is refused, or allowed by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.config.merging import MergingConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.merging.checks import pooling_meaning
from fakes import byte_tokenizer
from fakes_merging import edit_json, merge, variant, writer

WEIGHTS = "model.safetensors"
TIES = MergingConfig(method="ties", density=0.5)


@pytest.fixture
def pair(tiny_model, tmp_path):
    """Two models of embedloom's own, with a contract."""
    return {f"c{seed}": variant(tiny_model, tmp_path / f"c{seed}", seed) for seed in range(2)}


@pytest.fixture
def foreign(pair):
    """The same as sentence-transformers leaves them: no contract."""
    for folder in pair.values():
        (folder / "contract.json").unlink()
    return pair


def weights(folder):
    return load_file(folder / WEIGHTS)


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def read(path):
    return json.loads(path.read_text())


def tokenizer_of_the_last_call(folder):
    """sentence-transformers saves truncation and padding as its last encode left them."""
    length = {"max_length": 64, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    edit_json(folder / "tokenizer.json", truncation=length, padding=padding)


def settings_of_another_version(folder):
    tokens = {name: {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
              for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"))}  # fmt: skip
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    edit_json(
        folder / "tokenizer_config.json", model_max_length=10**30, tokenizer_class="PreTrainedTokenizerFast",
        clean_up_tokenization_spaces=True, added_tokens_decoder={"0": tokens["pad_token"]}, extra_special_tokens={},
        truncation_side="right", additional_special_tokens=[],
    )  # fmt: skip


def config_of_transformers_4(folder):
    content = read(folder / "config.json")
    theta = content.pop("rope_parameters")["rope_theta"]
    content.pop("dtype")
    older = {
        "rope_theta": theta,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0",
    }
    (folder / "config.json").write_text(json.dumps({**content, **older, "use_cache": True}))


def config_without_defaults(folder):
    content = read(folder / "config.json")
    for key in (
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "rms_norm_eps",
        "attention_dropout",
        "head_dim",
        "rope_parameters",
    ):
        content.pop(key)
    (folder / "config.json").write_text(json.dumps(content))


def trained_with_dropout(folder):
    edit_json(folder / "config.json", attention_dropout=0.1, initializer_range=0.02, _name_or_path="/tmp/x")


def pooling_by_name(folder):
    size = read(folder / "1_Pooling/config.json").get("word_embedding_dimension", 32)
    named = {"embedding_dimension": size, "pooling_mode": "mean", "include_prompt": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(named))


def modules_of_another_version(folder):
    modules = read(folder / "modules.json")
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        module["type"] = f"sentence_transformers.base.modules.{kind.lower()}.{kind}"
    (folder / "modules.json").write_text(json.dumps(modules))


def sidecars_left_out(folder):
    (folder / "sentence_bert_config.json").unlink()
    (folder / "config_sentence_transformers.json").unlink()


def saved_as_a_language_model(folder):
    tensors = {f"model.{name}": tensor for name, tensor in weights(folder).items()}
    save_file(tensors | {"lm_head.weight": torch.ones(259, 32)}, folder / WEIGHTS, metadata={"format": "pt"})
    edit_json(folder / "config.json", architectures=["LlamaForCausalLM"], tie_word_embeddings=False)


def buffers_of_an_old_version(folder):
    tensors = weights(folder) | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def a_vocabulary_file_more(folder):
    (folder / "vocab.json").write_text("{}")
    (folder / "added_tokens.json").write_text("{}")


ALIKE = [
    tokenizer_of_the_last_call, settings_of_another_version, config_of_transformers_4, config_without_defaults,
    trained_with_dropout, pooling_by_name, modules_of_another_version, saved_as_a_language_model,
    buffers_of_an_old_version, a_vocabulary_file_more,
]  # fmt: skip


@pytest.mark.parametrize("change", ALIKE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("changed", ["c0", "c1"])
def test_another_way_to_say_the_same_merges_to_the_same(pair, tmp_path, change, changed):
    merge(MergingConfig(weights=(2, 1)), pair, writer(tmp_path / "plain"))
    change(pair[changed])
    merge(MergingConfig(weights=(2, 1)), pair, writer(tmp_path / "out"))
    merged = {name.removeprefix("model."): tensor for name, tensor in weights(tmp_path / "out").items()}
    assert same(merged, weights(tmp_path / "plain"))


def test_sidecars_that_only_state_defaults_may_be_missing(foreign, tmp_path):
    for folder in foreign.values():  # one length in both
        stated = read(folder / "sentence_bert_config.json")["max_seq_length"]
        edit_json(folder / "tokenizer_config.json", model_max_length=stated)
        edit_json(folder / "config_sentence_transformers.json", prompts={"query": "", "document": ""})
    sidecars_left_out(foreign["c1"])
    merge(MergingConfig(), foreign, writer(tmp_path / "out"))
    assert "differences" not in read(tmp_path / "out/lineage.json")


def test_a_limit_in_another_place_is_the_same_limit_and_another_one_is_said(foreign, tmp_path, capsys):
    """sentence-transformers 5.4 keeps max_seq_length in tokenizer_config.json. It is no matter of the weights."""
    stated = read(foreign["c0"] / "sentence_bert_config.json")["max_seq_length"]
    (foreign["c1"] / "sentence_bert_config.json").write_text("{}")
    edit_json(foreign["c1"] / "tokenizer_config.json", model_max_length=stated)
    merge(MergingConfig(), foreign, writer(tmp_path / "same"))
    assert "differences" not in read(tmp_path / "same/lineage.json")
    edit_json(foreign["c1"] / "tokenizer_config.json", model_max_length=stated // 2)
    merge(MergingConfig(), foreign, writer(tmp_path / "other"))
    said = f"max_seq_length is {stated} in 'c0', but {stated // 2} in 'c1'; that of 'c0' is taken"
    assert read(tmp_path / "other/lineage.json")["differences"] == [said]
    assert said in capsys.readouterr().err


def test_what_is_left_out_is_said(pair, tmp_path, capsys):
    saved_as_a_language_model(pair["c1"])
    merge(MergingConfig(), pair, writer(tmp_path / "out"))
    said = "left out, as not all models have them: 1 tensors (lm_head.weight)"
    assert read(tmp_path / "out/lineage.json")["differences"] == [said] and said in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_ties", "model_stock"])
def test_the_causal_model_that_all_were_trained_from_is_the_base(
    pair, tiny_llama, tiny_model, tmp_path, method
):
    """Its tensors are those of the bidirectional base under other names, so every method gives the same bytes."""
    config = MergingConfig(method=method)
    merge(config, pair, writer(tmp_path / "own"), tiny_model)
    merge(config, pair, writer(tmp_path / "causal"), tiny_llama)
    assert same(weights(tmp_path / "own"), weights(tmp_path / "causal"))
    base = {name.removeprefix("model."): tensor for name, tensor in weights(tiny_llama).items()}
    assert not same(weights(tmp_path / "causal"), {name: base[name] for name in weights(tmp_path / "causal")})


def test_a_causal_base_of_transformers_4_with_shards_and_an_untied_head(pair, tiny_llama, tmp_path):
    merge(TIES, pair, writer(tmp_path / "plain"), tiny_llama)
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config_of_transformers_4(base)
    edit_json(base / "config.json", eos_token_id=[2, 1], pad_token_id=None, tie_word_embeddings=False)
    head = {"lm_head.weight": torch.ones(259, 32)}
    save_file(weights(base) | head, base / WEIGHTS, metadata={"format": "pt"})
    merge(TIES, pair, writer(tmp_path / "out"), base)
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "out"))


def test_bert_with_its_masked_language_head_is_the_base(tmp_path):
    """``bert.`` before the backbone, ``cls.`` beside it, and no pooler."""
    config = BertConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BertForMaskedLM(config)
    base.save_pretrained(tmp_path / "base")
    models = {}
    for seed in (1, 2):
        model = BertModel(config)
        model.load_state_dict(base.bert.state_dict(), strict=False)
        model.save_pretrained(tmp_path / "start")
        models[f"m{seed}"] = variant(tmp_path / "start", tmp_path / f"m{seed}", seed)
    for folder in (tmp_path / "base", *models.values()):
        byte_tokenizer().save_pretrained(folder)
    merge(
        MergingConfig(method="task_arithmetic", weights=(1, 1)),
        models,
        writer(tmp_path / "out"),
        tmp_path / "base",
    )
    origin, found = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert not any("pooler" in name for name in found) and len(found) > 10
    left, right = (weights(folder) for folder in models.values())
    for name, tensor in found.items():
        start = origin[f"bert.{name}"].double()
        expected = start + (left[name].double() - start) + (right[name].double() - start)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)
    said = "left out, as not all models have them: 2 tensors (pooler.dense.bias, pooler.dense.weight)"
    assert read(tmp_path / "out/lineage.json")["differences"] == [said]


def other_rotation(folder):
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})


def other_cutting_side(folder):
    edit_json(folder / "tokenizer_config.json", truncation_side="left")


def other_start(folder):
    """No BOS before a text any more."""
    content = read(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("cls", "cls_token"), ("max", "max_tokens"), ("mean", "mean_tokens"), ("lasttoken", "lasttoken"),
        ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"), ("weightedmean", "weightedmean_tokens"),
    ],
)  # fmt: skip
def test_a_pooling_by_name_means_its_flag(tmp_path, name, flag):
    """The names of sentence-transformers' Pooling and the flags that it wrote before."""
    found = []
    for number, content in enumerate(({"pooling_mode": name}, {f"pooling_mode_{flag}": True})):
        (tmp_path / f"{number}/1_Pooling").mkdir(parents=True)
        (tmp_path / f"{number}/1_Pooling/config.json").write_text(json.dumps(content))
        found.append(pooling_meaning(Place(str(tmp_path / str(number)))))
    assert found[0] == found[1] and len(found[0]["pooling_mode"]) == 1


def other_pooling(folder):
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))


def other_prompts(folder):
    edit_json(folder / "config_sentence_transformers.json", prompts={"query": "Frage: "})


def other_padding_token(folder):
    edit_json(folder / "tokenizer_config.json", pad_token="</s>")


def other_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages }}")


REFUSED = [
    (other_rotation, "config.json rope_parameters.rope_theta is 10000.0 in 'c0', but 500000.0 in 'c1'",
     "config.json:rope_parameters.rope_theta"),
    (other_cutting_side, "tokenizer_config.json truncation_side is 'right' in 'c0', but 'left' in 'c1'",
     "tokenizer_config.json:truncation_side"),
    (other_start, "tokenizer.json post_processor", "tokenizer.json:post_processor"),
    (other_pooling, "1_Pooling/config.json pooling_mode is ['mean_tokens'] in 'c0', but ['lasttoken'] in 'c1'",
     "1_Pooling/config.json"),
    (other_prompts, "config_sentence_transformers.json prompts.query is absent in 'c0', but 'Frage: ' in 'c1'",
     "config_sentence_transformers.json:prompts"),
    (other_padding_token, "tokenizer_config.json pad_token is '<pad>' in 'c0', but '</s>' in 'c1'", "tokenizer_config.json"),
    (other_template, "tokenizer_config.json chat_template is None in 'c0', but '{{ messages }}' in 'c1'",
     "tokenizer_config.json:chat_template"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message", "name"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_a_real_difference_is_refused_by_name_and_allowed_by_it(foreign, tmp_path, change, message, name):
    merge(MergingConfig(), foreign, writer(tmp_path / "plain"))
    for folder in foreign.values():
        edit_json(folder / "config_sentence_transformers.json", prompts={})
    change(foreign["c1"])
    with pytest.raises(DataError) as refused:
        merge(MergingConfig(), foreign, writer(tmp_path / "out"))
    assert message in str(refused.value) and f"--allow {name}" in str(refused.value)
    arguments = [str(folder) for folder in foreign.values()]
    done = CliRunner().invoke(
        app, ["merge-models", *arguments, "--out", str(tmp_path / "allowed"), "--allow", name]
    )
    assert done.exit_code == 0, done.output
    assert same(weights(tmp_path / "allowed"), weights(tmp_path / "plain"))
    said = read(tmp_path / "allowed/lineage.json")["differences"]
    assert any(message in line and line.endswith("; that of 'c0' is taken") for line in said)


def test_models_of_one_origin_under_two_names(pair, tmp_path):
    for name, base in (("c0", "meta-llama/Llama-3.2-1B"), ("c1", "/models/llama-3.2-1b")):
        (pair[name] / "README.md").write_text(f"---\nbase_model: {base}\n---\n")
    with pytest.raises(
        DataError, match=r"different origins cannot be merged \(if it is one model: --allow base\)"
    ):
        merge(MergingConfig(), pair, writer(tmp_path / "out"))
    merge(MergingConfig(allow=("base",)), pair, writer(tmp_path / "allowed"))
    (said,) = read(tmp_path / "allowed/lineage.json")["differences"]
    assert "meta-llama/Llama-3.2-1B" in said and "/models/llama-3.2-1b" in said


def test_lengths_and_contracts_that_differ_are_allowed_by_name(pair, tmp_path):
    """Of embedloom's own models a length is part of the contract, by which vectors are told apart."""
    contract = {key: value for key, value in read(pair["c1"] / "contract.json").items() if key != "hash"}
    (pair["c1"] / "contract.json").write_text(json.dumps({**contract, "max_query_tokens": 32}))
    with pytest.raises(DataError, match=r"--allow contract\.json:max_query_tokens"):
        merge(MergingConfig(), pair, writer(tmp_path / "out"))
    merge(MergingConfig(allow=("contract.json:max_query_tokens",)), pair, writer(tmp_path / "longer"))
    first = read(pair["c0"] / "contract.json")["max_query_tokens"]
    assert read(tmp_path / "longer/contract.json")["max_query_tokens"] == first
    (pair["c1"] / "contract.json").unlink()
    with pytest.raises(DataError, match=r"contract\.json is present in 'c0', but absent in 'c1'"):
        merge(MergingConfig(), pair, writer(tmp_path / "out"))
    merge(MergingConfig(allow=("contract.json",)), pair, writer(tmp_path / "one"))
    assert read(tmp_path / "one/contract.json")["max_query_tokens"] == first


def test_allowing_one_thing_allows_no_other(pair, tmp_path):
    other_rotation(pair["c1"])
    other_cutting_side(pair["c1"])
    for allowed in ("tokenizer_config.json", "config.json:rope", "config.json:rope_parameters.rope_type"):
        with pytest.raises(DataError, match=r"rope_theta"):
            merge(MergingConfig(allow=(allowed,)), pair, writer(tmp_path / "out"))
    with pytest.raises(DataError, match="truncation_side"):
        merge(MergingConfig(allow=("config.json",)), pair, writer(tmp_path / "out"))
    tensors = weights(pair["c1"])
    save_file({**tensors, "norm.weight": torch.ones(5)}, pair["c1"] / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=r"norm\.weight' is \[32\]"
    ):  # what cannot be computed cannot be allowed
        merge(MergingConfig(allow=("config.json", "tokenizer_config.json")), pair, writer(tmp_path / "out"))


def test_a_base_with_another_vocabulary_is_refused(pair, tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    content = read(base / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json model\.vocab\.! is 3 in 'c0', but 4 in 'the base'"):
        merge(TIES, pair, writer(tmp_path / "out"), base)


def test_nothing_allowed_leaves_older_fingerprints_valid():
    assert "allow" not in MergingConfig().model_dump(mode="json")
    assert MergingConfig(allow=("base",)).model_dump(mode="json")["allow"] == ["base"]
