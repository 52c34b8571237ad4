"""What a training stage depends on: its own sources, and mined examples only where it uses them."""

import json
from pathlib import Path

import pytest

from embedloom.config.run import load_run
from embedloom.errors import ConfigError
from embedloom.pipeline.commands import load
from embedloom.pipeline.graph import fingerprints, graph

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart_llama.yaml"


def sources_of(*paths):
    listed = [{"name": p.stem, "format": "flagembedding", "path": str(p)} for p in paths]
    return f"training.stages.0.sources={json.dumps(listed)}"


def fingerprint_of(overrides, name="training/alpha/pretrain"):
    run = load(QUICKSTART, "local", ROOT / "cluster" / "cluster.yaml", overrides)
    nodes = graph(run)
    return nodes[name].inputs, fingerprints(nodes)[name]


def test_a_stage_with_its_own_sources_does_without_mining(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    inputs, before = fingerprint_of([sources_of(path)])
    assert inputs == ("encoder",)
    assert fingerprint_of([sources_of(path), "mining.top_k=50"])[1] == before
    path.write_text("{} ")
    assert fingerprint_of([sources_of(path)])[1] != before


def test_mined_examples_may_be_one_source_among_others():
    mined = 'training.stages.0.sources=[{"name": "own", "format": "mined"}]'
    assert fingerprint_of([mined])[0] == ("examples", "encoder")
    assert fingerprint_of([])[0] == ("examples", "encoder")


def test_a_run_can_be_planned_away_from_its_data(tmp_path):
    path = tmp_path / "later.jsonl"
    absent = fingerprint_of([sources_of(path)])[1]
    path.write_text("{}")
    assert fingerprint_of([sources_of(path)])[1] != absent


def test_negatives_are_bounded_by_mining_only_where_mined_examples_are_used(tmp_path):
    both = ["training.stages.0.negatives=7", "training.stages.1.negatives=4"]
    with pytest.raises(ConfigError, match="use up to 7 negatives"):
        load_run(QUICKSTART, both)
    assert load_run(QUICKSTART, [*both, sources_of(tmp_path / "a.jsonl")])


def test_an_unknown_key_of_a_source_is_named():
    wrong = 'training.stages.0.sources=[{"name": "own", "format": "mined", "wieght": 1}]'
    with pytest.raises(
        ConfigError, match=r"sources\.0\.wieght: unknown key; the nearest valid key is 'weight'"
    ):
        load_run(QUICKSTART, [wrong])


def test_dev_tasks_are_part_of_what_a_stage_depends_on_and_watching_is_not(tmp_path):
    inputs, before = fingerprint_of([])
    watched = ["training.trackers=[]", "training.parity=[embedloom]", "training.checkpoints_kept=5"]
    assert fingerprint_of(watched) == (inputs, before)
    heldout, scored = fingerprint_of(["training.dev={}"])
    assert heldout == ("examples", "encoder", "corpus") and scored != before
    path = tmp_path / "queries.jsonl"
    path.write_text("{}")
    beir = f"training.dev={{tasks: [{{name: b, kind: beir, path: '{tmp_path}', split: dev}}]}}"
    own, first = fingerprint_of([beir])
    assert own == inputs
    path.write_text("{} ")
    assert fingerprint_of([beir])[1] != first
