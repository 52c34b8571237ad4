"""The kill drill of training: a rank or the driver killed with -9, or a rank stopped for a while; the weights must be those
of a calm run.

    python tests/drills/train_kills.py [--kinds rank driver slow] [--seed 0] [--folder FOLDER]

Two CPU workers train a tiny Llama for 24 steps with checkpoints every three. At a drawn checkpoint the fault strikes; Ray
Train starts the group again from the last checkpoint, or the driver is run again. Weights and losses are compared: bytes,
but for sums that two ranks may have added in another order (1e-5).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from drills.processes import LIMIT_SECONDS, pause, start, started, stop

STEPS = 24
CHECKPOINT_STEPS = 3
SLOW_SECONDS = 3.0
KINDS = ("rank", "driver", "slow")
TOLERANCE = 1e-5
_WORDS = ["red", "green", "blue", "grey", "pink", "gold"]


def make_inputs(folder: Path) -> None:
    """A tiny encoder and 48 mined examples."""
    from embedloom.core.artefacts import ArtefactWriter
    from embedloom.core.schemas import table_from_rows
    from embedloom.core.storage import Place
    from fakes import make_tiny_encoder, make_tiny_llama

    make_tiny_encoder(make_tiny_llama(folder / "llama"), folder / "model")
    writer = ArtefactWriter(Place(str(folder / "examples")), "examples", "drill", {}, "local")
    rows = []
    for number in range(48):
        word = _WORDS[number % len(_WORDS)]
        others = [other for other in _WORDS if other != word][:2]
        rows.append(
            {
                "id": f"row-{number:03d}", "query": f"{word} {number}", "query_instruction": "Find the colour",
                "positive": f"the colour {word} is number {number}", "positive_score": 0.9,
                "negatives": [f"nothing but {other}" for other in others], "negative_scores": [0.3, 0.3],
                "document_instruction": None, "task_type": "retrieval", "dataset": "public",
            }
        )  # fmt: skip
    writer.place.write_table("examples/part-000000.parquet", table_from_rows("examples", rows))
    writer.commit({"rows": len(rows)})


def work(inputs: Path, out: Path) -> None:
    """One training in a Ray of its own; goes on where the last one stopped."""
    from embedloom.cluster.session import ray_session
    from embedloom.config.cluster import AuthConfig, Profile, TrainingGroup
    from embedloom.config.training import TrainingConfig
    from embedloom.core.artefacts import Artefact, ArtefactWriter
    from embedloom.core.storage import Place

    config = TrainingConfig.model_validate(
        {
            "candidates": [{"name": "alpha", "seed": 3}],
            "stages": [
                {"name": "pretrain", "negatives": 2, "global_batch": 8, "learning_rate": 5e-3, "max_steps": STEPS, "warmup_steps": 2}
            ],
            "mix": {"public": 1.0}, "checkpoint_every_steps": CHECKPOINT_STEPS, "zero_stage": 1, "temperature": 0.1,
            "micro_batch_tokens": 256,
        }
    )  # fmt: skip
    mined = Artefact.open(Place(str(inputs / "examples")), "examples")
    with ray_session(Profile(logical_cpus=8, object_store_mib=100), AuthConfig()):
        from embedloom.training.stage import train_stage

        writer = ArtefactWriter(Place(str(out)), "model", "drill", {}, "local")
        group = TrainingGroup(workers=2, cpus=1, threads=1)
        train_stage(
            config, config.stages[0], config.candidates[0], inputs / "model", mined, group, "float32", writer
        )


def drill(inputs: Path, calm: Path, out: Path, kind: str, seed: int) -> dict[str, Any]:
    """One fault at a drawn checkpoint; returns what happened."""
    draw = random.Random(f"{kind} {seed}")
    after = draw.randrange(1, STEPS // CHECKPOINT_STEPS - 2)
    arguments, log = command(inputs, out), out.with_suffix(".log")
    driver = start(arguments, log)
    deadline = time.monotonic() + LIMIT_SECONDS
    seen: set[str] = set()
    while driver.poll() is None and len(seen) < after:
        assert time.monotonic() < deadline, f"the training made no progress; see {log}"
        seen |= {path.name for path in (out / "_train" / "run").glob("step-*")}
        time.sleep(0.01)
    struck = driver.poll() is None and strike(kind, driver, draw)
    if struck and kind == "driver":
        driver = start(arguments, log)
    code = driver.wait(LIMIT_SECONDS)
    return {
        "kind": kind, "struck": struck, "after_checkpoints": len(seen), "exit": code,
        "different": different(calm, out) if code == 0 else ["no artefact"],
    }  # fmt: skip


def strike(kind: str, driver: subprocess.Popen[bytes], draw: random.Random) -> bool:
    """Do it; whether there was something to strike."""
    if kind == "driver":
        stop(driver)
        return True
    ranks = started(driver.pid, "RayTrainWorker")
    if not ranks:
        return False
    if kind == "slow":
        pause(draw.choice(ranks), SLOW_SECONDS)
    else:
        draw.choice(ranks).send_signal(signal.SIGKILL)
    return True


def different(left: Path, right: Path) -> list[str]:
    """Tensors and losses that are not the same within the tolerance."""
    import numpy as np
    from safetensors.numpy import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (left, right))
    found = [
        name
        for name in sorted({*ours, *theirs})
        if name not in ours or name not in theirs
        or not np.allclose(ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE / 10)
    ]  # fmt: skip
    curves = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (left, right)
    ]
    same = len(curves[0]) == len(curves[1]) == STEPS and np.allclose(curves[0], curves[1], rtol=TOLERANCE)
    return found if same else [*found, "losses"]


def command(inputs: Path, out: Path) -> list[str]:
    """The command line of one training."""
    return [sys.executable, "-W", "ignore", __file__, "--folder", str(inputs), "--work", str(out)]


def prepare(folder: Path) -> tuple[Path, Path]:
    """Inputs and the calm run's model."""
    inputs, calm = folder / "inputs", folder / "calm"
    inputs.mkdir(parents=True)
    make_inputs(inputs)
    subprocess.run(command(inputs, calm), check=True, stdout=subprocess.DEVNULL)
    return inputs, calm


def main() -> None:
    """Command line of the drill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="new folder; default: a temporary one")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.work)
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="embedloom-drill-"))
    inputs, calm = prepare(folder)
    results = [
        drill(inputs, calm, folder / f"{kind}-{number}", kind, options.seed + number)
        for number, kind in enumerate(options.kinds)
    ]
    print(json.dumps(results))
    sys.exit(any(one["different"] or not one["struck"] for one in results))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
