"""Training throughput beside sentence-transformers' trainer: same texts, model, optimizer, dtype, cores or GPU.

    python benchmarks/train_throughput.py [--quick] [--json] [--pairs FOLDER] [--steps N] [--layers N] [--device cpu] [--busy N]

Work: queries and positives of the Parquet files in FOLDER (columns ``query``, ``positive``) at their natural lengths, cut
at 256 tokens, with other rows' positives as 1 and as 4 negatives; SmolLM2-135M cut to 12 layers, mean pooling, AdamW,
bfloat16 autocast where the CPU has it; on a GPU, where torch sees one, ours has bfloat16 weights and ZeRO-1. Ours is InfoNCE on a query's own negatives; the peer's nearest is
MultipleNegativesRankingLoss, which adds in-batch columns to the same products (microseconds a step). Each side runs in
a process of its own, for its peak memory; the peer's batch size a forward is tried and its best counts. Model loading
and the first two steps are left out. The headline is 1 negative; ``work.by_negatives`` holds both, with the share that
the real tokens' matrix products alone would take at the best rate measured here, and our rate with one and two workers
of a thread, or a GPU, each.

With ``--busy N``, N processes that count keep cores busy beside every run, and ours runs with one thread, with all as Ray's
workers have them, and with all as OpenMP lets them wait by default, turning round and round (``by_threads``).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from embedloom.cluster.session import PROCESS_ENVIRONMENT

PAIRS = Path(__file__).parents[1] / "../shared/data/train/pairs"
WARM_STEPS = 2
MAX_TOKENS = 256
TEMPERATURE = 0.02


def write_rows(folder: Path, negatives: int, rows: int, out: Path) -> None:
    """Anchor, positive and drawn negatives as JSON lines."""
    pairs = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    if not pairs:
        raise SystemExit(f"{folder}: no Parquet file with query and positive (--pairs)")
    rng = np.random.default_rng(0)
    with out.open("w") as stream:
        for index in rng.permutation(len(pairs))[:rows]:
            drawn = rng.integers(0, len(pairs), negatives)
            record = {"anchor": pairs[index]["query"], "positive": pairs[index]["positive"]}
            record |= {f"negative_{k + 1}": pairs[n]["positive"] for k, n in enumerate(drawn)}
            stream.write(json.dumps(record) + "\n")


def prepare_model(layers: int, out: Path) -> None:
    from embedloom.config.encoder import EncoderConfig
    from embedloom.encoder.export import prepare_base
    from embedloom.encoder.registry import resolve_model

    config = EncoderConfig(
        base="smollm2-135m", num_layers=layers, max_query_tokens=MAX_TOKENS, max_document_tokens=MAX_TOKENS
    )
    out.mkdir()
    prepare_base(config, resolve_model("smollm2-135m"), out)


def run_ours(
    folder: Path,
    negatives: int,
    steps: int,
    batch: int,
    micro_batch: int,
    rank: int,
    workers: int,
    threads: int,
) -> dict[str, Any]:
    """Our step, without Ray around it: DeepSpeed ZeRO-0, on GPUs ZeRO-1; ``micro_batch`` in tokens; 0 threads are torch's own."""
    import torch
    import torch.distributed as dist

    from embedloom.config.training import TrainingConfig, TrainingSource, TrainingStage
    from embedloom.core.storage import Place
    from embedloom.training.data import prepare_sources
    from embedloom.training.loop import LoopConfig, StageTrainer

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_RANK=str(rank if on_gpu else 0),
        DS_ACCELERATOR="cuda" if on_gpu else "cpu",
    )  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    store = dist.FileStore(str(folder / f"rendezvous-{workers}-{threads}"), workers)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=workers)
    source = TrainingSource(name="pairs", format="sentence_transformers", path=str(folder / "rows.jsonl"))
    stage = TrainingStage(
        name="bench", negatives=negatives, global_batch=batch, learning_rate=1e-5, max_steps=steps,
        warmup_steps=0, sources=(source,),
    )  # fmt: skip
    training = TrainingConfig(
        runs=[{"name": "a", "seed": 0}], stages=[stage], temperature=TEMPERATURE, zero_stage=1 if on_gpu else 0,
        micro_batch_tokens=micro_batch,
    )  # fmt: skip
    data, model = Place(str(folder / "data")), folder / "model"
    if rank > 0:
        dist.barrier()  # the first has prepared them by then
    prepared = prepare_sources("bench", training, negatives, (source,), None, model, data)
    if rank == 0 and workers > 1:
        dist.barrier()
    folders = {name: index["folder"] for name, index in prepared.items()}
    loop = LoopConfig(
        "bench", training, stage, (source,), 0, 1.0, "auto", model, data, folders, Place(str(folder)), threads
    )  # fmt: skip
    trainer = StageTrainer(loop, rank, workers)
    records = [trainer.train_step()[0] for _ in range(steps)]
    kept = [record for record in records[WARM_STEPS:] if record is not None]
    tokens = sum(r.tokens for r in kept)
    weights, _ = trainer.matrix_weights
    return {
        "seconds": sum(r.seconds for r in kept), "tokens": tokens,
        "floor_seconds": 0.0 if rank else 6 * weights * tokens / gemm_rate(trainer.encoder),
        "padding_share": float(np.mean([r.padding_share for r in kept])), "loss": [r.loss for r in records if r],
    }  # fmt: skip


