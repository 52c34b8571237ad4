"""Killed with -9 while it works, the command must end with the files of an undisturbed run."""

import os

import pytest

from drills.embed_kills import drill
from embedloom.cluster.session import PACKAGE_ROOT


@pytest.mark.ray
def test_a_killed_run_ends_with_identical_files(tiny_model, tmp_path, monkeypatch):
    """One kill in the middle; `python tests/drills/embed_kills.py` does ten."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    result = drill(tiny_model, tmp_path, texts=600, kills=1, seed=1)
    assert result["kills"] == 1 and 0 < result["files_at_kills"][0] < 2 * result["shards"]
    assert result["rewritten"] == [] and result["different"] == []
