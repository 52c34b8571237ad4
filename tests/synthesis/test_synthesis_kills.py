"""Killed with -9 while it works, the stage must end with the rows of an undisturbed run."""

import os

import pytest

from drills.synthesis_kills import drill
from embedloom.cluster.session import PACKAGE_ROOT


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_actor_raylet_and_driver_lose_and_repeat_no_row(tmp_path, monkeypatch):
    """One of each; `python tests/drills/synthesis_kills.py` does ten."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    result = drill(tmp_path, rows=60, kinds=["actor", "raylet", "driver"], seed=1)
    assert result["killed"] == {"actor": 1, "raylet": 1, "driver": 1}
    assert (result["rows"], result["exit"], result["twice"]) == (60, 0, 0)
    assert result["rewritten"] == [] and result["different"] == []
