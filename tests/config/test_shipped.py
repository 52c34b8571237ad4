"""Which file a CONFIG argument and ``--cluster`` mean, from a checkout and from an empty folder."""

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.config.shipped import (
    CLUSTER_ORDER,
    SHIPPED_CLUSTER,
    cluster_file,
    config_file,
    names_config,
    shipped_configs,
)
from embedloom.errors import ConfigError
from embedloom.pipeline.model_commands import load_machine

ROOT = Path(__file__).parents[2]


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def test_what_ships_is_what_the_repository_shows():
    configs = {path.name: path.read_bytes() for path in (ROOT / "jobs/configs").glob("*.yaml")}
    assert configs == {path.name: path.read_bytes() for path in shipped_configs().values()}
    for name in ("cluster.yaml", "rates.yaml"):
        assert (ROOT / "cluster" / name).read_bytes() == SHIPPED_CLUSTER.with_name(name).read_bytes()


def test_a_file_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file("quickstart") == shipped_configs()["quickstart"]
    (tmp_path / "quickstart").mkdir()  # a folder is no config
    assert config_file(Path("quickstart")) == shipped_configs()["quickstart"]
    (tmp_path / "mine.yaml").write_text("run: {}")
    assert config_file("mine.yaml") == Path("mine.yaml")
    (tmp_path / "finetune_small").write_text("run: {}")
    assert config_file("finetune_small") == Path("finetune_small")


@pytest.mark.parametrize("argument", ["quikstart", "jobs/configs/quickstart.yaml", "quickstart.yml"])
def test_an_unknown_config_names_the_nearest(argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"^{argument}: no such config file; the nearest shipped config is 'quickstart'; "
    ) as caught:
        config_file(argument)
    assert all(name in str(caught.value) for name in shipped_configs())


def test_a_model_or_input_on_disk_is_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_config("quickstart") and names_config("somewhere/run.yaml") and names_config("run.yml")
    assert not names_config("minilm-l6") and not names_config("texts.parquet")
    (tmp_path / "quickstart").mkdir()
    assert not names_config("quickstart")


def test_the_cluster_config_nearest_to_the_run_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "configs/run.yaml"
    assert cluster_file(None, run) == cluster_file(None) == SHIPPED_CLUSTER
    here = tmp_path / "cluster/cluster.yaml"
    here.parent.mkdir()
    here.write_text("")
    assert cluster_file(None, run).samefile(here) and cluster_file(None).samefile(here)
    beside = tmp_path / "configs/cluster.yaml"
    beside.parent.mkdir()
    beside.write_text("")
    assert cluster_file(None, run) == beside and cluster_file(None).samefile(here)
    assert cluster_file(Path("nowhere.yaml"), run) == Path("nowhere.yaml")  # what is named is not replaced


def test_the_order_is_in_the_help():
    for words in (["run"], ["plan"], ["embed"], ["serve"], ["gate"], ["ablate"], ["cluster", "render"]):
        text = " ".join(invoke(*words, "--help").output.split())
        assert CLUSTER_ORDER in text, words


def test_verbs_find_shipped_configs_from_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = invoke("plan", "quickstart")
    assert planned.exit_code == 0, planned.output
    assert planned.output.splitlines()[-1] == "runs/quickstart"
    assert "training/alpha/pretrain" in planned.output and "not predicted" not in planned.output
    assert invoke("run", "finetune_small", "--dry-run").exit_code == 0
    for verb in ("embed", "serve"):  # the shipped run, whose model is not built here
        assert str(invoke(verb, "quickstart", "--dry-run").exception).startswith("runs/quickstart/merged: ")
    grid = invoke("ablate", "ablation_losses", "--dry-run")
    assert grid.exit_code == 0, grid.output
    assert invoke("cluster", "placement", "--profile", "a100x64").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_beside_the_run_config_replaces_the_shipped_profiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_bytes((ROOT / "jobs/configs/quickstart.yaml").read_bytes())
    content = (ROOT / "cluster/cluster.yaml").read_text().replace("  local:\n", "  laptop:\n")
    (tmp_path / "cluster.yaml").write_text(content)
    assert "allowed: a100x64, h100x1, laptop, single" in str(invoke("plan", "mine.yaml").exception)
    assert invoke("plan", "mine.yaml", "--profile", "laptop").exit_code == 0
    # A shipped run config lies beside no file of the user's.
    assert invoke("plan", "quickstart", "--profile", "laptop").exit_code != 0


def test_a_verb_without_a_run_config_uses_this_machine_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 48)
    machines = load_machine(None)
    assert machines.profile("local").stages.embedding.threads == 48
    assert machines.profile("h100x1").stages.embedding.gpus == 1
    monkeypatch.chdir(ROOT)
    assert load_machine(None).profile("local").stages.embedding.threads == 2


def test_shipped_files_are_links_in_git():
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "platform/embedloom/shipped"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    if not listed:
        pytest.skip("not a git checkout")
    assert {line.split()[0] for line in listed} == {"120000"}  # one copy of each text
