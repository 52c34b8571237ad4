"""``embedloom merge-models``, and the merged node of a run with a search."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.config.merging import MergeSearch, MergingConfig
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.merging import search as trial
from embedloom.merging.plan import model_names
from embedloom.pipeline.model_commands import merging_config
from fakes_merging import edit_json, variant

WEIGHTS = "model.safetensors"


@pytest.fixture
def models(tiny_model, tmp_path):
    return [variant(tiny_model, tmp_path / f"c{seed}", seed) for seed in range(3)]


def run(*arguments):
    return CliRunner().invoke(app, ["merge-models", *map(str, arguments)], catch_exceptions=True)


def test_folders_become_one_model_and_a_second_call_does_nothing(models, tmp_path):
    out = tmp_path / "out"
    result = run(*models, "--out", out, "--weights", "2,1,1", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(out)
    sources = [load_file(model / WEIGHTS)["norm.weight"] for model in models]
    expected = 0.5 * sources[0] + 0.25 * sources[1] + 0.25 * sources[2]
    torch.testing.assert_close(
        load_file(out / WEIGHTS)["norm.weight"].float(), expected, rtol=2**-8, atol=1e-6
    )
    stamp = (out / WEIGHTS).stat().st_mtime_ns
    assert (
        "finished, skipped" in run(*models, "--out", out, "--weights", "2,1,1", "--dtype", "bfloat16").stderr
    )
    assert (out / WEIGHTS).stat().st_mtime_ns == stamp
    edit_json(models[1] / "config.json", _name_or_path="touched")  # a changed source is merged again
    assert run(*models, "--out", out, "--weights", "2,1,1", "--dtype", "bfloat16").exit_code == 0
    assert (out / WEIGHTS).stat().st_mtime_ns != stamp


def test_dry_run_checks_and_writes_nothing(models, tmp_path):
    result = run(*models[:2], "--out", tmp_path / "out", "--method", "slerp", "--dry-run")
    assert "would merge 2 models, slerp" in result.stdout
    assert not (tmp_path / "out").exists()
    refused = run(*models, "--out", tmp_path / "out", "--method", "slerp", "--dry-run")
    assert isinstance(refused.exception, ConfigError)


def test_a_folder_with_other_things_is_not_replaced(models, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused = run(*models, "--out", out)
    assert isinstance(refused.exception, DataError)
    assert "holds files that are no merged model" in str(refused.exception)
    assert (out / "thesis.txt").read_text() == "mine"
    assert "is one of the models" in str(run(*models, "--out", models[0]).exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tise"], "method"),
        (["--density", "0.5"], "method linear does not read density"),
        (["--weights", "1;2"], "--weights: '1;2'; expected numbers and commas"),
        (["--weights", "1,2"], "2 given for 3 models"),
        (["--method", "ties"], "needs the base"),
        (["--set", "search.kind=weights"], "merge-models: search scores merges"),
    ],
)
def test_bad_options_are_one_line(models, tmp_path, arguments, message):
    refused = run(*models, "--out", tmp_path / "out", *arguments)
    assert isinstance(refused.exception, ConfigError)
    assert message in str(refused.exception)


def test_names_are_the_shortest_that_tell_models_apart():
    assert model_names(["/a/x", "/a/y/"]) == ["x", "y"]
    assert model_names(["run/a/last", "run/b/last"]) == ["a/last", "b/last"]
    with pytest.raises(ConfigError, match="'/a/x' is given twice"):
        model_names(["/a/x", "/b/y", "/a/x"])
    assert merging_config({"method": "ties", "density": None}, ["merging.density=0.3"]).density == 0.3


class TowardsSecond:
    """Scores a folder by how near its norm is to the second model's; counts calls, and stops when told."""

    def __init__(self, target: Path, stop_after: int | None = None) -> None:
        self.target, self.calls, self.stop_after = load_file(target / WEIGHTS)["norm.weight"], [], stop_after

    def __call__(self, name, folder):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((name, Path(folder)))
        assert (Path(folder) / "contract.json").is_file()  # a whole model folder
        distance = float((load_file(Path(folder) / WEIGHTS)["norm.weight"] - self.target).norm())
        items = {f"dev/default/{number}": 1 - distance for number in range(20)}
        return {"dev": 1 - distance}, {"dev": items}


def test_a_search_merges_scores_and_goes_on_after_a_kill(models, tmp_path):
    places = {model.name: Place(str(model)) for model in models}
    config = MergingConfig(search=MergeSearch())
    out = Place(str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        trial.search_merge(config, places, None, TowardsSecond(models[1], stop_after=4), out)
    scorer = TowardsSecond(models[1])
    result = trial.search_merge(config, places, None, scorer, out)
    assert result["kept"] == [0.0, 1.0, 0.0]
    assert (
        len(scorer.calls) == len(result["trials"]) - 4
    )  # what was scored before the kill is not scored again
    assert json.loads((tmp_path / "out/search.json").read_text()) == result
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"search.json"}  # no trial is left
    assert result["leave_one_out"] == []  # one model cannot be left out of itself


def test_a_search_over_weights_beats_the_average_it_starts_from(models, tmp_path):
    places = {model.name: Place(str(model)) for model in models}
    search = MergeSearch(kind="weights", rounds=2, max_merges=20)
    scorer = TowardsSecond(models[1])
    result = trial.search_merge(
        MergingConfig(search=search), places, None, scorer, Place(str(tmp_path / "out"))
    )
    assert result["kept"][1] == max(result["kept"]) > 0.5
    assert {row["model"] for row in result["leave_one_out"]} == {"c0", "c1", "c2"}
    gains = {row["model"]: row["dev_gain"] for row in result["leave_one_out"]}
    assert gains["c1"] > 0 > max(gains["c0"], gains["c2"])
