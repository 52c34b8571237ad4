"""The elastic drill: one of three training workers is lost with its machine, which does not come back; two go on.

    python tests/drills/train_elastic.py [--seed 0] [--steps 60] [--folder FOLDER]

Four Ray nodes on this machine, three of which hold a worker each (gloo). A calm run trains a tiny Llama with three
workers; then a run that may go on with two trains the same, and after its second checkpoint the raylet of a drawn worker
and all that it started are killed with -9. Prints one JSON object: the seconds from the kill until training was further than ever before, the
workers that wrote the last checkpoint, and how far losses and numbers of tokens of all steps are from the calm run's.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "platform")]

from drills.processes import started, stop
from drills.train_kills import make_inputs

TOLERANCE = 1e-4
LIMIT_SECONDS = (
    3600  # two trainings and five starts of workers, which took two minutes each on two busy cores
)
CHECKPOINT_STEPS = 3
WORKER_CPUS = 2  # more than the head has, so that each worker is on a node of its own


def four_nodes() -> Any:
    """A head without room for a worker, and three nodes with room for one each."""
    from ray.cluster_utils import Cluster

    node = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **node}
    )
    for _ in range(3):
        cluster.add_node(num_cpus=WORKER_CPUS, **node)
    return cluster


def train(inputs: Path, out: Path, steps: int, min_workers: int | None) -> None:
    """One training on the connected cluster."""
    from embedloom.config.cluster import TrainingGroup
    from embedloom.config.training import TrainingConfig
    from embedloom.core.artefacts import Artefact, ArtefactWriter
    from embedloom.core.storage import Place
    from embedloom.training.stage import train_stage

    stage = {
        "name": "pretrain", "negatives": 2, "global_batch": 9, "learning_rate": 5e-5, "max_steps": steps, "warmup_steps": 2
    }  # fmt: skip
    config = TrainingConfig.model_validate(
        {
            "candidates": [{"name": "alpha", "seed": 3}], "stages": [stage], "mix": {"public": 1.0}, "zero_stage": 2,
            "checkpoint_every_steps": CHECKPOINT_STEPS, "temperature": 0.1, "micro_batch_tokens": 256,
        }
    )  # fmt: skip
    group = TrainingGroup(workers=3, min_workers=min_workers, cpus=WORKER_CPUS, threads=1)
    mined = Artefact.open(Place(str(inputs / "examples")), "examples")
    writer = ArtefactWriter(Place(str(out)), "model", "drill", {}, "local")
    train_stage(
        config, config.stages[0], config.candidates[0], inputs / "model", mined, group, "float32", writer
    )


def work(folder: Path, steps: int) -> None:
    """The calm and the elastic training, in one cluster."""
    import ray

    inputs = folder / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    cluster = four_nodes()
    # Or what Ray Train starts beside the workers asks the newest cluster of the machine, which may be another one.
    ray.init(address=cluster.address, runtime_env={"env_vars": {"RAY_ADDRESS": cluster.address}})
    train(inputs, folder / "calm", steps, None)
    train(inputs, folder / "elastic", steps, 2)
    ray.shutdown()
    cluster.shutdown()


def losses(folder: Path) -> list[tuple[float, int]]:
    """Loss and tokens of every step so far; a line that is being written does not count."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["loss"], record["tokens"]) for record in records]


class Watch(threading.Thread):
    """Follows the workers that wrote the checkpoints, which are gone when the training is done."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.workers: dict[str, int] = {}
        self._out = out

    def run(self) -> None:
        """Look several times a second."""
        while True:
            for path in self._out.glob("_train/run/step-*/training_state.json"):
                try:
                    self.workers[path.parent.name] = json.loads(path.read_text())["world_size"]
                except (FileNotFoundError, json.JSONDecodeError):
                    continue
            time.sleep(0.05)


def wait(driver: subprocess.Popen[bytes], until: Any, what: str) -> None:
    """Wait for a state of the run."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not until():
        assert driver.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def lose_machine(driver: int, out: Path, seed: int) -> tuple[int, float]:
    """Kill a drawn worker's raylet and all that it started; returns the steps done by then, and when it was."""
    lost = random.Random(seed).choice(started(driver, "raylet/raylet")[1:])
    machine = [lost, *lost.children(recursive=True)]
    struck = time.monotonic()
    for process in machine:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    time.sleep(1.0)  # what rank 0 had computed is written
    return len(losses(out)), struck


def drill(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """Both runs and the kill between; what came out."""
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--folder",
        str(folder),
        "--steps",
        str(steps),
        "--work",
    ]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "platform"), str(TESTS)]),
    }
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    with (folder / "log").open("ab") as log:
        driver = subprocess.Popen(arguments, start_new_session=True, stdout=log, stderr=log, env=environment)
    out = folder / "elastic"
    watch = Watch(out)
    watch.start()
    try:
        wait(driver, lambda: len(watch.workers) >= 2, "second checkpoint")
        before, struck = lose_machine(driver.pid, out, seed)
        wait(driver, lambda: len(losses(out)) > before, "step with two workers")
        seconds = time.monotonic() - struck
        code = driver.wait(LIMIT_SECONDS)
    except BaseException:
        stop(driver)
        raise
    calm, elastic = losses(folder / "calm"), losses(out)
    return {
        "exit": code,
        "seconds": round(seconds, 1),
        "steps_before": before,
        "workers": [watch.workers[name] for name in sorted(watch.workers)],
        "steps": [len(calm), len(elastic)],
        "same_tokens": [tokens for _, tokens in calm] == [tokens for _, tokens in elastic],
        "largest_difference": max(abs(a - b) for (a, _), (b, _) in zip(calm, elastic, strict=False)),
    }


def main() -> None:
    """Command line of the drill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="new folder; default: a temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.steps)
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="embedloom-drill-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = drill(folder, options.seed, options.steps)
    print(json.dumps(found))
    equal = found["same_tokens"] and found["largest_difference"] <= TOLERANCE
    sys.exit(found["exit"] != 0 or not equal or found["workers"][-1] != 2)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
