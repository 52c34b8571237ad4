"""The kill drill: a synthesis whose actors, raylets and driver are killed with -9 must end with the rows of a calm one.

    python tests/drills/synthesis_kills.py [--rows 400] [--kills 10] [--seed 0] [--folder FOLDER]

Two generators, one of which is refused a third of its answers, write seed queries and, from brainstormed tasks,
short pairs on a Ray cluster of two nodes of this machine; engines are fakes that answer after a short sleep. One run
is left alone. In the other, at drawn numbers of finished files and drawn fractions of a second later, a drawn process
is killed: an engine's actor, the second node's raylet, or the driver with everything it started, which is then run
again; or an actor is stopped for two seconds. Compares every row, reject and task of the two artefacts, and fails if a finished shard was written twice.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from drills.processes import pause, started, stop, written_at

KINDS = ("actor", "raylet", "driver", "slow")
SHARD_ROWS = 8
LIMIT_SECONDS = 900
STARTS = 3
SLOW_SECONDS = 2.0  # a process stopped for so long is slow, not dead


def drive(folder: Path, rows: int, quick: bool) -> None:
    """The driver: a cluster of two nodes, then the stage."""
    import ray

    from drills.synthesis_corpus import SleepyEngine, section, write_corpus
    from embedloom.config.cluster import PoolConfig
    from embedloom.core.artefacts import ArtefactWriter
    from embedloom.core.storage import Place
    from embedloom.synthesis.stage import synthesize

    cluster = two_nodes()
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    corpus = write_corpus(folder / "corpus")
    out = ArtefactWriter(Place(str(folder / "out")), "synthesis", "c", {}, "local")
    synthesize(
        section(rows, SHARD_ROWS, quick),
        7,
        corpus,
        PoolConfig(min_actors=1, max_actors=2, cpus=1),
        out,
        {name: lambda: folder for name in ("first", "second")},
        engine_factory=SleepyEngine,
    )
    ray.shutdown()
    cluster.shutdown()


def two_nodes() -> Any:
    """A head and a second node; on a busy machine Ray's half minute for a raylet's start may be too short once."""
    from ray.cluster_utils import Cluster

    node = {"object_store_memory": 100 * 2**20}
    for attempt in range(STARTS):
        cluster = None
        try:
            cluster = Cluster(
                initialize_head=True, head_node_args={"num_cpus": 6, "include_dashboard": False, **node}
            )
            cluster.add_node(num_cpus=4, **node)
            return cluster
        except Exception:
            if attempt == STARTS - 1:
                raise
            if cluster is not None:
                cluster.shutdown()
    raise AssertionError("unreachable")


def start(folder: Path, rows: int, quick: bool) -> subprocess.Popen[bytes]:
    """A driver in a session of its own."""
    package = TESTS.parent / "platform"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package), str(TESTS)]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    command = [sys.executable, __file__, "--drive", str(folder), "--rows", str(rows)]
    command += ["--quick"] if quick else []
    log = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, env=environment)


def finished_files(folder: Path) -> dict[str, int]:
    """When each finished shard was written."""
    return written_at(folder, (folder / "out").glob("steps/*/round-*/rows/part-*.parquet"))


def kill(kind: str, driver: subprocess.Popen[bytes], draw: random.Random) -> str:
    """Kill one process of a kind, or stop it for a while; the kind, empty if there was none."""
    if kind == "driver":
        stop(driver)
        return "driver"
    if kind == "raylet":
        raylets = started(driver.pid, "raylet/raylet")
        if len(raylets) > 1:
            raylets[-1].send_signal(signal.SIGKILL)
            return "raylet"
        return ""
    actors = started(driver.pid, "MapBatches(PoolActor)")
    if not actors:
        return ""
    if kind == "slow":
        pause(draw.choice(actors), SLOW_SECONDS)
    else:
        draw.choice(actors).send_signal(signal.SIGKILL)
    return kind


def content(folder: Path) -> dict[str, Any]:
    """All rows by file."""
    from embedloom.core.storage import Place

    place = Place(str(folder / "out"))
    names = [name for kind in ("tasks", "pairs", "rejects") for name in place.names(kind, ".parquet")]
    return {name: place.read_table(name).to_pylist() for name in names}


def drill(folder: Path, rows: int, kinds: list[str], seed: int, quick: bool = False) -> dict[str, Any]:
    """Run both ways and compare; returns what happened."""
    draw = random.Random(seed)
    calm, killed = folder / "calm", folder / "killed"
    for one in (calm, killed):
        one.mkdir(parents=True)
    if start(calm, rows, quick).wait(LIMIT_SECONDS):
        raise RuntimeError(f"the calm run failed; see {folder / 'calm.log'}")
    expected = content(calm)
    parts = sum(name.startswith(("pairs", "tasks")) for name in expected)
    targets = sorted(draw.randrange(0, max(1, parts - 1)) for _ in kinds)
    killings: Counter[str] = Counter()
    rewritten: list[str] = []
    seen: dict[str, int] = {}
    driver = start(killed, rows, quick)
    deadline = time.monotonic() + LIMIT_SECONDS

    def look() -> int:
        assert time.monotonic() < deadline, f"no end in sight; see {folder / 'killed.log'}"
        now = finished_files(killed)
        rewritten.extend(name for name, written in now.items() if seen.get(name, written) != written)
        seen.update(now)
        time.sleep(0.01)
        return len(seen)

    for kind, target in zip(kinds, targets, strict=True):
        while driver.poll() is None and look() < target:
            pass
        time.sleep(draw.uniform(0, 0.3))
        done = ""
        while driver.poll() is None and not done:
            done = kill(kind, driver, draw)
            look()
        killings[done] += 1
        if done == "driver":
            driver = start(killed, rows, quick)
    while driver.poll() is None:
        look()
    found = content(killed)
    ids = [row["id"] for name, part in found.items() if name.startswith(("pairs", "rejects")) for row in part]
    return {
        "rows": sum(len(part) for name, part in found.items() if name.startswith("pairs")),
        "shards": parts,
        "killed": dict(killings),
        "exit": driver.returncode,
        "twice": len(ids) - len(set(ids)),
        "rewritten": rewritten,
        "different": sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)),
    }


def main() -> None:
    """Command line of the drill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="new folder for inputs and outputs; default: a temporary one"
    )
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one generator, no tasks")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive is not None:
        drive(arguments.drive, arguments.rows, arguments.quick)
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="el-drill-", dir="/tmp"))
    draw = random.Random(arguments.seed)
    kinds = [KINDS[n % len(KINDS)] for n in range(arguments.kills)]
    draw.shuffle(kinds)
    result = drill(folder, arguments.rows, kinds, arguments.seed, arguments.quick)
    print(json.dumps(result))
    failed = result["exit"] or result["different"] or result["rewritten"] or result["twice"]
    if not failed and arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
