"""The drills that need Ray clusters of their own: the kill scripts, their faults counted one by one."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from drills import embed_kills, evaluate_kills, synthesis_kills, train_kills
from drills.outcome import Outcome
from drills.serial_stages import tiny_model

_PACKAGE = Path(__file__).resolve().parents[2] / "platform"
# How many faults each series has; a series is compared once, at its end, so all its faults are equal or none.
SYNTHESIS_KINDS = ["actor", "raylet", "slow", "driver", "actor", "raylet"]
TRAIN_KINDS = ["rank", "driver", "slow"]
EMBED_KILLS = 3
EVALUATE_KILLS = 3
COUNT = len(SYNTHESIS_KINDS) + len(TRAIN_KINDS) + EMBED_KILLS + EVALUATE_KILLS


def ray_drills(folder: Path, seed: int, report: Callable[[Outcome], None]) -> list[Outcome]:
    """All series, one after another.

    Args:
        folder: new folder for everything.
        seed: of the moments.
        report: called with every outcome as soon as it is known.
    """
    folder.mkdir(parents=True)
    _environment()
    model = tiny_model(folder / "tiny")
    outcomes = []
    for outcome in _series(folder, model, seed):
        outcomes.append(outcome)
        report(outcome)
    return outcomes


def _environment() -> None:
    """What the started commands need to find the package and the tests."""
    paths = [str(_PACKAGE), str(_PACKAGE.parent / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ.update(
        PYTHONPATH=os.pathsep.join(path for path in paths if path), RAY_DATA_DISABLE_PROGRESS_BARS="1"
    )


def _series(folder: Path, model: Path, seed: int) -> Iterator[Outcome]:
    yield from _synthesis(folder / "synthesis", seed)
    yield from _embedding(folder / "embedding", model, seed)
    yield from _evaluation(folder / "evaluation", model, seed)
    yield from _training(folder / "training", seed)


def _synthesis(folder: Path, seed: int) -> Iterator[Outcome]:
    result = synthesis_kills.drill(folder, 160, list(SYNTHESIS_KINDS), seed)
    equal = not (result["exit"] or result["different"] or result["rewritten"] or result["twice"])
    for number, kind in enumerate(kind for kind, times in result["killed"].items() for _ in range(times)):
        yield Outcome("synthesis", kind or "none left", seed + number, equal and bool(kind), _short(result))


def _embedding(folder: Path, model: Path, seed: int) -> Iterator[Outcome]:
    folder.mkdir()
    result = embed_kills.drill(model, folder, 1500, EMBED_KILLS, seed)
    for number, done in enumerate(result["files_at_kills"]):  # type: ignore[arg-type, var-annotated]
        equal = not (result["different"] or result["rewritten"])
        yield Outcome("embedding", "driver", seed + number, equal, f"after {done} files")


def _evaluation(folder: Path, model: Path, seed: int) -> Iterator[Outcome]:
    folder.mkdir()
    tasks, calm = evaluate_kills.make_tasks(folder, ["sts", "reranking"]), folder / "calm"
    command = [
        sys.executable,
        "-W",
        "ignore",
        evaluate_kills.__file__,
        "--model",
        model,
        "--folder",
        tasks,
        "--work",
        calm,
    ]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    result = evaluate_kills.drill(model, tasks, calm, folder / "killed", EVALUATE_KILLS, seed)
    for number, done in enumerate(result["files_at_kills"]):  # type: ignore[arg-type, var-annotated]
        yield Outcome(
            "evaluation",
            "driver",
            seed + number,
            not result["different"],
            f"after {done} of {result['files']} files",
        )


def _training(folder: Path, seed: int) -> Iterator[Outcome]:
    inputs, calm = train_kills.prepare(folder)
    for number, kind in enumerate(TRAIN_KINDS):
        result = train_kills.drill(inputs, calm, folder / f"{kind}-{number}", kind, seed + number)
        equal = result["struck"] and not result["different"]
        yield Outcome(
            "training",
            kind,
            seed + number,
            equal,
            f"after {result['after_checkpoints']} checkpoints {result['different'][:3]}",
        )


def _short(result: dict[str, Any]) -> str:
    return f"{result['rows']} rows, exit {result['exit']}, different {result['different'][:3]}"
