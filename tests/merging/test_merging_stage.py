"""Merging model folders: values, files, lineage, and every refusal."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedloom.config.merging import MergingConfig
from embedloom.core.prompting import PromptContract
from embedloom.core.trained_prompts import Prompt, TrainedPrompt, trained_contract
from embedloom.encoder.export import write_sidecars
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError, DataError
from fakes_merging import edit_json, merge, shard, variant, writer


@pytest.fixture
def candidates(tiny_model, tmp_path):
    return {f"c{seed}": variant(tiny_model, tmp_path / f"c{seed}", seed) for seed in range(3)}


@pytest.mark.parametrize("weights", [None, (3.0, 1.0, 0.0)])
def test_equals_the_float64_average(candidates, tmp_path, weights):
    artefact = merge(MergingConfig(weights=weights), candidates, writer(tmp_path / "out"))
    merged = load_file(tmp_path / "out/model.safetensors")
    sources = [load_file(folder / "model.safetensors") for folder in candidates.values()]
    for name, tensor in merged.items():
        expected = np.average([source[name].double().numpy() for source in sources], axis=0, weights=weights)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=2e-7, atol=1e-7)
    assert artefact.counts["models"] == 3
    assert artefact.counts["parameters"] == sum(tensor.numel() for tensor in merged.values())


def test_merged_folder_is_a_model_for_every_reader(candidates, tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    (candidates["c0"] / "metrics.jsonl").write_text("{}\n")
    merge(MergingConfig(), candidates, writer(tmp_path / "out"))
    out = tmp_path / "out"
    model, notes = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert model.dtype == torch.float32
    texts = ["read a table", "another text"]
    ours = Encoder.load(out, dtype="float32").embed(texts, "document")
    np.testing.assert_allclose(SentenceTransformer(str(out), device="cpu").encode(texts), ours, atol=1e-5)
    kept = {str(path.relative_to(candidates["c0"])) for path in candidates["c0"].rglob("*")} - {
        "metrics.jsonl"
    }
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == kept | {
        "lineage.json",
        "manifest.json",
        "README.md",
    }


def test_a_model_with_itself_is_itself(candidates, tmp_path):
    model = candidates["c1"]
    merge(
        MergingConfig(weights=(0.3, 0.5, 0.2)), {"a": model, "b": model, "c": model}, writer(tmp_path / "out")
    )
    merged, source = load_file(tmp_path / "out/model.safetensors"), load_file(model / "model.safetensors")
    assert all(torch.equal(merged[name], source[name]) for name in source)


def test_one_model_is_copied_and_counted(candidates, tmp_path):
    artefact = merge(MergingConfig(), {"only": candidates["c0"]}, writer(tmp_path / "out"))
    merged, source = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(candidates["c0"] / "model.safetensors"),
    )
    assert all(torch.equal(merged[name], source[name]) for name in source)
    assert artefact.counts["models"] == 1


def test_bfloat16_output_and_mixed_inputs(tiny_model, tmp_path):
    models = {
        "a": variant(tiny_model, tmp_path / "a", 1, torch.bfloat16),
        "b": variant(tiny_model, tmp_path / "b", 2),
    }
    merge(MergingConfig(dtype="bfloat16"), models, writer(tmp_path / "out"))
    merged = load_file(tmp_path / "out/model.safetensors")
    sources = [load_file(folder / "model.safetensors") for folder in models.values()]
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        mean = (sources[0][name].float() + sources[1][name].float()) / 2
        torch.testing.assert_close(tensor.float(), mean, rtol=2**-8, atol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_sharded_sources_and_integer_buffers(candidates, tmp_path):
    for folder in candidates.values():
        tensors = load_file(folder / "model.safetensors") | {"position_ids": torch.arange(9)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = merge(MergingConfig(), candidates, writer(tmp_path / "whole"))
    shard(candidates["c1"], 3)
    merge(MergingConfig(), candidates, writer(tmp_path / "sharded"))
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (
        tmp_path / "sharded/model.safetensors"
    ).read_bytes()
    assert whole.counts["buffers_copied"] == 1
    assert torch.equal(load_file(tmp_path / "whole/model.safetensors")["position_ids"], torch.arange(9))


def test_lineage_names_sources_and_weights(candidates, tmp_path):
    (candidates["c0"] / "manifest.json").write_text(json.dumps({"fingerprint": "f00d"}))
    artefact = merge(MergingConfig(weights=(1, 1, 2)), candidates, writer(tmp_path / "out"))
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert [(s["name"], s["weight"], s["fingerprint"]) for s in lineage["sources"]] == [
        ("c0", 0.25, "f00d"), ("c1", 0.25, None), ("c2", 0.5, None),
    ]  # fmt: skip
    assert lineage["contract_hash"] == Encoder.load(tmp_path / "out").contract.hash
    assert artefact.manifest["details"] == lineage


def test_wrong_weights_are_refused(candidates, tmp_path):
    with pytest.raises(ConfigError, match=r"2 given for 3 models \(c0, c1, c2\)"):
        merge(MergingConfig(weights=(1, 1)), candidates, writer(tmp_path / "out"))
    with pytest.raises(ConfigError, match="their sum positive"):
        merge(MergingConfig(weights=(0, 0, 0)), candidates, writer(tmp_path / "out"))
    with pytest.raises(ConfigError, match="no model to merge"):
        merge(MergingConfig(), {}, writer(tmp_path / "out"))


def as_trained(folder, *rows):
    """The folder with the contract of a model trained on (instruction, name, queries) of retrieval each."""
    trained = [TrainedPrompt(Prompt("retrieval", text, ""), name, queries) for text, name, queries in rows]
    contract = trained_contract(PromptContract.load(folder), trained, sum(one.queries for one in trained))
    write_sidecars(folder, contract, 32)


def test_models_of_two_mixes_merge_into_one_with_all_tasks(candidates, tmp_path):
    """FIND 0.5 x 0.9 + 0.25 x 0.2 + 0.25 x 0 = 0.5; FAQ 0.05 + 0.2 + 0.25 = 0.5: equal, so the first by name."""
    as_trained(candidates["c0"], ("Find", "docs", 9.0), ("Answer", "faq", 1.0))
    as_trained(candidates["c1"], ("Find", "docs", 2.0), ("Answer", "faq", 8.0))
    as_trained(candidates["c2"], ("Answer", "faq", 1.0))
    config = MergingConfig(weights=(2, 1, 1))
    merge(config, candidates, writer(tmp_path / "out"))
    contract = PromptContract.load(tmp_path / "out")
    assert contract.instructions["retrieval"] == "Find"
    assert {name: task.share for name, task in contract.tasks.items()} == {"docs": 0.5, "faq": 0.5}
    prompts = json.loads((tmp_path / "out/config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == "Instruct: Find\nQuery: " and prompts["faq"] == "Instruct: Answer\nQuery: "
    assert "| faq | retrieval | Answer |" in (tmp_path / "out/README.md").read_text()
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert lineage["contract_hash"] == contract.hash
    merge(config, candidates, writer(tmp_path / "chosen"), default_task="faq")
    assert PromptContract.load(tmp_path / "chosen").instructions["retrieval"] == "Answer"
    with pytest.raises(DataError, match=r"serving.default_task: 'fax' is unknown; allowed: .*'docs', 'faq'"):
        merge(config, candidates, writer(tmp_path / "wrong"), default_task="fax")


def break_config(folder):
    edit_json(folder / "config.json", num_attention_heads=2)


def break_contract(folder):
    contract = json.loads((folder / "contract.json").read_text())
    contract.pop("hash")
    (folder / "contract.json").write_text(json.dumps({**contract, "max_query_tokens": 32}))


def break_tokenizer(folder):
    edit_json(folder / "tokenizer_config.json", padding_side="left")


def break_vocabulary(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["<odd>"] = 259
    (folder / "tokenizer.json").write_text(json.dumps(content))


def drop_pooling(folder):
    (folder / "1_Pooling/config.json").unlink()


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("norm.weight")
    save_file(tensors, folder / "model.safetensors")


def reshape_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors")


def poison_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def add_dense(folder):
    (folder / "3_Dense").mkdir()
    save_file({"w": torch.ones(1)}, folder / "3_Dense/model.safetensors")


def drop_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_config, "config.json num_attention_heads is 4 in 'c0', but 2 in 'c2'"),
        (break_contract, "contract.json max_query_tokens is 128 in 'c0', but 32 in 'c2'"),
        (break_tokenizer, "tokenizer_config.json padding_side is 'right' in 'c0', but 'left' in 'c2'"),
        (break_vocabulary, "tokenizer.json model.vocab.<odd> is absent in 'c0', but 259 in 'c2'"),
        (drop_pooling, "1_Pooling/config.json is present in 'c0', but absent in 'c2'"),
        (drop_tensor, "tensor 'norm.weight' is in 'c0', but not in 'c2'"),
        (reshape_tensor, r"tensor 'norm.weight' is \[32\] in 'c0', but \[5\] in 'c2'"),
        (add_dense, "weights outside the backbone"),
        (drop_config, "no config.json"),
    ],
)
def test_unlike_models_are_refused_before_anything_is_written(candidates, tmp_path, change, message):
    change(candidates["c2"])
    out = writer(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        merge(MergingConfig(), candidates, out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_building.json"]


def test_values_that_cannot_be_averaged_are_named(candidates, tmp_path):
    poison_tensor(candidates["c1"])
    with pytest.raises(DataError, match=r"'norm\.weight' is not finite in 'c1'"):
        merge(MergingConfig(), candidates, writer(tmp_path / "out"))
    assert not (tmp_path / "out/manifest.json").exists()
    for name in ("c0", "c2"):
        tensors = load_file(candidates[name] / "model.safetensors") | {
            "ids": torch.tensor([len(name), int(name[1])])
        }
        save_file(tensors, candidates[name] / "model.safetensors")
    with pytest.raises(DataError, match="'ids' holds integers that differ between 'c0' and 'c2'"):
        merge(MergingConfig(), {name: candidates[name] for name in ("c0", "c2")}, writer(tmp_path / "out2"))
