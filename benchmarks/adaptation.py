"""Domain adaptation: the same recipe on every retrieval set, zero-shot beside adapted, BM25 and hybrid searches.

    python benchmarks/adaptation.py [--quick] [--json] [--data ../shared/data/tasks] [--set NAME ...] [--recipe pairs|documents]
        [--pairs 300] [--queries 300] [--documents N] [--steps 60 20] [--out runs/adaptation] [--seed 1] [--threads N]

Work: each set is a corpus and judged queries, English, as that is what MiniLM reads (tldr_cmd: commands, asked for in English;
qed_sentence: all sentences of its corpus). ``pairs``: MiniLM is trained on 300 judged pairs of the dev split, against negatives
that it mines itself in the documents. ``documents``: on 80 queries that SmolLM2 writes about the documents, and no judged one. Both
are the corpus, synthesis, mining and training of the config that is written to ``--out``, as of ``quickstart.yaml``. Scored by
``embedloom evaluate``'s own code on queries of the test split: nDCG@10; differences are paired by query, with 95 %
bootstrap intervals; hybrid fuses the adapted model with BM25 by the endpoint's defaults. ``--documents`` leaves out documents
that answer none of the queries beyond so many (chosen by hash); ``threads`` below the cores is for a machine with company. What
was stopped goes on where it was, and finished sets are read. ``ratio`` is adapted over zero-shot, on the mean of the sets.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SETS = {
    "nq_qed": ("retrieval/nq_qed", "eng"),
    "xquad": ("retrieval/xquad", "eng"),
    "debian_desc": ("retrieval/debian_desc", "eng"),
    "tldr_cmd": ("retrieval/tldr_cmd", "code-sh"),
    "qed_sentence": ("reranking/qed_sentence", "eng"),
}
RESAMPLES = 2000


def drawn(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    """So many rows, by hash of their ids."""
    order = frame["id"].map(lambda value: hashlib.sha256(str(value).encode()).hexdigest())
    return frame.loc[order.sort_values(kind="stable").index[:rows]].sort_index()


def write_set(source: Path, language: str, options: argparse.Namespace, out: Path) -> dict[str, int]:
    """The set as a BEIR folder: pairs of the dev split as train judgements, queries of the test split."""
    corpus = pd.read_parquet(source / "corpus.parquet")
    corpus = corpus[corpus["lang"] == language]
    asked = pd.read_parquet(source / "queries.parquet")
    asked = asked[asked["lang"] == "eng"]
    qrels = pd.read_parquet(source / "qrels.parquet")
    qrels = qrels[(qrels["score"] > 0) & qrels["doc_id"].isin(corpus["id"])]
    asked = asked[asked["id"].isin(qrels["query_id"])]
    parts = {
        "train": drawn(asked[asked["split"] == "dev"], options.pairs),
        "test": drawn(asked[asked["split"] == "test"], options.queries),
    }
    if options.documents:
        judged = corpus["id"].isin(
            qrels.loc[qrels["query_id"].isin(pd.concat(list(parts.values()))["id"]), "doc_id"]
        )
        others = drawn(corpus[~judged], max(0, options.documents - int(judged.sum())))
        corpus = pd.concat([corpus[judged], others]).sort_index()
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    titles = corpus["title"].fillna("") if "title" in corpus else [""] * len(corpus)
    _lines(out / "corpus.jsonl", corpus["id"], corpus["text"], titles)
    both = pd.concat(list(parts.values()))
    _lines(out / "queries.jsonl", both["id"], both["text"], [""] * len(both))
    for name, frame in parts.items():
        own = qrels[qrels["query_id"].isin(frame["id"])]
        rows = own[["query_id", "doc_id", "score"]].rename(
            columns={"query_id": "query-id", "doc_id": "corpus-id"}
        )
        rows.to_csv(out / "qrels" / f"{name}.tsv", sep="\t", index=False)
    return {"documents": len(corpus), "pairs": len(parts["train"]), "queries": len(parts["test"])}


def _lines(path: Path, ids: Any, texts: Any, titles: Any) -> None:
    rows = zip(ids, texts, titles, strict=True)
    content = "".join(json.dumps({"_id": i, "title": title, "text": text}) + "\n" for i, text, title in rows)
    path.write_text(content, encoding="utf-8")


def config_of(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run config of one set."""
    source: dict[str, Any] = {"format": "beir", "path": str(folder), "name": name}
    written = options.recipe == "documents"
    if written:
        source = {"format": "jsonl", "path": str(folder / "corpus.jsonl"), "name": name, "id_column": "_id",
                  "title_column": "title"}  # fmt: skip
    steps = options.steps
    stage = {"max_document_tokens": 128}
    training = {
        "loss": "qwen3", "temperature": 0.05, "weight_decay": 0.01, "zero_stage": 1,
        "freeze_token_embeddings": True, "micro_batch_tokens": 8192, "checkpoint_every_steps": 50,
        "mix": {"synthetic": 1.0} if written else {"public": 1.0},
        "stages": [
            {"name": "pretrain", "negatives": 1, "global_batch": 32, "learning_rate": 1.0e-4, "max_steps": steps[0],
             "warmup_steps": max(1, steps[0] // 10), **stage},
            {"name": "finetune", "negatives": 4, "global_batch": 16, "learning_rate": 5.0e-5, "max_steps": steps[1],
             "warmup_steps": max(1, steps[1] // 10), **stage},
        ],
        "runs": [{"name": "adapted", "seed": options.seed}],
    }  # fmt: skip
    config: dict[str, Any] = {
        "run": {"name": f"{name}-{options.recipe}", "seed": 42, "output_dir": str(options.out / "runs")},
        "corpus": {
            "sources": [source], "min_characters": 2, "near_duplicate_threshold": None, "chunk_tokens": None,
            "split": {"dev": 0, "test": 0},
        },
        "mining": {
            "teachers": ["minilm-l6"], "top_k": 100, "max_query_tokens": 64, "max_document_tokens": 128,
            "selection": {"method": "perc_pos", "margin_ratio": 0.95, "negatives": 4},
        },
        "encoder": {"base": "minilm-l6", "template": "{text}", "max_query_tokens": 64, "max_document_tokens": 256},
        "training": training,
    }  # fmt: skip
    if written:
        config["synthesis"] = {
            "generators": [{"model": "smollm2-135m", "small": True}], "expected_acceptance": 0.8, "shard_rows": 32,
            "families": [{"family": "seed_queries", "rows": 16 if options.quick else 80,
                          "max_document_characters": 240, "max_new_tokens": 48}],
        }  # fmt: skip
    return config


def cluster_of(options: argparse.Namespace) -> dict[str, Any]:
    """A profile of one actor and one training worker, each of so many threads."""
    pool = {"min_actors": 1, "max_actors": 1, "cpus": 1, "threads": options.threads}
    stages: dict[str, Any] = dict.fromkeys(
        ("synthesis", "mining", "embedding", "evaluation", "merging"), pool
    )
    stages["training"] = {"workers": 1, "cpus": 1, "threads": options.threads}
    return {
        "version": 1, "ray": {"version": version("ray"), "python": "3.11", "image": "none:0"}, "auth": {"mode": "token"},
        "profiles": {"local": {"backend": "local", "logical_cpus": 8, "object_store_mib": 512, "stages": stages}},
    }  # fmt: skip


def scored(name: str, folder: Path, run: Path, options: argparse.Namespace) -> dict[str, "pd.Series[float]"]:
    """nDCG@10 of every query, by what searched for it."""
    from embedloom.cluster.session import ray_session
    from embedloom.config.cluster import AuthConfig, PoolConfig, Profile
    from embedloom.config.evaluation import EvaluationConfig
    from embedloom.core.artefacts import ArtefactWriter, fingerprint
    from embedloom.core.storage import Place

    models = {"base": run / "encoder", "adapted": run / "training/adapted/finetune"}
    task = {"name": name, "kind": "beir", "path": str(folder), "split": "test"}
    config = EvaluationConfig.model_validate({"tasks": [task], "baselines": ["bm25", "hybrid"]})
    place = Place(str(options.out / "evaluation" / run.name))
    if not place.exists("manifest.json"):
        settings = fingerprint(config.model_dump(mode="json"), str(options.seed))
        writer = ArtefactWriter(place, "evaluation", settings, {}, "local")
        pool = PoolConfig(threads=options.threads)
        with ray_session(Profile(logical_cpus=8, object_store_mib=512), AuthConfig()):
            from embedloom.evaluation.stage import (
                evaluate,  # imports Ray, which the session has told how to authenticate
            )

            evaluate(config, None, models, None, pool, writer, "auto", Place(str(options.out / "vectors")))
    kept = {
        "zero_shot": "models/base",
        "adapted": "models/adapted",
        "bm25": "baselines/bm25",
        "hybrid": "baselines/hybrid",
    }
    return {key: _items(place.local / "items" / path / name) for key, path in kept.items()}


def _items(folder: Path) -> "pd.Series[float]":
    table = pd.concat([pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))])
    return table.set_index("item")["value"].sort_index()


def interval(differences: Any, seed: int = 0) -> tuple[float, float, float]:
    """Mean, and the bounds of its 95 % bootstrap interval over queries."""
    values = np.asarray(differences, float)
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def verdict(low: float, high: float) -> str:
    """win, loss or tie: on which side of 0 the interval lies."""
    return "win" if low > 0 else "loss" if high < 0 else "tie"


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Adapt to one set and put its scores side by side."""
    path, language = SETS[name]
    folder = options.out / "sets" / name
    sizes = write_set(options.data / path, language, options, folder)
    config, cluster = options.out / f"{name}-{options.recipe}.yaml", options.out / "cluster.yaml"
    config.write_text(
        json.dumps(config_of(name, folder, options), indent=1), encoding="utf-8"
    )  # JSON is YAML
    cluster.write_text(json.dumps(cluster_of(options), indent=1), encoding="utf-8")
    for verb in ("synthesize", "mine", "train") if options.recipe == "documents" else ("mine", "train"):
        command = [sys.executable, "-m", "embedloom", verb, str(config), "--cluster", str(cluster)]
        subprocess.run(command, stdout=sys.stderr, check=True)
    scores = scored(name, folder, options.out / "runs" / f"{name}-{options.recipe}", options)
    row: dict[str, Any] = {"set": name, **sizes}
    row |= {f"{key}_ndcg_at_10": round(float(found.mean()), 4) for key, found in scores.items()}
    for key in ("zero_shot", "bm25"):
        mean, low, high = interval(scores["adapted"] - scores[key])
        row[f"adapted_over_{key}"] = [round(value, 4) for value in (mean, low, high)]
        row[f"against_{key}"] = verdict(low, high)
    best = max(("adapted", "bm25"), key=lambda key: float(scores[key].mean()))
    row["hybrid_over_best"] = [round(value, 4) for value in interval(scores["hybrid"] - scores[best])]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small set, a tenth of the steps")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tasks"))
    parser.add_argument("--set", action="append", choices=list(SETS), help="repeatable; default: all")
    parser.add_argument("--pairs", type=int, default=300, help="judged queries of the dev split, at most")
    parser.add_argument("--recipe", choices=("pairs", "documents"), default="pairs")
    parser.add_argument("--queries", type=int, default=300, help="queries of the test split, at most")
    parser.add_argument("--documents", type=int, help="documents of a set, at most; default: all")
    parser.add_argument("--steps", type=int, nargs=2, default=(60, 20), help="of the two stages")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("runs/adaptation"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.quick:
        options.out, options.queries = options.out / "quick", min(options.queries, 50)
        options.steps, options.pairs = (4, 2), min(options.pairs, 64)
    options.out, options.data = options.out.absolute(), options.data.absolute()
    if not options.data.is_dir():
        raise SystemExit(
            f"--data: {options.data} is not there; it holds retrieval/NAME/ with corpus, queries and qrels"
        )
    rows = [compare(name, options) for name in options.set or (["xquad"] if options.quick else list(SETS))]
    means = {
        key: float(np.mean([row[f"{key}_ndcg_at_10"] for row in rows]))
        for key in ("zero_shot", "adapted", "bm25", "hybrid")
    }
    counts = {kind: sum(row["against_zero_shot"] == kind for row in rows) for kind in ("win", "tie", "loss")}
    result = {
        "name": "adaptation", "ours": round(means["adapted"], 4), "peer": round(means["zero_shot"], 4),
        "peer_name": "MiniLM zero-shot", "ratio": round(means["adapted"] / means["zero_shot"], 3), "unit": "nDCG@10",
        "equal": None,
        "work": {"recipe": options.recipe, "means": {key: round(value, 4) for key, value in means.items()},
                 "against_zero_shot": counts, "rows": rows},
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
