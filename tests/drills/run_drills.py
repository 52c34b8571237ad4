"""Failure drills: every stage meets every fault, is run again, and must end with the artefact of an undisturbed run.

    python tests/drills/run_drills.py [--drills 100] [--seed 0] [--without-ray] [--stages ...] [--folder FOLDER]

Most drills need no Ray: the stage runs in a process of its own which is killed, or whose disk is full, at a drawn
write. The others kill actors, raylets, training ranks and drivers of real Ray clusters, or stop them for a while. Prints
a table of stages and faults, and one JSON line.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "platform")]

import pytest
import torch

from drills.outcome import Outcome
from drills.ray_drills import COUNT, ray_drills
from drills.serial_drills import SerialDrills
from drills.serial_stages import STAGES
from drills.storage_faults import FAULTS
from fakes_without_ray import without_ray


def serial_plan(stages: list[str], count: int, seed: int) -> list[tuple[str, str, int]]:
    """``count`` drills, spread evenly over stages and faults."""
    cells = (
        (stage, fault, number) for number in itertools.count(seed) for fault in FAULTS for stage in stages
    )
    return list(itertools.islice(cells, count))


def run_serial(folder: Path, stages: list[str], count: int, seed: int) -> list[Outcome]:
    """The drills without Ray."""
    with pytest.MonkeyPatch.context() as patched:
        without_ray(patched)
        drills = SerialDrills(folder, stages)
        outcomes = []
        for stage, fault, number in serial_plan(stages, count, seed):
            outcomes.append(drills.drill(stage, fault, number))
            report(outcomes[-1])
    return outcomes


def report(outcome: Outcome) -> None:
    """One line as soon as a drill is over."""
    mark = "equal" if outcome.equal else "DIFFERENT"
    sys.stderr.write(f"{outcome.stage}, {outcome.fault}, seed {outcome.seed}: {mark}; {outcome.detail}\n")


def table(outcomes: list[Outcome]) -> list[str]:
    """Equal of all, by stage and fault."""
    stages, faults = (
        list(dict.fromkeys(getattr(one, key) for one in outcomes)) for key in ("stage", "fault")
    )
    all_of = Counter((one.stage, one.fault) for one in outcomes)
    equal = Counter((one.stage, one.fault) for one in outcomes if one.equal)
    rows = [["stage", *faults]]
    for stage in stages:
        cells = [
            f"{equal[stage, fault]}/{all_of[stage, fault]}" if all_of[stage, fault] else ""
            for fault in faults
        ]
        rows.append([stage, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def main() -> None:
    """Command line of the drills."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stages", nargs="*", choices=list(STAGES), default=list(STAGES), help="of those without Ray"
    )
    parser.add_argument("--without-ray", action="store_true", help="leave the drills on Ray clusters out")
    parser.add_argument("--folder", type=Path, help="new folder for everything; default: a temporary one")
    options = parser.parse_args()
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)  # a process that forks must not have threads of its own
    folder = options.folder or Path(tempfile.mkdtemp(prefix="el-drills-", dir="/tmp"))
    on_ray = 0 if options.without_ray else COUNT
    outcomes = run_serial(folder / "serial", options.stages, max(0, options.drills - on_ray), options.seed)
    if on_ray:
        outcomes += ray_drills(folder / "ray", options.seed, report)
    print("\n".join(table(outcomes)))
    wrong = [one for one in outcomes if not one.equal]
    print(json.dumps({"drills": len(outcomes), "equal": len(outcomes) - len(wrong)}))
    if not wrong and options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