def gemm_rate(encoder: Any) -> float:
    """FLOP/s of this process's best matrix product of the model's own shapes and type."""
    import torch

    config, best = encoder.backbone.config, 0.0
    for columns, rows in (
        (config.hidden_size, config.intermediate_size),
        (config.intermediate_size, config.hidden_size),
    ):
        left = torch.randn(4096, columns, dtype=encoder.dtype, device=encoder.device)
        right = torch.randn(columns, rows, dtype=encoder.dtype, device=encoder.device)
        for _ in range(20):
            started = time.perf_counter()
            left @ right
            if encoder.device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * 4096 * columns * rows / (time.perf_counter() - started))
    return best


def peak_mb() -> int:
    """Most memory this process held: of its GPU, where it has one, else resident."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() // 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run_peer(folder: Path, negatives: int, steps: int, batch: int, micro_batch: int) -> dict[str, Any]:
    """sentence-transformers' own trainer; ``micro_batch`` in rows."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    from embedloom.core.prompting import PromptContract
    from embedloom.encoder.backbone import has_fast_bf16

    contract = PromptContract.load(folder / "model")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = [{**row, "anchor": contract.format(row["anchor"], "query")} for row in rows]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SentenceTransformer(str(folder / "model"), device=device, model_kwargs={"dtype": torch.float32})
    times: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    plain = model.forward

    def counted(features: dict[str, Any], **options: Any) -> Any:
        tokens.append(int(features["attention_mask"].sum()))
        return plain(features, **options)

    model.forward = counted
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "peer"), per_device_train_batch_size=micro_batch, max_steps=steps,
        gradient_accumulation_steps=batch // micro_batch, learning_rate=1e-5, optim="adamw_torch_fused",
        bf16=has_fast_bf16(torch.device(device)), use_cpu=device == "cpu", save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True, weight_decay=0.01,
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss, callbacks=[Clock()]
    ).train()
    per_step = len(tokens) // steps
    return {
        "seconds": times[-1] - times[WARM_STEPS - 1], "tokens": sum(tokens[WARM_STEPS * per_step :]),
        "padding_share": None, "loss": [],
    }  # fmt: skip


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes beside the measured one that want a core each all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def in_process(
    side: str, folder: Path, negatives: int, steps: int, batch: int, micro_batch: int, workers: int = 1,
    threads: int = 0, waiting: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """One side in processes of its own: rate, peak memory of the first; ours in the environment of Ray's workers."""
    environment = PROCESS_ENVIRONMENT if side == "ours" and waiting else {}
    command = [sys.executable, __file__, "--side", side, "--work", str(folder)]
    command += ["--negatives", str(negatives), "--steps", str(steps)]
    command += ["--batch", str(batch), "--micro-batch", str(micro_batch)]
    command += ["--workers", str(workers), "--threads", str(threads)]
    others = [
        subprocess.Popen(
            [*command, "--rank", str(rank)], stdout=subprocess.DEVNULL, env={**os.environ, **environment}
        )
        for rank in range(1, workers)
    ]
    run = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment}
    )
    if any(other.wait() for other in others):
        raise SystemExit(f"{side}: one of {workers} workers failed")
    result = json.loads(run.stdout.splitlines()[-1])
    return {**result, "rate": result["tokens"] / result["seconds"]}


