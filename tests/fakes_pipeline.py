"""The config of a whole run on tiny models, which takes seconds."""

import json
from pathlib import Path

import yaml

TOPICS = [
    "rivers",
    "graphs",
    "sorting",
    "matrices",
    "lists",
    "colours",
    "planets",
    "numbers",
    "letters",
    "trees",
]


def write_config(folder: Path, base: Path, teacher: Path) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "corpus.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "_id": f"d{i}",
                    "title": "",
                    "text": f"{TOPICS[i % 10]} chapter {i}: about {TOPICS[i % 10]} and more",
                }
            )
            + "\n"
            for i in range(60)
        )
    )
    (corpus / "queries.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"q{i}", "text": f"what is chapter {i} on {TOPICS[i % 10]}?"}) + "\n"
            for i in range(60)
        )
    )
    (corpus / "qrels").mkdir()
    (corpus / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(60))
    )
    content = {
        "run": {"name": "smoke", "output_dir": str(folder / "runs")},
        "corpus": {
            "sources": [{"format": "beir", "path": str(corpus)}],
            "min_characters": 5,
            "near_duplicate_threshold": None,
            "chunk_tokens": None,
            "split": {"dev": 0.1, "test": 0.3},
        },
        "mining": {
            "teachers": [str(teacher)],
            "top_k": 20,
            "selection": {"negatives": 2, "margin_ratio": 1.0},
            "max_query_tokens": 128,
        },
        "encoder": {"base": str(base), "max_query_tokens": 128, "max_document_tokens": 64},
        "training": {
            "mix": {"public": 1},
            "candidates": [
                {"name": "alpha", "seed": 1},
                {"name": "beta", "seed": 2, "learning_rate_scale": 0.5},
            ],
            "stages": [
                {
                    "name": "pretrain",
                    "negatives": 2,
                    "global_batch": 4,
                    "learning_rate": 0.001,
                    "max_steps": 2,
                }
            ],
            "zero_stage": 0,
        },
    }
    path = folder / "smoke.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
