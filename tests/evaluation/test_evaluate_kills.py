"""Killed with -9 while it works, an evaluation must end with the result files of an undisturbed one."""

import os
from pathlib import Path

import pytest

from drills.evaluate_kills import drill, evaluate_here, make_tasks
from embedloom.cluster.session import PACKAGE_ROOT


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_killed_evaluation_ends_with_identical_results(tiny_model, tmp_path, monkeypatch):
    """One kill on two task types; `python tests/drills/evaluate_kills.py` does ten on all."""
    paths = [str(PACKAGE_ROOT), str(Path(__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    tasks, calm = make_tasks(tmp_path, ["sts", "reranking"]), tmp_path / "calm"
    evaluate_here(tiny_model, tasks, calm)
    result = drill(tiny_model, tasks, calm, tmp_path / "killed", kills=1, seed=3)
    assert result["kills"] == 1 and 0 < result["files_at_kills"][0] < result["files"]
    assert result["different"] == []