def device_count() -> int:
    """GPUs that workers get one of each; 0: they compute on the CPU."""
    import torch

    return int(torch.cuda.device_count())


def compare(pairs: Path, negatives: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="embedloom-bench-") as scratch:
        folder = Path(scratch)
        write_rows(pairs, negatives, options.batch * options.steps, folder / "rows.jsonl")
        prepare_model(options.layers, folder / "model")
        ours = in_process("ours", folder, negatives, options.steps, options.batch, 4096)
        sizes = (options.batch,) if options.quick else (options.batch // 4, options.batch // 2, options.batch)
        tried = {
            size: in_process("peer", folder, negatives, options.steps, options.batch, size) for size in sizes
        }
        scaling = {
            workers: in_process("ours", folder, negatives, options.steps, options.batch, 4096, workers, 1)[
                "rate"
            ]
            for workers in ((1, 2) if device_count() != 1 else (1,))
        }
        by_threads = threads_compared(folder, negatives, options) if options.busy else {}
    best = max(tried, key=lambda size: tried[size]["rate"])
    peer = tried[best]
    return {
        "ours": round(ours["rate"], 1), "peer": round(peer["rate"], 1), "ratio": round(ours["rate"] / peer["rate"], 3),
        "peer_name": f"sentence-transformers trainer, {best} rows a forward", "peak_mb": ours["peak_mb"],
        "peer_peak_mb": peer["peak_mb"], "tokens": ours["tokens"], "peer_tokens": peer["tokens"],
        "padding_share": round(ours["padding_share"], 4), "first_losses": [round(x, 4) for x in ours["loss"][:3]],
        "floor_share": round(ours["floor_seconds"] / ours["seconds"], 3),
        "rate_by_workers_of_one_thread": {workers: round(rate, 1) for workers, rate in scaling.items()},
        "peer_rates": {size: round(found["rate"], 1) for size, found in tried.items()}, "by_threads": by_threads,
    }  # fmt: skip


def threads_compared(folder: Path, negatives: int, options: argparse.Namespace) -> dict[str, float]:
    """Our rate with one thread and with one a core, those as Ray's workers have them and as OpenMP lets them wait."""
    cores = len(os.sched_getaffinity(0))
    ways = {"1": (1, True), f"{cores}": (cores, True), f"{cores}, spinning": (cores, False)}
    return {
        name: round(
            in_process("ours", folder, negatives, options.steps, options.batch, 4096, 1, threads, waiting)[
                "rate"
            ],
            1,
        )
        for name, (threads, waiting) in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 negative, one setting of the peer, few steps")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--pairs", type=Path, default=PAIRS, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=None, help="queries a step: 32, with --quick 8")
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: GPUs where there are any"
    )
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="processes that keep cores busy beside each run"
    )
    for hidden in ("--side", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--negatives", "--micro-batch"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    for hidden, value in (("--rank", 0), ("--workers", 1), ("--threads", 0)):
        parser.add_argument(hidden, type=int, default=value, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes of both sides, too
    options.steps = options.steps or (4 if options.quick else 12)
    options.batch = options.batch or (8 if options.quick else 32)
    if options.side:
        work = (Path(options.work), options.negatives, options.steps, options.batch, options.micro_batch)
        ours = (options.rank, options.workers, options.threads)
        result = run_peer(*work) if options.side == "peer" else run_ours(*work, *ours)
        result["peak_mb"] = peak_mb()
        print(json.dumps(result))
        return
    with busy(options.busy):
        found = {
            count: compare(options.pairs, count, options) for count in ((1,) if options.quick else (1, 4))
        }
    keys = ("ours", "peer", "peer_name", "ratio", "floor_share", "peak_mb", "peer_peak_mb")
    result = {"name": "train_throughput", **{key: found[1][key] for key in keys}, "unit": "real tokens/s"}
    result["work"] = {"steps": options.steps, "global_batch": options.batch, "layers": options.layers}
    result["work"] |= {"gpus": device_count(), "busy": options.busy}
    result["work"]["by_negatives"] = found
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
