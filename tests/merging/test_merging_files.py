"""Files of a merge: cut, resumed after a kill, spread over Ray, in an object store; cards, layers and origins."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from embedloom.config.cluster import PoolConfig
from embedloom.config.merging import MergingConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.merging import stage
from embedloom.merging import tensors as layout
from embedloom.merging import writer as writing
from fakes_merging import edit_json, merge, shard, variant, writer

WEIGHTS = "model.safetensors"


@pytest.fixture
def candidates(tiny_model, tmp_path):
    return {f"c{seed}": variant(tiny_model, tmp_path / f"c{seed}", seed) for seed in range(3)}


@pytest.fixture
def small_files(monkeypatch):
    """Weight files of at most 20 kB, so that the tiny model has several."""
    monkeypatch.setattr("embedloom.merging.plan._MIB", 20_000)
    return MergingConfig(file_mib=1)


def weights_of(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_cutting_files_and_threads_change_no_value(candidates, tmp_path, small_files):
    merge(MergingConfig(), candidates, writer(tmp_path / "one"))
    cut = merge(small_files, candidates, writer(tmp_path / "cut"), threads=3)
    assert cut.counts["weight_files"] == len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 2
    assert same(weights_of(tmp_path / "one"), weights_of(tmp_path / "cut"))
    from transformers import AutoModel

    _, notes = AutoModel.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]


@pytest.mark.ray
def test_ray_tasks_write_the_same_bytes_and_bring_errors_back(ray_local, candidates, tmp_path, small_files):
    merge(small_files, candidates, writer(tmp_path / "here"))
    merge(small_files, candidates, writer(tmp_path / "tasks"), pool=PoolConfig(max_actors=3, cpus=1))
    files = sorted(path.name for path in (tmp_path / "here").glob("model*"))
    for name in files:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "tasks" / name).read_bytes()
    tensors = load_file(candidates["c1"] / WEIGHTS)
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, candidates["c1"] / WEIGHTS)
    with pytest.raises(DataError, match=r"'norm\.weight' is not finite in 'c1'"):
        merge(small_files, candidates, writer(tmp_path / "bad"), pool=PoolConfig(max_actors=2))


KILLED = """
import sys, time
from embedloom.core.artefacts import ArtefactWriter
from embedloom.config.merging import MergingConfig
from embedloom.merging import plan, stage, writer
from embedloom.core.storage import Place
plan._MIB = 20_000
folders, out = sys.argv[1:-1], sys.argv[-1]
put = writer._put
def slow(*arguments):
    time.sleep(0.02)
    return put(*arguments)
writer._put = slow
stage.merge(MergingConfig(file_mib=1), {f"c{n}": Place(f) for n, f in enumerate(folders)}, None,
            ArtefactWriter(Place(out), "model", "config", {}, "local"))
