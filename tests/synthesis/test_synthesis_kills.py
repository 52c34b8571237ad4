"""Killed with -9 while it works, the stage must end with the rows of an undisturbed run."""

import os

import pytest

from drills.synthesis_kills import drill
from embedloom.cluster.session import PACKAGE_ROOT


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_loses_and_repeats_no_row(tmp_path, monkeypatch):
    """One kill; `python tests/drills/synthesis_kills.py` does ten, of actors and raylets as well."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    result = drill(tmp_path, rows=32, kinds=["driver"], seed=1, quick=True)
    assert result == {
        "rows": 24, "shards": result["shards"], "killed": {"driver": 1}, "exit": 0, "twice": 0,
        "rewritten": [], "different": [],
    }  # fmt: skip
