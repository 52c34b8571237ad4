"""A run folder as the pipeline leaves it, with made-up but consistent artefacts; for the report and lineage tests."""

import json
from pathlib import Path

from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from fakes_evaluation import document, make_corpus, pair

SCORES = {
    "models": {
        "base": {"heldout": 0.14321, "folder": 0.2},
        "a": {"heldout": 0.41, "folder": 0.5},
        "b": {"heldout": 0.42, "folder": 0.45},
        "merged": {"heldout": 0.43219, "folder": 0.51},
    },
    "baselines": {"bm25": {"heldout": 0.61}, "teacher": {"heldout": 0.7, "folder": 0.8}},
    "teacher": "minilm-l6",
    "order": {
        "models": ["base", "b", "a", "merged"],
        "baselines": ["teacher", "bm25"],
        "tasks": ["heldout", "folder"],
    },
    "metrics": {
        "models": {"merged": {"heldout": {"main_score": 0.43219, "ndcg_at_10": 0.43219, "mrr_at_10": 0.38}}},
        "baselines": {"teacher": {"heldout": {"main_score": 0.7, "ndcg_at_10": 0.7, "mrr_at_10": 0.6}}},
    },
}


def begin(run: Place, name: str, kind: str, **inputs: Artefact) -> ArtefactWriter:
    """Open a writer; ``inputs`` are artefacts by name, with ``__`` for ``/``."""
    recorded = {key.replace("__", "/"): artefact.fingerprint for key, artefact in inputs.items()}
    return ArtefactWriter(run.child(name), kind, f"config of {name}", recorded, "local")


def make_run(folder: Path, *, scores: bool = True) -> Place:
    """Corpus, synthesis, mining, base, two candidates of two stages, merged model and, if asked, scores."""
    run = Place(str(folder))
    corpus = make_corpus(folder / "corpus", split="train")
    natural = corpus.place.read_tables("pairs/train", "pairs").to_pylist()[0]
    encoder = begin(run, "encoder", "model").commit({"parameters": 1000}, {"base": "smollm2-135m"}, seconds=2)

    out = begin(run, "synthesis", "synthesis", corpus=corpus)
    written = pair(
        "made", "How do I zip a folder?", "doc-zip", origin="synthetic", generator="smol", prompt_hash="p123"
    )
    out.place.write_table("pairs/part-000000.parquet", table_from_rows("pairs", [written]))
    rejects = [{"id": "doc-sort", "reason": "not_json", "detail": "<b>no</b>"}]
    out.place.write_table("rejects/part-000000.parquet", table_from_rows("rejects", rejects))
    synthesis = out.commit(
        {"rows": 1, "tokens": 12345, "rejects": {"not_json": 1}}, {"prompt": "seed_query"}, seconds=75
    )

    out = begin(run, "mining", "mining", corpus=corpus, synthesis=synthesis)
    candidates = {
        "query_id": natural["id"], "document_ids": ["doc-sort", "doc-http"], "scores": [0.5, 0.25],
        "teacher": "minilm-l6", "contract_hash": "c123",
    }  # fmt: skip
    example = {
        "id": natural["id"], "query": natural["query"], "query_instruction": natural["instruction"],
        "positive": str(document("zip", "the positive")["text"]), "positive_score": 0.75, "negatives": ["a negative"],
        "negative_scores": [0.5], "task_type": "retrieval", "dataset": "public",
    }  # fmt: skip
    out.place.write_table("candidates/part-000000.parquet", table_from_rows("candidates", [candidates]))
    mining = out.commit({"rows": 1}, {"teachers": ["minilm-l6"]}, seconds=30)
    out = begin(run, "examples", "examples", mining=mining, corpus=corpus)
    out.place.write_table("examples/part-000000.parquet", table_from_rows("examples", [example]))
    examples = out.commit({"rows": 1}, {"teachers": ["minilm-l6"]}, seconds=3)

    last = {}
    for number, candidate in enumerate("ab"):
        out = begin(run, f"training/{candidate}/pretrain", "model", examples=examples, encoder=encoder)
        first = out.commit(
            {"rows": 64, "steps": 3}, {"loss_curve": [[1, 2.5], [2, 1.5], [3, 1.0 - number / 10]]}, seconds=60
        )
        before = {f"training__{candidate}__pretrain": first}
        out = begin(run, f"training/{candidate}/finetune", "model", examples=examples, **before)
        last[f"training__{candidate}__finetune"] = out.commit(
            {"rows": 32}, {"loss_curve": [[1, 0.8], [2, 0.5]]}, seconds=40
        )
    merged = begin(run, "merged", "model", **last).commit({"tensors": 9}, {"method": "linear"}, seconds=1)
    if scores:
        out = begin(run, "evaluation", "evaluation", corpus=corpus, encoder=encoder, **last, merged=merged)
        out.place.write_json("scores.json", SCORES)
        tasks = {"heldout": {"type": "Retrieval", "metric": "ndcg_at_10", "queries": 1200, "documents": 1500}}
        out.commit({"rows": 6, "tokens": 999}, {"tasks": tasks}, seconds=20)
    return run


def unfinished_training(run: Place, candidate: str, losses: list[float]) -> None:
    """A stage that is running: begun, with a metrics file whose last line is cut."""
    out = begin(run, f"training/{candidate}/pretrain", "model")
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, start=1)]
    out.place.write_bytes("metrics.jsonl", ("\n".join(lines) + '\n{"step": 9').encode())
