"""The kill drill of evaluation: killed with -9 at random points, it must end with the result files of a calm run.

    python tests/drills/evaluate_kills.py [--model MODEL] [--kills 10] [--seed 0] [--types sts ...] [--folder FOLDER]

Scores two models and BM25 on small tasks of every local type, once undisturbed and once with kills of the whole
process group, each at a drawn number of finished files and a drawn fraction of a second later. Then compares mteb's
result files (all but dates and durations), items, vectors and ``scores.json``.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from drills.comparing import differences
from drills.processes import run_until
from fakes_tasks import make_local_tasks

SHARD_TEXTS = 6


def work(model: Path, tasks: Path, out: Path) -> None:
    """One evaluation in a Ray of its own; continues where the last one stopped."""
    from embedloom.cluster.session import ray_session
    from embedloom.config.cluster import AuthConfig, Profile
    from embedloom.encoder.registry import resolve_model

    folder = resolve_model(str(model))
    with ray_session(Profile(logical_cpus=8, object_store_mib=100), AuthConfig()):
        evaluate_here(folder, tasks, out)


def evaluate_here(folder: Path, tasks: Path, out: Path) -> None:
    """The same in the connected Ray, as the pipeline does it."""
    from embedloom.config.cluster import PoolConfig
    from embedloom.config.evaluation import EvaluationConfig, EvaluationTask
    from embedloom.core.artefacts import ArtefactWriter
    from embedloom.core.storage import Place
    from embedloom.evaluation.stage import evaluate

    config = EvaluationConfig(
        tasks=(EvaluationTask(name="local", kind="local", path=str(tasks)),),
        baselines=("bm25", "teacher"),
        shard_texts=SHARD_TEXTS,
        resamples=100,
    )
    writer = ArtefactWriter(Place(str(out)), "evaluation", "drill", {}, "local")
    evaluate(config, None, {"one": folder}, ("two", folder), PoolConfig(max_actors=2), writer, "float32")


def finished_files(out: Path) -> set[str]:
    """Files that count as done work."""
    return {
        path.relative_to(out).as_posix()
        for folder in ("_vectors", "items", "units")
        for path in (out / folder).rglob("*.*")
        if path.is_file() and not path.name.startswith("_tmp")
    }


def make_tasks(folder: Path, types: list[str]) -> Path:
    """Small local tasks of the named types, or of all."""
    tasks = make_local_tasks(folder / "tasks")
    for kind in [path for path in tasks.iterdir() if types and path.name not in types]:
        shutil.rmtree(kind)
    return tasks


def drill(model: Path, tasks: Path, calm: Path, killed: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill an evaluation, let it end, and compare it with an undisturbed one; returns what happened."""
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--model",
        str(model),
        "--folder",
        str(tasks),
        "--work",
    ]
    total = len(finished_files(calm))
    draw = random.Random(seed)
    targets = sorted(draw.randrange(0, total) for _ in range(kills))
    moments = []
    for target in targets:
        again = [*arguments, str(killed)]
        alive, done = run_until(again, lambda: finished_files(killed), target, draw.uniform(0, 0.3))
        if alive:
            moments.append(done)
    subprocess.run([*arguments, str(killed)], check=True, stdout=subprocess.DEVNULL)
    return {
        "files": total,
        "kills": len(moments),
        "files_at_kills": moments,
        "different": differences(calm, killed),
    }


def main() -> None:
    """Command line of the drill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("minilm-l6"), help="a folder or a registry name")
    parser.add_argument("--folder", type=Path, help="new folder; default: a temporary one")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--types", nargs="*", default=[], help="task types; default: all")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.model, options.folder, options.work)
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="embedloom-drill-"))
    folder.mkdir(parents=True, exist_ok=True)
    tasks, calm, killed = make_tasks(folder, options.types), folder / "calm", folder / "killed"
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--model",
        options.model,
        "--folder",
        tasks,
        "--work",
        calm,
    ]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    result = drill(options.model, tasks, calm, killed, options.kills, options.seed)
    print(json.dumps(result))
    sys.exit(bool(result["different"]))


if __name__ == "__main__":
    main()
