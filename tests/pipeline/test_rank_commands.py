"""`embedloom gate` and `embedloom leaderboard` from the command line: exit codes, refusals, tables."""

import json
import random
import shutil
import string
from pathlib import Path

import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.core.model_folder import ModelFolder
from embedloom.errors import ConfigError, DataError
from fakes_run import make_run

CLUSTER = str(Path(__file__).parents[2] / "cluster" / "cluster.yaml")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_codes(folder):
    """Forty words, each beside itself with one letter changed; short enough for the tiny model's 64 tokens."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=12)) for _ in range(40)]
    rows = [
        {"sentence1": word, "sentence2": f"{word[:-1]}x", "lang1": "deu", "lang2": "eng", "split": "test"}
        for word in words
    ]
    path = folder / "bitext" / "codes.parquet"
    path.parent.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gate_passes_one_model_refuses_the_other_and_stores_both_verdicts(ray_local, tiny_model, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        shutil.copytree(tiny_model, folder)
    weights = load_file(bad / "model.safetensors")
    weights["embed_tokens.weight"][10:] = weights["embed_tokens.weight"][10]  # all letters look alike to it
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    common = ["--task", write_codes(tmp_path), "--out", tmp_path / "out", "--cluster", CLUSTER]
    common += ["--set", "gate.resamples=200", "--set", "gate.max_size_ratio=1.0"]

    passed = call("gate", good, "--against", bad, *common)
    assert passed.exit_code == 0, passed.output
    lines = passed.stdout.splitlines()
    assert lines[-1] == f"{good}/gate.json"
    assert lines[0].endswith("PASSED")
    ModelFolder(good).check_gated()

    refused = call("gate", bad, "--against", good, *common)
    assert refused.exit_code == 1
    assert "FAIL mean: mean over tasks -" in refused.stdout
    verdict = json.loads((bad / "gate.json").read_text())
    assert verdict["verdict"] == "refused" and set(verdict["tasks"]) == {"codes"}
    with pytest.raises(DataError, match="the gate refused this model"):
        ModelFolder(bad).check_gated()

    board = call("leaderboard", tmp_path / "out", "--html", tmp_path / "board.html")
    assert board.exit_code == 0, board.output
    rows = [line for line in board.stdout.splitlines() if "> " in line]
    assert [row.split("> ")[1].split("-")[0] for row in rows] == ["good", "bad"]
    assert "<svg" in (tmp_path / "board.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nowhere/model", "--against", "x"], ConfigError, "--task: needed"),
        (
            ["./nowhere", "--against", "x", "--task", "STS12"],
            DataError,
            r"CANDIDATE: '\./nowhere' does not exist",
        ),
        (["model"], ConfigError, "--against: needed to judge 'model'"),
        (["run.yaml", "--against", "x"], ConfigError, "go with a CANDIDATE"),
        (
            ["a", "--against", "b", "--task", "STS12", "--set", "gate.requires=x"],
            ConfigError,
            "nearest valid key is 'require'",
        ),
        (["a", "--against", "b", "--task", "./gone"], DataError, r"--task: \./gone does not exist"),
    ],
)
def test_gate_names_what_it_cannot_use(arguments, error, message):
    result = call("gate", *arguments, "--cluster", CLUSTER)
    assert isinstance(result.exception, error)
    assert result.exception.exit_code == 2
    with pytest.raises(error, match=message):
        raise result.exception


def test_dry_run_says_what_would_be_judged_and_starts_nothing(tiny_model, tmp_path):
    result = call("gate", tiny_model, "--against", tiny_model, "--task", "STS12", "--task", "MTEB(eng, v1)", "--out",
                  tmp_path / "out", "--cluster", CLUSTER, "--dry-run")  # fmt: skip
    assert result.exit_code == 0
    assert "on STS12, MTEB(eng, v1)" in result.stdout
    assert not (tmp_path / "out").exists()


def test_leaderboard_ranks_a_run_within_a_pool(tmp_path):
    run = make_run(tmp_path / "quick")
    path = tmp_path / "pool.parquet"
    rows = [(f"p{n}", "heldout", "Retrieval", n / 10) for n in range(10)]
    pd.DataFrame(rows, columns=["model", "task", "task_type", "score"]).to_parquet(path)
    result = call("leaderboard", run.uri, "--pool", path, "--top", 2)
    assert result.exit_code == 0, result.output
    assert "16 models, 1 tasks, pool" in result.stdout
    own = [line.split("|")[2].strip() for line in result.stdout.splitlines() if "| >" in line]
    assert own == ["> teacher", "> bm25", "> merged", "> b", "> a", "> base"]
    alone = call("leaderboard", path, "--top", 2)
    assert "10 models, 1 tasks" in alone.stdout and "p9" in alone.stdout and "p5" not in alone.stdout
