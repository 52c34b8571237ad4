"""Trackers get every number once; one that breaks is left behind, one that is not installed stops the run early."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from embedloom.core.storage import Place
from embedloom.errors import MissingDependency
from embedloom.pipeline.preflight import check_training_packages
from embedloom.training.dev import DevPoint
from embedloom.training.metrics import WANDB_FOLDER, StepRecord, StepWriter
from fakes_training import training_config


def record(step, dev=None):
    return StepRecord(step, 0, 1 / step, 1e-3, 0.5, 8, 1000, 0.25, 0.125, 0.5, 321, None, dev)


@pytest.fixture
def wandb(monkeypatch):
    """A module that keeps what it is told."""
    module = ModuleType("wandb")
    module.told, module.logged, module.finished = [], [], []

    def init(**arguments):
        module.told.append(arguments)
        return SimpleNamespace(
            log=lambda values, step: module.logged.append((step, values)),
            finish=lambda: module.finished.append(True),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    """A module with a server's memory of runs."""
    module = ModuleType("mlflow")
    module.runs, module.params, module.logged, module.current = {}, [], [], None

    def search_runs(filter_string, output_format, max_results):
        identity = filter_string.split("'")[1]
        return [SimpleNamespace(info=SimpleNamespace(run_id=identity))] if identity in module.runs else []

    def start_run(run_id=None, run_name=None, tags=None):
        module.current = run_id or next(iter(tags.values()))
        module.runs.setdefault(module.current, run_name)

    module.set_experiment = lambda name: None
    module.search_runs, module.start_run = search_runs, start_run
    module.log_params = module.params.append
    module.log_metrics = lambda values, step: module.logged.append((module.current, step, values))
    module.end_run = lambda: None
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def writer(folder, *names):
    return StepWriter("train a/s", 4, Place(str(folder)), names, "run-1", {"loss": "infonce"})


def test_wandb_gets_steps_and_dev_scores_of_a_run_that_keeps_its_name(wandb, tmp_path):
    own = writer(tmp_path, "wandb")
    own.start([])
    own.add(record(1))
    own.add_dev(DevPoint(2, 0.4, {"one": 0.3, "two": 0.5}), "ndcg_at_10", True)
    own.add(record(2, dev=0.4))
    own.close()
    (told,) = wandb.told
    assert (told["id"], told["resume"], told["name"]) == ("run-1", "allow", "train a/s")
    assert told["config"] == {"loss": "infonce"} and told["dir"] == str(tmp_path / WANDB_FOLDER)
    assert [step for step, _ in wandb.logged] == [1, 2, 2] and wandb.finished == [True]
    assert wandb.logged[0][1]["train/loss"] == 1.0
    assert wandb.logged[1][1] == {
        "dev/one/ndcg_at_10": 0.3, "dev/two/ndcg_at_10": 0.5, "dev/ndcg_at_10": 0.4
    }  # fmt: skip
    # What was not measured at a step is not sent as a number.
    assert "train/mfu" not in wandb.logged[0][1] and "train/dev_score" not in wandb.logged[0][1]
    assert wandb.logged[2][1]["train/dev_score"] == 0.4


def test_mlflow_goes_on_with_the_run_of_before_a_restart(mlflow, tmp_path):
    for first in (1, 3):
        own = writer(tmp_path, "mlflow")
        own.start([record(step) for step in range(1, first)])
        own.add(record(first))
        own.close()
    assert list(mlflow.runs) == ["run-1"] and mlflow.params == [{"loss": "infonce"}]
    assert [(run, step) for run, step, _ in mlflow.logged] == [("run-1", 1), ("run-1", 3)]


def test_a_tracker_that_breaks_is_left_behind_and_the_metrics_go_on(wandb, tmp_path, capfd):
    own = writer(tmp_path, "wandb", "tensorboard")
    own.start([])

    def refuse(values, step):
        raise ConnectionError("no route")

    own._trackers._open["wandb"].log = refuse
    own.add(record(1))
    own.add(record(2))
    own.close()
    message = "tracker wandb stopped working and is left out from here: no route"
    assert capfd.readouterr().err.count(message) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert list((tmp_path / "_tensorboard").glob("events*"))


def test_a_missing_package_is_named_before_training(monkeypatch):
    absent = {"wandb", "mlflow", "peft", "mteb", "vllm"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else True)
    check_training_packages(training_config(), gpu=False)
    for changes, message in (
        ({"trackers": ["wandb"]}, r"training.trackers: wandb needs .*'wandb'.*pip install 'embedloom\[wandb\]'"),
        ({"trackers": ["tensorboard", "mlflow"]}, r"'mlflow'.*embedloom\[mlflow\]"),
        ({"lora": {"rank": 4}}, r"training.lora needs the package 'peft'"),
        ({"dev": {}}, r"training.dev needs the package 'mteb'"),
        ({"parity": ["vllm"]}, r"training.parity: vllm needs .*embedloom\[gpu\]"),
    ):  # fmt: skip
        with pytest.raises(MissingDependency, match=message):
            check_training_packages(training_config(**changes), gpu=True)
