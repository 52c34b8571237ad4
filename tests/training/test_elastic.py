"""Worker groups: what a worker is started with, and a real one that loses one of three workers for good."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from embedloom.config.cluster import TrainingGroup
from embedloom.training.elastic import answers
from embedloom.training.stage import worker_environment

DRILL = Path(__file__).parents[1] / "drills" / "train_elastic.py"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.timeout(1800)
def test_two_of_three_workers_go_on_with_the_same_batches(tmp_path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(DRILL),
        "--steps",
        "40",
        "--folder",
        str(tmp_path / "drill"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    print(f"{found['seconds']} seconds from the loss to the next step")
    assert found["workers"][0] == 3 and found["workers"][-1] == 2
    assert found["steps"][0] == found["steps"][1] > found["steps_before"]
    assert found["same_tokens"] and found["largest_difference"] <= 1e-4


def test_a_machine_answers_as_long_as_something_listens_on_its_port():
    with socket.socket() as raylet:
        raylet.bind(("127.0.0.1", 0))
        raylet.listen()
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": raylet.getsockname()[1]}
        assert answers(node)
    assert not answers(node)


def test_no_fewer_workers_than_none_and_no_more_than_all():
    with pytest.raises(ValueError, match="min_workers is 3, above workers 2; allowed: 1 to workers"):
        TrainingGroup(workers=2, min_workers=3)
    with pytest.raises(ValueError, match="min_workers"):
        TrainingGroup(workers=2, min_workers=0)
    assert TrainingGroup(workers=2).min_workers is None


def test_gpu_workers_get_segments_that_grow():
    gpu = worker_environment(TrainingGroup(workers=8, cpus=11, gpus=1, threads=4))
    assert gpu["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert (gpu["DS_ACCELERATOR"], gpu["OMP_NUM_THREADS"]) == ("cuda", "4")
    assert worker_environment(TrainingGroup(cpus=2)) == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
