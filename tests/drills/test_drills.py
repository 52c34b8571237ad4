"""The short set of the failure drills; `make drill` runs a hundred."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drills.comparing import differences
from drills.outcome import Outcome
from drills.processes import written_at
from drills.run_drills import serial_plan, table

SCRIPT = Path(__file__).with_name("run_drills.py")


@pytest.mark.slow
def test_killed_full_and_refused_stages_end_as_the_undisturbed(tmp_path):
    """Four drills of mining and merging: a kill, a full disk, a refused commit, a cut file."""
    command = [sys.executable, SCRIPT, "--drills", "8", "--without-ray", "--stages", "merging", "mining"]
    done = subprocess.run(
        [*command, "--folder", tmp_path / "drills"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"drills": 8, "equal": 8}


def test_the_plan_covers_stages_and_faults_evenly():
    plan = serial_plan(["a", "b"], 16, seed=5)
    assert plan[0] == ("a", "kill", 5) and plan[-1] == ("b", "truncated", 6)
    assert len(set(plan)) == 16


def test_the_table_counts_equal_of_all():
    outcomes = [
        Outcome("mining", "kill", 0, True, ""),
        Outcome("mining", "kill", 1, False, ""),
        Outcome("corpus", "commit", 0, True, ""),
    ]
    lines = [line.split() for line in table(outcomes)]
    assert lines == [["stage", "kill", "commit"], ["mining", "1/2"], ["corpus", "1/1"]]


def test_a_changed_byte_and_a_missing_file_are_differences_and_a_clock_is_none(tmp_path):
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"rows": 1, "seconds": len(name)}))
        (tmp_path / name / "part.parquet").write_bytes(name.encode())
    (tmp_path / "left" / "_tmp-1-part").touch()
    assert differences(tmp_path / "left", tmp_path / "right") == ["_tmp-1-part", "part.parquet"]


def test_a_file_that_is_tidied_away_while_looked_at_is_not_listed(tmp_path):
    """A hundred drills once ended here: the synthesis finished between the listing and the look."""
    for name in ("stays", "goes"):
        (tmp_path / name).touch()
    paths = iter([tmp_path / "stays", tmp_path / "goes"])
    (tmp_path / "goes").unlink()
    assert list(written_at(tmp_path, paths)) == ["stays"]
