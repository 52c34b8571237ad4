"""What distillation adds to contrastive training: the same student, examples, steps and seeds, with and without a teacher.

    python benchmarks/quality/distillation.py --run runs/quickstart [--quick] [--json] [--seeds 1 2 3] [--steps N]
        [--layers N] [--learning-rate R] [--loss infonce] [--variant NAME=JSON ...]

Work: the mined examples of a run (``embedloom mine CONFIG`` makes them), whose scores of the teacher are what is distilled;
a student of SmolLM2-135M's first layers, frozen token embeddings, trained from the same untrained base for each variant and
seed; nDCG@10 of the run's held-out test split. Each variant is compared with the first, contrastive alone, query by query:
mean over the seeds, and a 95 % bootstrap interval over the queries. ``--variant`` names further sections of
``training.distillation``. ``ratio`` is the best variant's nDCG@10 over the first's.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS: dict[str, dict[str, Any] | None] = {
    "contrastive": None,
    "kl": {"loss": "kl", "temperature": 0.05},
    "margin_mse": {"loss": "margin_mse", "weight": 100.0},
}
TOKENS = 48


def prepare_model(layers: int, out: Path) -> None:
    """An untrained student."""
    from embedloom.config.encoder import EncoderConfig
    from embedloom.encoder.export import prepare_base
    from embedloom.encoder.registry import resolve_model

    config = EncoderConfig(
        base="smollm2-135m", num_layers=layers, max_query_tokens=TOKENS, max_document_tokens=TOKENS
    )
    out.mkdir()
    prepare_base(config, resolve_model("smollm2-135m"), out)


def trained(
    folder: Path, run: Path, section: dict[str, Any] | None, seed: int, arguments: argparse.Namespace
) -> Any:
    """The student after its steps."""
    from embedloom.config.training import TrainingConfig, TrainingSource, TrainingStage
    from embedloom.core.storage import Place
    from embedloom.training.data import prepare_sources
    from embedloom.training.loop import LoopConfig, StageTrainer

    source = TrainingSource(name="mined", format="examples", path=str(run / "examples"))
    stage = TrainingStage(
        name="bench", negatives=4, global_batch=arguments.batch, learning_rate=arguments.learning_rate,
        max_steps=arguments.steps, warmup_steps=arguments.steps // 20, sources=(source,),
    )  # fmt: skip
    training = TrainingConfig(
        runs=[{"name": "a", "seed": seed}], stages=[stage], loss=arguments.loss, zero_stage=0, micro_batch_tokens=16384,
        freeze_token_embeddings=True, distillation=section,
    )  # fmt: skip
    data, model = Place(str(folder / "data")), folder / "model"
    prepared = prepare_sources("bench", training, 4, (source,), None, model, data)
    folders = {name: index["folder"] for name, index in prepared.items()}
    loop = LoopConfig(
        "bench", training, stage, (source,), seed, 1.0, "auto", model, data, folders, Place(str(folder)), arguments.threads
    )  # fmt: skip
    trainer = StageTrainer(loop, 0, 1)
    for _ in range(arguments.steps):
        trainer.train_step()
    trainer.reader.close()
    trainer.encoder.backbone.eval()
    return trainer.encoder


def ndcg_at_10(encoder: Any, task: Any) -> np.ndarray[Any, Any]:
    """Score of each query of a retrieval task, all right answers alike: [queries]."""
    documents = encoder.embed([f"{title} {text}".strip() for _, title, text in task.documents], "document")
    asked = encoder.embed(
        [query.text for query in task.queries],
        "query",
        "retrieval",
        [query.instruction or None for query in task.queries],
    )
    places = {row[0]: at for at, row in enumerate(task.documents)}
    scores = []
    for query, similarities in zip(task.queries, asked @ documents.T, strict=True):
        right = {places[name] for name in task.qrels[query.id]}
        best = np.argsort(-similarities, kind="stable")[:10].tolist()
        gain = sum(1 / math.log2(rank + 2) for rank, at in enumerate(best) if at in right)
        scores.append(gain / sum(1 / math.log2(rank + 2) for rank in range(min(10, len(right)))))
    return np.array(scores)


def interval(differences: np.ndarray[Any, Any], resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference over queries."""
    drawn = np.random.default_rng(0).integers(0, len(differences), (resamples, len(differences)))
    low, high = np.quantile(differences[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run with corpus/ and examples/")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--loss", default="infonce")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", action="append", default=[], help="NAME=JSON of training.distillation")
    parser.add_argument("--only", nargs="+", help="names of the shipped variants beside the first")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps = arguments.seeds[:1], 10
    return arguments


def main() -> None:
    """Train and compare."""
    import torch
    import torch.distributed as dist

    from embedloom.core.artefacts import Artefact
    from embedloom.core.storage import Place
    from embedloom.evaluation.retrieval_task import read_heldout

    arguments = parse()
    variants = {
        name: one
        for name, one in VARIANTS.items()
        if name in [next(iter(VARIANTS)), *(arguments.only or VARIANTS)]
    }
    variants |= {
        name: json.loads(text) for name, _, text in (one.partition("=") for one in arguments.variant)
    }
    os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    torch.set_num_threads(arguments.threads)
    task = read_heldout(Artefact.open(Place(str(arguments.run / "corpus"))), "test", "heldout")
    found: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(folder / "rendezvous"), 1), rank=0, world_size=1
        )
        prepare_model(arguments.layers, folder / "model")
        for seed in arguments.seeds:
            for name, section in variants.items():
                scores = ndcg_at_10(trained(folder, arguments.run, section, seed, arguments), task)
                found[name].append(scores)
                print(f"seed {seed}, {name}: nDCG@10 {scores.mean():.4f}", flush=True)
        dist.destroy_process_group()
    report(found, arguments)


def report(found: dict[str, list[np.ndarray[Any, Any]]], arguments: argparse.Namespace) -> None:
    """Print the table, and the JSON line if it is asked for."""
    first, *others = found
    base = np.mean(found[first], axis=0)
    rows = {first: {"ndcg_at_10": float(base.mean())}}
    print(
        f"| variant | nDCG@10 | difference | 95 % | by seed |\n|---|---|---|---|---|\n| {first} | {base.mean():.4f} | | | |"
    )
    for name in others:
        mean = np.mean(found[name], axis=0)
        low, high = interval(mean - base)
        by_seed = [float((one - other).mean()) for one, other in zip(found[name], found[first], strict=True)]
        shown = ", ".join(f"{value:+.4f}" for value in by_seed)
        print(
            f"| {name} | {mean.mean():.4f} | {(mean - base).mean():+.4f} | {low:+.4f} to {high:+.4f} | {shown} |"
        )
        rows[name] = {"ndcg_at_10": float(mean.mean()), "low": low, "high": high}
    if arguments.json:
        best = max(row["ndcg_at_10"] for row in rows.values())
        work = {
            "queries": len(base), "steps": arguments.steps, "batch": arguments.batch, "seeds": arguments.seeds, "variants": rows,
        }  # fmt: skip
        peer = rows[first]["ndcg_at_10"]
        print(
            json.dumps(
                {
                    "ours": best,
                    "peer": peer,
                    "ratio": best / peer if peer else None,
                    "equal": None,
                    "work": work,
                }
            )
        )


if __name__ == "__main__":
    main()