"""


def test_a_killed_merge_goes_on_with_its_whole_files(candidates, tmp_path, small_files, monkeypatch):
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, *map(str, candidates.values()), str(out)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob("model-*"))) < 2 or not list(out.glob("_tmp-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("model-*")}
    assert not (out / "manifest.json").exists()
    written = []
    write_file = writing.write_file
    monkeypatch.setattr(
        "embedloom.merging.writer.write_file",
        lambda plan, file, *rest: (written.append(file.name), write_file(plan, file, *rest)),
    )
    again = writer(out)
    assert again.resumed
    done = merge(small_files, candidates, again)
    assert not set(written) & set(whole)
    assert len(written) + len(whole) == done.counts["weight_files"]
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in whole.items())
    assert not list(out.glob("_tmp-*"))
    merge(small_files, candidates, writer(tmp_path / "straight"))
    assert same(weights_of(out), weights_of(tmp_path / "straight"))


def test_object_stores_are_read_and_written(candidates, tmp_path, small_files):
    store = fsspec.filesystem("memory")
    for name, folder in candidates.items():
        shard(folder, 3) if name == "c1" else None
        store.put(f"{folder}/", f"/merging/{name}", recursive=True)
    places = {name: Place(f"memory://merging/{name}") for name in candidates}
    out = ArtefactWriter(Place("memory://merging/out"), "model", "config", {}, "local")
    stage.merge(small_files, places, None, out)
    store.get("/merging/out", str(tmp_path / "fetched"), recursive=True)
    store.rm("/merging", recursive=True)
    merge(small_files, candidates, writer(tmp_path / "local"))
    assert same(weights_of(tmp_path / "fetched"), weights_of(tmp_path / "local"))
    for name in ("config.json", "contract.json", "modules.json", "1_Pooling/config.json", "manifest.json"):
        assert (tmp_path / "fetched" / name).is_file()


def test_rules_give_layers_and_tensors_their_own_weights(candidates, tmp_path):
    config = MergingConfig(
        weights=(1, 1, 1),
        layers=[{"tensors": "*.mlp.*", "weights": (1, 0, 0)}, {"layers": (1, 1), "weights": (0, 3, 1)}],
    )
    merge(config, candidates, writer(tmp_path / "out"))
    merged = load_file(tmp_path / "out" / WEIGHTS)
    sources = [load_file(folder / WEIGHTS) for folder in candidates.values()]
    for name, tensor in merged.items():
        shares = (1, 0, 0) if ".mlp." in name else (0, 3, 1) if name.startswith("layers.1.") else (1, 1, 1)
        expected = np.average([source[name].double().numpy() for source in sources], axis=0, weights=shares)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=2e-7, atol=1e-7)
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert lineage["layers"][1] == {"layers": [1, 1], "weights": [0, 3, 1]}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": (2, 9), "weights": (1, 1, 1)}, r"layers\.0: layers \[2, 9\] match no tensor; the models have layers 0 to 1"),
        ({"tensors": "*.attention.*", "weights": (1, 1, 1)}, r"layers\.0: tensors '\*\.attention\.\*' match no tensor"),
        ({"layers": (0, 1), "weights": (1, 1)}, r"layers\.0\.weights: 2 given for 3 models"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_refused(candidates, tmp_path, rule, message):
    with pytest.raises(ConfigError, match=message):
        merge(MergingConfig(layers=[rule]), candidates, writer(tmp_path / "out"))


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (MergingConfig(method="slerp"), 3, r"3 models given \(c0, c1, c2\); method slerp takes exactly 2"),
        (MergingConfig(method="karcher"), 1, "1 models given .* method karcher takes at least 2"),
        (MergingConfig(method="ties"), 3, "method ties needs the base that the models were trained from"),
        (MergingConfig(method="karcher", weights=(1, -1)), 2, "each must be 0 or more"),
    ],
)
def test_models_a_method_cannot_take_are_refused(candidates, tmp_path, config, count, message):
    models = dict(list(candidates.items())[:count])
    with pytest.raises(ConfigError, match=message):
        merge(config, models, writer(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_building.json"]


def test_task_vectors_start_at_the_base(candidates, tiny_model, tmp_path):
    merge(MergingConfig(method="ties", density=0.4), candidates, writer(tmp_path / "ties"), tiny_model)
    merged, base = load_file(tmp_path / "ties" / WEIGHTS), load_file(tiny_model / WEIGHTS)
    models = [load_file(folder / WEIGHTS) for folder in candidates.values()]
    stacked = torch.stack([model["norm.weight"] - base["norm.weight"] for model in models])
    low, high = stacked.clamp(max=0).min(0).values, stacked.clamp(min=0).max(0).values
    moved = merged["norm.weight"] - base["norm.weight"]
    assert ((moved >= low - 1e-6) & (moved <= high + 1e-6)).all()
    lineage = json.loads((tmp_path / "ties/lineage.json").read_text())
    assert (lineage["method"], lineage["density"]) == ("ties", 0.4)


def test_a_base_of_another_kind_is_refused(candidates, tiny_model, tmp_path):
    base = variant(tiny_model, tmp_path / "odd", 9)
    edit_json(base / "config.json", num_attention_heads=2)
    with pytest.raises(
        DataError, match=r"config\.json num_attention_heads is 4 in 'c0', but 2 in 'the base'"
    ):
        merge(MergingConfig(method="ties"), candidates, writer(tmp_path / "out"), base)


def test_models_of_different_bases_are_refused(candidates, tmp_path):
    for name, base in (("c0", "meta/llama"), ("c2", "other/llama")):
        (candidates[name] / "README.md").write_text(f"---\nbase_model: {base}\n---\n# a model\n")
    with pytest.raises(
        DataError, match="'c0' was trained from base_model 'meta/llama', but 'c2' from 'other/llama'"
    ):
        merge(MergingConfig(), candidates, writer(tmp_path / "out"))


def test_artefacts_of_different_bases_are_refused(candidates, tmp_path):
    for name, base in (("c0", "base1"), ("c1", "base1"), ("c2", "base2")):
        stages = tmp_path / "run" / "training" / name
        stages.mkdir(parents=True)
        candidates[name] = candidates[name].rename(stages / "finetune")
        (stages / "pretrain").mkdir()
        manifests = {
            "pretrain": {"encoder": base},
            "finetune": {f"training/{name}/pretrain": f"pretrain-{name}"},
        }
        for part, inputs in manifests.items():
            content = {"fingerprint": f"{part}-{name}", "inputs": {"examples": "e", **inputs}}
            (stages / part / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="'c0' was trained from artefact 'base1', but 'c2' from 'base2'"):
        merge(MergingConfig(), candidates, writer(tmp_path / "out"))
    del candidates["c2"]
    merge(MergingConfig(), candidates, writer(tmp_path / "out"))
    assert json.loads((tmp_path / "out/lineage.json").read_text())["base"] == "base1"


def test_the_merged_data_card_is_that_of_all_models_equal_ones_once(candidates, tmp_path):
    merge(MergingConfig(), candidates, writer(tmp_path / "without"))
    assert not (tmp_path / "without/data_card.md").exists()
    for name, folder in candidates.items():
        source = "paq" if name == "c1" else "msmarco"
        (folder / "data_card.md").write_text(f"# Training data\n\n## Stage s\n\n| {source} |\n")
    merge(MergingConfig(), candidates, writer(tmp_path / "out"))
    card = (tmp_path / "out/data_card.md").read_text()
    assert card.count("| msmarco |") == 1 and card.count("| paq |") == 1
    assert re.findall(r"^# (.*)$", card, re.M) == ["Trained as c0, c2", "Trained as c1"]
    assert card.count("\n### Stage s\n") == 2


def test_the_model_card_says_who_reads_the_merged_model(candidates, tmp_path):
    """Nobody is asked. That vLLM and TEI read a bidirectional Llama with mean pooling as it is, vLLM's own export test shows."""
    merge(MergingConfig(), candidates, writer(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    table = [
        line.split("|")[1:3] for line in card.split("## Readers")[1].splitlines() if line.startswith("|")
    ]
    found = {reader.strip(): vectors.strip() for reader, vectors in table[2:]}
    names = ("embedloom", "transformers", "sentence-transformers", "vllm", "tei")
    assert found == dict.fromkeys(names, "expected the same")
    for folder in candidates.values():  # foreign models: how they pool is not known
        (folder / "contract.json").unlink()
    merge(MergingConfig(), candidates, writer(tmp_path / "foreign"))
    assert "## Readers" not in (tmp_path / "foreign/README.md").read_text()


def test_the_model_card_says_what_was_merged(candidates, tmp_path):
    for folder in candidates.values():
        header = {"license": "mit", "datasets": ["org/pairs"], "base_model": "org/base"}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n# a candidate\n")
    merge(MergingConfig(weights=(2, 1, 1)), candidates, writer(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "sentence-transformers"
    assert (header["base_model"], header["license"], header["datasets"]) == ("org/base", "mit", ["org/pairs"])
    assert re.search(r"\| c0 \| 0\.5 \|", card)
    merge(MergingConfig(), candidates, writer(tmp_path / "named"), base_model="smollm2")
    assert (
        yaml.safe_load((tmp_path / "named/README.md").read_text().split("---")[1])["base_model"] == "smollm2"
    )


def test_weights_of_other_formats_are_not_carried_over(candidates, tmp_path):
    for folder in candidates.values():
        (folder / "onnx").mkdir()
        (folder / "openvino").mkdir()
        for name in ("onnx/model.onnx", "openvino/openvino_model.bin", "openvino/openvino_model.xml", "tf_model.h5",
                     "pytorch_model.bin.index.json", "search.json", "gate.json", "int8.json"):  # fmt: skip
            (folder / name).write_text("of one model only")
    merge(MergingConfig(), candidates, writer(tmp_path / "out"))
    carried = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert not {
        name for name in carried if "onnx" in name or "openvino" in name or name.startswith(("tf", "pytorch"))
    }
    assert not carried & {"search.json", "gate.json", "int8.json"}


def test_a_value_too_large_for_the_written_type_is_named(candidates, tmp_path):
    for folder in candidates.values():
        tensors = load_file(folder / WEIGHTS)
        tensors["norm.weight"][0] = 1e6
        save_file(tensors, folder / WEIGHTS)
    with pytest.raises(DataError, match=r"'norm\.weight' is not finite in the merged model in float16"):
        merge(MergingConfig(dtype="float16"), candidates, writer(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_layout_is_decided_by_the_config_alone():
    infos = [layout.TensorInfo(f"t{n}", torch.float32, (1000,)) for n in range(10)]
    sizes = [len(file.infos) for file in layout.weight_files(infos, 12_000)]
    assert sizes == [3, 3, 3, 1]
