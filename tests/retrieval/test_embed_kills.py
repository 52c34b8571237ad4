"""Killed with -9 while it works, the command must end with the files of an undisturbed run."""

import os

import pytest

from drills.embed_kills import drill
from embedloom.cluster.session import PACKAGE_ROOT


@pytest.mark.ray
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_with_identical_files(tiny_model, tmp_path, monkeypatch, kills):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    result = drill(tiny_model, tmp_path, texts=300 * kills, kills=kills, seed=kills)
    assert result["kills"] == kills and result["rewritten"] == [] and result["different"] == []
