"""diff and replay: what differs between runs, what is stale in one, and why."""

import pytest

from embedloom.config.run import read_run_file, write_run_file
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.pipeline.commands import reopen
from embedloom.pipeline.graph import fingerprints, graph, state_lines, states
from embedloom.pipeline.lineage import diff
from fakes_quickstart import CLUSTER, finish, quickstart
from fakes_run import SCORES, begin, make_run


def test_a_stored_run_is_the_same_run_when_opened_again(tmp_path):
    run = quickstart(tmp_path)
    write_run_file(run)
    again = reopen(run.place.uri, CLUSTER, None)
    assert again.config == run.config and again.profile_name == "local"
    assert fingerprints(graph(again)) == fingerprints(graph(run))
    stored = read_run_file(run.place)
    assert stored["config"]["merging"] == {"method": "linear"}
    assert stored["resolved"]["merging"]["density"] == 0.5  # a default, for comparisons


def test_a_moved_run_is_opened_where_it_lies_now(tmp_path):
    run = quickstart(tmp_path / "before")
    write_run_file(run)
    (tmp_path / "before" / "quickstart").rename(tmp_path / "renamed")
    again = reopen(str(tmp_path / "renamed"), CLUSTER, None)
    assert again.place.uri == str(tmp_path / "renamed")


def test_a_folder_without_a_config_cannot_be_replayed(tmp_path):
    with pytest.raises(DataError, match=r"no run\.json, so its config is not known"):
        reopen(str(tmp_path), CLUSTER, None)
    run = quickstart(tmp_path)
    write_run_file(run)
    with pytest.raises(ConfigError, match="'nowhere' is not in the cluster config"):
        reopen(run.place.uri, CLUSTER, "nowhere")


def test_replay_finds_what_is_stale_and_why(tmp_path):
    finish(quickstart(tmp_path))
    assert {one.state for one in states(quickstart(tmp_path))} == {"finished"}
    changed = quickstart(tmp_path, "mining.selection.margin_ratio=0.9")
    changed.place.child("gate").remove()
    found = {one.name: one for one in states(changed)}
    assert [name for name, one in found.items() if one.state == "finished"] == [
        "corpus", "encoder", "synthesis", "mining",
    ]  # fmt: skip
    assert found["examples"].reason == "margin_ratio 0.95 -> 0.9"
    assert found["training/beta/pretrain"].reason == "made from another examples"
    assert found["merged"].reason == "made from another training/alpha/finetune, training/beta/finetune"
    assert found["gate"].state == "missing"
    assert state_lines(list(found.values()))[-1] == "9 of 13 artefacts to build"


def test_diff_names_settings_and_inputs_as_reasons(tmp_path):
    for name, override in (("one", "training.temperature=0.02"), ("two", "training.temperature=0.05")):
        run = quickstart(tmp_path / name, override)
        write_run_file(run)
        finish(run)
    lines = diff(
        Place(str(tmp_path / "one/quickstart")), Place(str(tmp_path / "two/quickstart"))
    ).splitlines()
    assert "    training.temperature: 0.02 -> 0.05" in lines
    assert not any("output_dir" in line for line in lines)
    reasons = {
        line.split(":")[0].strip(): line.split(": ")[-1] for line in lines if " and " in line and ": " in line
    }
    assert reasons["training/alpha/pretrain"] == "other settings"
    assert reasons["training/alpha/finetune"] == "other settings and other inputs (training/alpha/pretrain)"
    assert reasons["merged"] == "other inputs (training/alpha/finetune, training/beta/finetune)"
    assert "corpus" not in reasons and "examples" not in reasons


def test_diff_of_equal_runs_says_the_same(tmp_path):
    run = make_run(tmp_path / "one")
    text = diff(run, run)
    assert text.count("the same") == 2  # artefacts, counts
    assert "config:\n    not known:" in text
    assert "merged.heldout: 0.43219  0.43219  +0.00000" in text


def test_diff_shows_counts_and_scores_of_both_sides(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    begin(two, "mining", "mining").commit({"rows": 2, "rejects": {"short": 1}}, seconds=30)
    out = begin(two, "evaluation", "evaluation")
    models = {**SCORES["models"], "merged": {"heldout": 0.5, "folder": 0.51}}
    out.place.write_json("scores.json", {**SCORES, "models": models})
    out.commit({"rows": 6, "tokens": 999}, seconds=20)
    text = diff(one, two)
    assert "mining.rows: 1  2" in text and "mining.rejects.short: -  1" in text
    assert "merged.heldout: 0.43219  0.50000  +0.06781" in text
    assert "mining: " in text and "inputs of one side only (corpus, synthesis)" in text
