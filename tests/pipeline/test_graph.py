"""The whole spine with tiny real models: every artefact, then a second run that builds nothing."""

import json
from pathlib import Path

import pytest
import yaml

from embedloom.errors import DataError
from embedloom.pipeline.commands import execute, load
from embedloom.pipeline.graph import build_missing, fingerprints, finished, graph, missing, writer_for
from embedloom.pipeline.preflight import preflight
from fakes_mining import make_tiny_cross_encoder
from fakes_pipeline import write_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster" / "cluster.yaml"


@pytest.mark.ray
def test_the_whole_run_then_nothing_left_to_build(ray_local, tiny_llama, tiny_model, tmp_path):
    run = load(write_config(tmp_path, tiny_llama, tiny_model), "local", CLUSTER, [])
    built = build_missing(run)
    assert built == [
        "corpus",
        "encoder",
        "mining",
        "examples",
        "training/alpha/pretrain",
        "training/beta/pretrain",
        "merged",
        "evaluation",
        "gate",
        "vectors",
    ]
    nodes = graph(run)
    assert {name: artefact.fingerprint for name, artefact in finished(run, nodes).items()} == fingerprints(
        nodes
    )
    assert missing(run, nodes, None) == []

    last_line = execute(run, None, dry_run=False).splitlines()[-1]
    assert Path(last_line).name == "report.html"
    summary = run.place.read_json("summary.json")
    assert set(summary["scores"]["candidates"]) == {"alpha", "beta"}
    for scores in (
        summary["scores"]["base"],
        summary["scores"]["merged"],
        *summary["scores"]["candidates"].values(),
    ):
        assert 0 <= scores["heldout"] <= 1
    low, high = summary["scores"]["intervals"]["models"]["merged"]["heldout"]
    assert low <= summary["scores"]["merged"]["heldout"] <= high
    verdict = json.loads((run.place.child("merged").local / "gate.json").read_text())
    assert verdict == summary["gate"]
    assert verdict["candidate"] == "merged" and verdict["against"] == "base"
    vectors = run.place.child("vectors")
    rows = vectors.read_tables("vectors").num_rows
    assert rows == finished(run, nodes)["corpus"].counts["rows"]

    changed = load(tmp_path / "smoke.yaml", "local", CLUSTER, ["merging.weights=[3, 1]"])
    assert missing(changed, graph(changed), None) == ["merged", "evaluation", "gate", "vectors"]


def test_a_stage_without_its_inputs_says_which_command_builds_them(tiny_llama, tiny_model, tmp_path):
    run = load(write_config(tmp_path, tiny_llama, tiny_model), "local", CLUSTER, [])
    with pytest.raises(
        DataError, match="examples: missing or built from another config; run `embedloom mine` first"
    ):
        execute(run, "train", dry_run=False)


def test_dry_run_starts_and_writes_nothing(tiny_llama, tiny_model, tmp_path):
    run = load(write_config(tmp_path, tiny_llama, tiny_model), "local", CLUSTER, [])
    plan = execute(run, None, dry_run=True)
    assert "0 of 10 artefacts finished" in plan
    assert not (tmp_path / "runs").exists()


def test_vectors_of_gpus_are_other_artefacts_and_those_of_cpus_what_they_were(
    tiny_llama, tiny_model, tmp_path
):
    config = write_config(tmp_path, tiny_llama, tiny_model)

    def known(profile, *overrides):
        return fingerprints(graph(load(config, profile, CLUSTER, list(overrides))))

    on_cpu, on_gpu = known("local"), known("h100x1")
    assert {name for name in on_cpu if on_cpu[name] != on_gpu[name]} == {"vectors"}
    assert known("h100x1", "embedding.compute_dtype=float32") == on_cpu
    assert known("local", "embedding.compute_dtype=bfloat16") == on_gpu


def test_other_rescoring_needs_no_other_mining(tiny_llama, tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_llama, tiny_model)
    cross = make_tiny_cross_encoder(tmp_path / "cross")

    def known(*overrides):
        run = load(config, "local", CLUSTER, list(overrides))
        return fingerprints(graph(run))

    without = known()
    with_ten = known(f"mining.rescoring={{model: {cross}, top: 10}}")
    with_five = known(f"mining.rescoring={{model: {cross}, top: 5}}")
    assert list(with_ten) == [*list(without)[:3], "rescoring", *list(without)[3:]]
    assert without["mining"] == with_ten["mining"] == with_five["mining"]
    assert len({one["examples"] for one in (without, with_ten, with_five)}) == 3
    assert with_ten["rescoring"] != with_five["rescoring"]
    make_tiny_cross_encoder(cross, seed=1)
    assert known(f"mining.rescoring={{model: {cross}, top: 10}}")["rescoring"] != with_ten["rescoring"]
    other_rules = known(f"mining.rescoring={{model: {cross}, top: 5}}", "mining.selection.margin_ratio=0.9")
    assert other_rules["rescoring"] == known(f"mining.rescoring={{model: {cross}, top: 5}}")["rescoring"]
    assert other_rules["examples"] != with_five["examples"]

    run = load(config, "local", CLUSTER, [f"mining.rescoring={{model: {cross}, top: 10}}"])
    assert f"{cross}, best 10" in execute(run, None, dry_run=True)
    run = load(config, "local", CLUSTER, ["mining.rescoring={model: ./nowhere, top: 10}"])
    with pytest.raises(DataError, match=r"mining\.rescoring\.model: './nowhere' does not exist"):
        preflight(run, {"mine"})


@pytest.mark.parametrize("begun", [False, True])
def test_a_stage_keeps_its_name_under_other_settings_that_decide_rounding_only(
    begun, tiny_llama, tiny_model, tmp_path
):
    """Another micro-batch, recomputation or ZeRO stage, in the section or in the stage: finished ones stay, begun ones go on."""
    path = write_config(tmp_path, tiny_llama, tiny_model)
    run, name = load(path, "local", CLUSTER, []), "training/alpha/pretrain"
    nodes = graph(run)
    before = fingerprints(nodes)
    made_from = {parent: before[parent] for parent in nodes[name].inputs}
    writer = writer_for(run, nodes, name, made_from)
    if not begun:
        writer.commit({"rows": 1})
    changes = [
        "training.micro_batch_tokens=512",
        "training.zero_stage=2",
        "training.gradient_checkpointing=2",
    ]
    other = load(path, "local", CLUSTER, changes)
    after = fingerprints(graph(other))
    assert after[name] == before[name]
    assert after["training/beta/pretrain"] != before["training/beta/pretrain"]  # nothing is there to keep
    assert (name in finished(other, graph(other))) is not begun
    assert writer_for(other, graph(other), name, made_from).resumed is begun
    hotter = graph(load(path, "local", CLUSTER, [*changes, "training.temperature=0.5"]))
    assert fingerprints(hotter)[name] != before[name]


def test_recomputation_of_one_stage_is_in_no_fingerprint(tiny_llama, tiny_model, tmp_path):
    path = write_config(tmp_path, tiny_llama, tiny_model)
    before = fingerprints(graph(load(path, "local", CLUSTER, [])))
    content = yaml.safe_load(path.read_text())
    content["training"]["stages"][0]["gradient_checkpointing"] = 2
    path.write_text(yaml.safe_dump(content))
    assert fingerprints(graph(load(path, "local", CLUSTER, []))) == before
