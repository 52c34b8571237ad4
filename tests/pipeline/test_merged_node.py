"""The merged node of a run: what it depends on, and the scorer that a search is handed."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.config.merging import MergingConfig
from embedloom.core.artefacts import Artefact
from embedloom.core.storage import Place
from embedloom.merging import search, stage
from embedloom.pipeline import nodes
from fakes_evaluation import make_corpus
from fakes_merging import variant, writer


def config_of(**merging):
    return SimpleNamespace(
        merging=MergingConfig(**merging), encoder=SimpleNamespace(dtype="float32", base="tiny-base")
    )


def test_the_node_reads_what_its_method_and_search_need():
    trained = ["training/a/finetune", "training/b/finetune"]
    assert nodes.merged_node(config_of(), trained)[1] == tuple(trained)
    assert nodes.merged_node(config_of(method="ties"), trained)[1] == (*trained, "encoder")
    settings, inputs = nodes.merged_node(config_of(search={"kind": "greedy_soup"}), trained)
    assert inputs == (*trained, "corpus")
    assert settings[1] == "float32"


@pytest.fixture
def scorers(monkeypatch):
    """A scorer of evaluation that likes the candidate b, in place of the real one."""
    made = []

    class Scorer:
        def __init__(self, tasks, corpus, pool, place, dtype):
            self.tasks, self.corpus, self.place, self.calls = tasks, corpus, place, []
            made.append(self)

        def __enter__(self):
            self.place.write_json("cache.json", {})
            return self

        def __exit__(self, *_):
            return None

        def __call__(self, name, folder):
            self.calls.append(name)
            value = 1.0 if "training/b" in str(folder) else 0.5
            return {"dev": value}, {"dev": {f"dev/default/{number}": value for number in range(20)}}

    module = ModuleType("embedloom.evaluation.dev")
    module.DevScorer = Scorer
    monkeypatch.setitem(sys.modules, "embedloom.evaluation.dev", module)
    return made


def test_a_search_decides_the_weights_and_is_not_done_twice(scorers, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "write_with_ray", lambda plan, files, place, _, progress: stage.write_here(
        plan, files, place, 1, progress))  # fmt: skip
    inputs = {"corpus": Artefact(Place(str(tmp_path / "corpus")), {})}
    for seed, name in enumerate("ab"):
        (tmp_path / "training" / name).mkdir(parents=True)
        folder = variant(tiny_model, tmp_path / "training" / name / "finetune", seed)
        inputs[f"training/{name}/finetune"] = Artefact(Place(str(folder)), {})
    resources = SimpleNamespace(evaluation=PoolConfig(), merging=PoolConfig())
    config, out = config_of(search={"kind": "greedy_soup"}), tmp_path / "merged"

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed between the search and the merge
        patch.setattr(stage, "write_weights", fail)
        with pytest.raises(KeyboardInterrupt):
            nodes.build_merged(config, resources, inputs, writer(out))
    assert len(scorers) == 1
    assert (out / search.SEARCH_FILE).is_file()
    assert scorers[0].corpus is inputs["corpus"]
    assert [task.name for task in scorers[0].tasks] == ["dev"]
    done = nodes.build_merged(config, resources, inputs, writer(out))
    assert len(scorers) == 1  # search.json was there
    details = done.manifest["details"]
    assert [(s["name"], s["weight"]) for s in details["sources"]] == [("a", 0.0), ("b", 1.0)]
    assert details["search"]["kept"] == [0.0, 1.0]
    assert not (out / "_scores").exists() and not (out / "search").exists()
    assert "base_model: tiny-base" in (out / "README.md").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_on_the_real_scorer(ray_local, tiny_model, tmp_path):
    inputs = {"corpus": make_corpus(tmp_path / "corpus", split="dev")}
    for seed, name in enumerate("ab"):
        (tmp_path / "training" / name).mkdir(parents=True)
        folder = variant(tiny_model, tmp_path / "training" / name / "finetune", seed)
        inputs[f"training/{name}/finetune"] = Artefact(Place(str(folder)), {})
    resources = SimpleNamespace(evaluation=PoolConfig(cpus=1), merging=PoolConfig(cpus=1))
    out = tmp_path / "merged"
    done = nodes.build_merged(config_of(search={"kind": "greedy_soup"}), resources, inputs, writer(out))
    found = done.place.read_json(search.SEARCH_FILE)
    scores = {tuple(row["weights"]): row for row in found["trials"]}
    assert {(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)} <= set(scores)
    assert all(0 <= row[part] <= 1 for row in scores.values() for part in ("dev", "check"))
    best = max(scores.values(), key=lambda row: row["dev"])
    assert scores[tuple(found["chosen"])]["dev"] == best["dev"]
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "README.md", "manifest.json"}
    assert not (out / "search").exists() and not (out / "_scores").exists()
