"""Evaluation beside plain mteb with sentence-transformers: the same model, tasks and metrics, wall time and scores.

    python benchmarks/evaluate.py [--quick] [--json] [--tasks FOLDER] [--actors 2]

Work: minilm-l6 on local tasks of every type, cut to some languages, queries and documents (``../shared/data/tasks``;
without it, tasks made from docstrings of the standard library). Ours: Ray actors of one thread each over a common
store of vectors; the peer: one process, torch on all cores, mteb's and sentence-transformers' own defaults. Both
clocks start when the model is loaded and stop when the last result file is written; start-up is told apart. Every main
score of every subset is compared.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

MODEL = "minilm-l6"
LANGUAGES = ("eng", "deu", "spa", "rus", "ind", "nld")
BUDGETS = {
    "full": (25, 100, 150),
    "quick": (12, 60, 120),
}  # queries and documents a language, rows of a table
QUICK_TASKS = ("tldr_cmd", "qed_sentence", "stsb_multi_mt", "stackoverflow_titles")
TOLERANCE = 1e-4


def drawn(frame: pd.DataFrame, column: str, rows: int) -> pd.DataFrame:
    order = frame[column].map(lambda value: hashlib.sha256(str(value).encode()).hexdigest())
    return frame.loc[order.sort_values(kind="stable").index[:rows]].sort_index()


def cut_tasks(source: Path, target: Path, budget: tuple[int, int, int], only: tuple[str, ...]) -> None:
    queries, documents, rows = budget
    for path in sorted(source.rglob("*.parquet")):
        if path.name not in ("corpus.parquet", "queries.parquet", "qrels.parquet", "qrels_to_eng.parquet"):
            if not only or path.stem in only:
                frame = pd.read_parquet(path)
                lang = "lang1" if "lang1" in frame else "lang"
                frame = frame[frame[lang].isin(LANGUAGES) & frame["split"].isin(["train", "test"])]
                parts = [drawn(part, frame.columns[0], rows * (3 if key[1] == "train" else 1))
                         for key, part in frame.groupby([lang, "split"])]  # fmt: skip
                write(pd.concat(parts), target / path.relative_to(source))
        elif path.name == "corpus.parquet" and (not only or path.parent.name in only):
            cut_retrieval(path.parent, target / path.parent.relative_to(source), queries, documents)


def cut_retrieval(source: Path, target: Path, queries: int, documents: int) -> None:
    asked = pd.read_parquet(source / "queries.parquet")
    asked = asked[asked["lang"].isin(LANGUAGES) & (asked["split"] == "test")]
    asked = pd.concat([drawn(part, "id", queries) for _, part in asked.groupby("lang")])
    corpus = pd.read_parquet(source / "corpus.parquet")
    judged = [pd.read_parquet(path) for path in sorted(source.glob("qrels*.parquet"))]
    judged = [frame[frame["query_id"].isin(asked["id"])] for frame in judged]
    wanted = corpus["id"].isin(pd.concat(judged)["doc_id"])
    others = pd.concat(
        [drawn(part, "id", documents) for _, part in corpus[~wanted].groupby("lang")] or [corpus[:0]]
    )
    write(asked, target / "queries.parquet")
    write(
        pd.concat([corpus[wanted], others[others["lang"].isin([*LANGUAGES, "code-sh"])]]),
        target / "corpus.parquet",
    )
    for path, frame in zip(sorted(source.glob("qrels*.parquet")), judged, strict=True):
        write(frame, target / path.name)


def docstring_tasks(target: Path, budget: tuple[int, int, int]) -> None:
    found = {}
    for module in map(
        importlib.import_module, ("argparse", "asyncio", "inspect", "random", "shutil", "statistics")
    ):
        for name, member in sorted(vars(module).items()):
            head, _, rest = (inspect.getdoc(member) or "").partition("\n")
            if callable(member) and len(rest.strip()) > 40 and head not in found:
                found[head] = (f"{module.__name__}.{name}", rest.strip(), module.__name__)
    rows = [
        {"id": key, "head": head, "text": text, "label": label} for head, (key, text, label) in found.items()
    ]
    frame = pd.DataFrame(rows)[: budget[1]].assign(lang="eng", split="test", title="")
    folder = target / "retrieval/docs"
    write(frame[["id", "text", "title", "lang"]], folder / "corpus.parquet")
    write(frame[["id", "head", "lang", "split"]].rename(columns={"head": "text"}), folder / "queries.parquet")
    write(
        pd.DataFrame({"query_id": frame["id"], "doc_id": frame["id"], "score": 1}), folder / "qrels.parquet"
    )
    table = frame[["text", "label", "lang", "split"]]
    write(pd.concat([table, table.assign(split="train")]), target / "classification/modules.parquet")
    write(table, target / "clustering/modules.parquet")


def write(frame: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)


def specs_of(folder: str) -> list[Any]:
    from embedloom.config.evaluation import EvaluationTask
    from embedloom.evaluation.specs import expand_tasks

    return expand_tasks([EvaluationTask(name="bench", kind="local", path=folder)])


def run_ours(folder: str, actors: int) -> dict[str, Any]:
    from embedloom.cluster.session import ray_session
    from embedloom.config.cluster import AuthConfig, PoolConfig, Profile

    session = ray_session(Profile(logical_cpus=8, object_store_mib=200), AuthConfig())
    with tempfile.TemporaryDirectory(prefix="embedloom-bench-") as scratch, session:
        from embedloom.core.storage import Place
        from embedloom.encoder.registry import resolve_model
        from embedloom.evaluation.evaluator import Evaluator
        from embedloom.evaluation.jobs import Unit
        from embedloom.evaluation.scorers import make_scorers

        specs, pool = specs_of(folder), PoolConfig(max_actors=actors, threads=1)
        scorers, contracts = make_scorers({"minilm": resolve_model(MODEL)}, (), None)
        place = Place(scratch)
        begun = time.monotonic()
        with Evaluator(specs, None, pool, place, place.child("v"), "float32", 1024) as evaluator:
            evaluator.warm(scorers[0])
            started = time.monotonic()
            failures = evaluator.score([Unit(scorers[0], spec) for spec in specs], contracts)
            seconds = time.monotonic() - started
        results = Path(scratch, scorers[0].result_folder)
        return {
            "seconds": seconds,
            "start": started - begun,
            "failures": failures,
            "scores": read_results(results),
        }


def run_peer(folder: str) -> dict[str, Any]:
    import mteb
    from mteb.cache import ResultCache
    from sentence_transformers import SentenceTransformer

    from embedloom.encoder.registry import resolve_model
    from embedloom.evaluation.tasks import build_task

    begun = time.monotonic()
    model = SentenceTransformer(str(resolve_model(MODEL)), device="cpu")
    model.encode(["a query"] * 4)
    with tempfile.TemporaryDirectory(prefix="embedloom-bench-") as scratch:
        started = time.monotonic()
        tasks = [build_task(spec, None) for spec in specs_of(folder)]
        mteb.evaluate(model, tasks, cache=ResultCache(scratch), co2_tracker=False, show_progress_bar=False)
        seconds = time.monotonic() - started
        (results,) = {path.parent for path in Path(scratch).rglob("model_meta.json")}
        return {"seconds": seconds, "start": started - begun, "scores": read_results(results)}


def read_results(folder: Path) -> dict[str, float]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        for split, entries in json.loads(path.read_text()).get("scores", {}).items():
            found |= {f"{path.stem}/{split}/{entry['hf_subset']}": entry["main_score"] for entry in entries}
    return found


def side(name: str, folder: str, actors: int) -> dict[str, Any]:
    threads = "1" if name == "ours" else str(os.cpu_count())
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--side",
        name,
        "--folder",
        folder,
        "--actors",
        str(actors),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{name} failed:\n{run.stderr[-2000:]}")
    return dict(json.loads(run.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tasks", type=Path, default=Path(__file__).parents[2] / "shared/data/tasks")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--side", choices=("ours", "peer"))
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.side:
        found = (
            run_ours(options.folder, options.actors) if options.side == "ours" else run_peer(options.folder)
        )
        print(json.dumps(found))
        return
    folder = Path(tempfile.mkdtemp(prefix="embedloom-bench-tasks-"))
    try:
        size = "quick" if options.quick else "full"
        if options.tasks.is_dir():
            cut_tasks(options.tasks, folder, BUDGETS[size], QUICK_TASKS if options.quick else ())
        else:
            docstring_tasks(folder, BUDGETS[size])
        ours, peer = side("ours", str(folder), options.actors), side("peer", str(folder), 1)
    finally:
        shutil.rmtree(folder)
    report(ours, peer, options)


def report(ours: dict[str, Any], peer: dict[str, Any], options: argparse.Namespace) -> None:
    far = max((abs(peer["scores"][key] - ours["scores"].get(key, 9)) for key in peer["scores"]), default=9.0)
    result = {
        "name": "evaluate", "ours": round(ours["seconds"], 1), "peer": round(peer["seconds"], 1),
        "peer_name": "mteb + sentence-transformers", "ratio": round(peer["seconds"] / ours["seconds"], 2), "unit": "s",
        "equal": far <= TOLERANCE and ours["scores"].keys() == peer["scores"].keys(),
        "work": {"model": MODEL, "subsets": len(peer["scores"]), "largest_score_difference": far, "actors": options.actors,
                 "start_seconds": [round(ours["start"], 1), round(peer["start"], 1)], "failures": ours["failures"],
                 "tasks": sorted({key.split("/")[0] for key in peer["scores"]})},
    }  # fmt: skip
    if not options.json:
        print(
            f"{result['ours']} s against {result['peer']} s, ratio {result['ratio']}, scores differ by at most {far:g}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
