"""Several training runs: what their artefacts depend on, and runs side by side (``train_build.py``)."""

import threading
from pathlib import Path

import pytest

from embedloom.errors import StageError
from embedloom.pipeline.commands import load
from embedloom.pipeline.graph import fingerprints, graph
from embedloom.pipeline.nodes import build_chains

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart_llama.yaml"
STAGES = ["training/a/one", "training/a/two", "training/b/one", "training/b/two"]


def prints(*overrides):
    run = load(QUICKSTART, "local", ROOT / "cluster" / "cluster.yaml", list(overrides))
    return {name: value for name, value in fingerprints(graph(run)).items() if name.startswith("training/")}


def test_a_change_of_one_run_rebuilds_that_run_from_the_changed_stage_on():
    before = prints()
    changed = prints("training.runs.1.stages={finetune: {learning_rate: 1.0e-4}}")
    assert [name for name in before if before[name] != changed[name]] == ["training/beta/finetune"]
    added = prints("training.runs=[{name: alpha, seed: 1}, {name: gamma, seed: 3}]")
    assert added["training/alpha/finetune"] == before["training/alpha/finetune"]
    assert [
        name for name in before if name.startswith("training/beta")
    ] and "training/beta/finetune" not in added
    hotter = prints("training.runs.0.temperature=0.05")
    assert hotter["training/beta/finetune"] == before["training/beta/finetune"]
    assert hotter["training/alpha/pretrain"] != before["training/alpha/pretrain"]


def test_a_change_that_changes_nothing_rebuilds_nothing():
    same = prints("training.runs.0.temperature=0.02", "training.runs.0.stages={finetune: {negatives: 4}}")
    assert same == prints()


def test_one_group_trains_run_after_run():
    built = []
    build_chains(STAGES, 1, built.append)
    assert built == STAGES


def test_two_groups_train_at_once_and_each_run_in_order():
    both = threading.Barrier(2, timeout=20)  # passes only when two runs are at the same stage together
    built = []

    def build(name):
        both.wait()
        built.append(name)

    build_chains(STAGES, 2, build)
    assert sorted(built) == STAGES
    for run in "ab":
        assert [name for name in built if f"/{run}/" in name] == [
            f"training/{run}/one",
            f"training/{run}/two",
        ]


def test_a_failed_run_ends_alone_and_is_told():
    built = []

    def build(name):
        if name == "training/a/one":
            raise StageError("a lost its worker")
        built.append(name)

    with pytest.raises(StageError, match="a lost its worker"):
        build_chains(STAGES, 2, build)
    assert built == ["training/b/one", "training/b/two"]
