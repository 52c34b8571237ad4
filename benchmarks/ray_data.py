"""``embedloom.embed`` beside Ray Data LLM's embedding processor (vLLM): one Dataset, MiniLM, float32, one actor with all cores.

    python benchmarks/ray_data.py [--quick] [--json] [--texts FOLDER] [--documents N]

Work: documents of the Parquet files in FOLDER (column ``text``), cut at 800 characters and those of more than 256 tokens left out, as
the peer refuses what is longer than its limit and ours would cut it. Both read the same Dataset and give one with
vectors; batches have the same rows. The clock starts when the first batch is there, so that neither start of an engine counts
(both are in ``work``), and ends with the last. Each side runs in a process of its own, in turns: ours, peer. ``cpu_ratio`` compares
the CPU seconds that all processes of the Ray session took over the same span: on a machine that does other work it is the surer number.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

MAX_TOKENS = 256
CHARACTERS = 800
TEXTS = Path(__file__).parents[1] / "../shared/data/train/corpora"
CORES = len(os.sched_getaffinity(0))


def load_texts(folder: Path, count: int, model: Path) -> list[str]:
    """A random sample of documents that neither side cuts."""
    from embed_throughput import load_texts as sample

    from embedloom.encoder.tokenizer import load_tokenizer

    texts, _ = sample(folder, 2 * count)
    texts = list(dict.fromkeys(text[:CHARACTERS].strip() for text in texts))
    lengths = [len(ids) for ids in load_tokenizer(model)(texts)["input_ids"]]
    return [text for text, length in zip(texts, lengths, strict=True) if 3 <= length <= MAX_TOKENS][:count]


def ours(dataset: Any, model: Path, batch: int) -> Any:
    import embedloom

    return embedloom.embed(dataset, model=str(model), batch_size=batch, num_cpus=CORES, preserve_order=False)


def peer(dataset: Any, model: Path, batch: int) -> Any:
    """As its documentation has it; stages that would reserve CPUs of their own are off, and vLLM tokenizes itself."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(CORES),
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    config = vLLMEngineProcessorConfig(
        model_source=str(model),
        task_type="embed",
        engine_kwargs={
            "dtype": "float32",
            "max_model_len": MAX_TOKENS,
            "enforce_eager": True,
            "max_num_seqs": 256,
        },
        batch_size=batch,
        concurrency=(1, 1),
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": CORES}]},
        runtime_env={"env_vars": settings},
        log_engine_metrics=False,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {"prompt": row["text"], "id": row["id"]},
        postprocess=lambda row: {"id": row["id"], "vector": row["embeddings"]},
        preprocess_map_kwargs={"num_cpus": 0.25},
        postprocess_map_kwargs={"num_cpus": 0.25},
    )
    return processor(dataset)


SIDES: dict[str, Callable[[Any, Path, int], Any]] = {"ours": ours, "peer": peer}


def cpu_seconds() -> float:
    """CPU time of this process and of all below it that are there."""
    here = psutil.Process()
    total = 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def run_side(name: str, model: Path, batch: int, out: Path) -> None:
    """One side over the texts of ``out/texts.json``: what it took, and its vectors in ``out/NAME.npy``."""
    import ray

    ray.init("local", num_cpus=2 * CORES + 2, log_to_driver=False, include_dashboard=False)
    texts = json.loads((out / "texts.json").read_text())
    table = pa.table({"id": range(len(texts)), "text": texts})
    dataset = ray.data.from_arrow(table).repartition(-(-len(texts) // batch)).materialize()
    begun = time.perf_counter()
    result = SIDES[name](dataset, model, batch)
    ids, blocks, marks = [], [], []
    for found in result.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        ids.extend(found["id"].tolist())
        blocks.append(np.stack([np.asarray(vector, dtype=np.float32) for vector in found["vector"]]))
        marks.append((time.perf_counter(), cpu_seconds(), len(ids)))
    (first, cpu_first, done), (last, cpu_last, rows) = marks[0], marks[-1]
    np.save(out / f"{name}.npy", np.concatenate(blocks)[np.argsort(ids)])
    facts = {
        "rows": rows, "counted_rows": rows - done, "seconds": last - first, "cpu_seconds": cpu_last - cpu_first,
        "whole_seconds": last - begun, "first_batch_after_seconds": first - begun,
    }  # fmt: skip
    (out / f"{name}.json").write_text(json.dumps(facts))
    ray.shutdown()


def least_cosine(left: Any, right: Any) -> float:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).min())


def main() -> None:
    import tempfile

    from embedloom.encoder.registry import resolve_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute after set-up: 400 texts")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--texts", type=Path, default=TEXTS, metavar="FOLDER", help="folder of Parquet files")
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128, help="rows a batch, on both sides")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = resolve_model("minilm-l6")
    if options.side:
        run_side(options.side, model, options.batch, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        texts = load_texts(options.texts, 400 if options.quick else options.documents, model)
        (out / "texts.json").write_text(json.dumps(texts))
        for side in SIDES:
            command = [
                sys.executable,
                __file__,
                "--side",
                side,
                "--out",
                folder,
                "--batch",
                str(options.batch),
            ]
            subprocess.run(command, check=True, stdout=sys.stderr)
        facts = {side: json.loads((out / f"{side}.json").read_text()) for side in SIDES}
        cosine = least_cosine(np.load(out / "ours.npy"), np.load(out / "peer.npy"))
    rates = {side: one["counted_rows"] / one["seconds"] for side, one in facts.items()}
    costs = {side: one["cpu_seconds"] / one["counted_rows"] for side, one in facts.items()}
    result = {
        "name": "ray_data", "ours": round(rates["ours"], 1), "peer": round(rates["peer"], 1),
        "peer_name": "Ray Data LLM, vLLM engine, task_type embed", "unit": "texts/s after the first batch",
        "ratio": round(rates["ours"] / rates["peer"], 3), "equal": cosine > 0.9999,
        "work": {
            "texts": len(texts), "batch": options.batch, "cores": CORES, "min_cosine": round(cosine, 6),
            "cpu_ratio": round(costs["peer"] / costs["ours"], 3), "by_side": facts,
        },
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
