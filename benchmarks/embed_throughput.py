"""Encoder throughput beside sentence-transformers at the best of its settings: same texts, model, dtype, cores or GPU.

    python benchmarks/embed_throughput.py [--quick] [--json] [--texts FOLDER] [--dtype float32|bfloat16|both] [--device cpu]

Work: 20,000 documents of the Parquet files in FOLDER (column ``text``) at their natural lengths, cut at 256 tokens,
through MiniLM-L6, on a GPU where torch sees one. The peer's settings (batch size, on a CPU two processes of one thread,
and for bfloat16 weights cast or autocast) are tried on a sample and the best runs on everything. The two sides take turns, block by block, so that a
machine that slows down slows both. The floor is the time of the real tokens' matrix products alone, at the best rate
measured here. The headline is float32; ``work.by_dtype`` holds both.
"""

import argparse
import atexit
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from embedloom.config.corpus import CorpusSource
from embedloom.corpus.python_docs import read_python_docs
from embedloom.encoder.backbone import has_fast_bf16, pick_device
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import resolve_model

MAX_TOKENS = 256
TEXTS = Path(__file__).parents[1] / "../shared/data/train/corpora"
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.999}

Encode = Callable[[list[str]], Any]


def load_texts(folder: Path, count: int) -> tuple[list[str], str]:
    """A random sample of the folder's documents, or of the documentation of installed packages without it."""
    files = sorted(folder.glob("*.parquet"))
    if files:
        texts = [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]
        source = f"{len(files)} corpora"
    else:
        packages = ("networkx", "numpy", "pandas")
        texts = [row.text for row in read_python_docs(CorpusSource(format="python_docs", packages=packages))]
        source = "documentation of networkx, numpy and pandas, as the folder of --texts is absent"
    chosen = np.random.default_rng(0).permutation(len(texts))[:count]
    return [texts[index] for index in chosen], source


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def peer_settings(folder: Path, dtype: str, quick: bool, device: str) -> dict[str, Encode]:
    """The ways of running the peer, by name."""
    models = {"": SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype})}
    if dtype == "bfloat16" and not quick:
        models[", autocast"] = SentenceTransformer(
            str(folder), device=device, model_kwargs={"dtype": "float32"}
        )
    sizes = (64, 256) if device == "cuda" else (16, 32)
    if not quick:
        sizes = (32, 128, 512, 2048) if device == "cuda" else (16, 32, 64, 128)
    settings: dict[str, Encode] = {}
    for mode, model in models.items():
        model.max_seq_length = MAX_TOKENS
        for size in sizes:

            def encode(texts: list[str], model: Any = model, size: int = size, mode: str = mode) -> Any:
                with torch.autocast(device, dtype=torch.bfloat16, enabled=bool(mode)):
                    return np.asarray(model.encode(texts, batch_size=size), dtype=np.float32)

            settings[f"batch_size={size}{mode}"] = encode
    if not quick and device == "cpu":
        settings["2 processes, batch_size=16"] = two_processes(models[""])
    return settings


def two_processes(model: Any) -> Encode:
    """The peer's multi-process mode, a core each; left to itself every process would take all cores."""
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        pool = model.start_multi_process_pool(["cpu", "cpu"])
    atexit.register(model.stop_multi_process_pool, pool)

    def encode(texts: list[str]) -> Any:
        chunk = max(1, len(texts) // 8)
        vectors = model.encode(texts, pool=pool, batch_size=16, chunk_size=chunk)
        return np.asarray(vectors, dtype=np.float32)

    return encode


def choose(settings: dict[str, Encode], sample: list[str]) -> tuple[str, dict[str, float]]:
    """The fastest setting on the sample, and the seconds of each."""
    seconds = {}
    for name, encode in settings.items():
        encode(sample[:8])  # kernels are picked and processes started
        seconds[name] = seconds_of(lambda encode=encode: encode(sample))[0]
    return min(seconds, key=lambda name: seconds[name]), seconds


def gemm_floor_seconds(encoder: Encoder, tokens: int) -> float:
    """Time of the linear layers' products alone for this many tokens, at the best rate measured here."""
    config = encoder.backbone.config
    hidden, inner = config.hidden_size, config.intermediate_size
    flops_per_token = 2 * config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * inner)
    rates = []
    with torch.inference_mode():
        for columns, rows in ((hidden, inner), (inner, hidden)):
            # A GPU is not filled by fewer: 65,536 tokens are what a batch has there.
            tokens_here = 65536 if encoder.device.type == "cuda" else 2048
            like = {"dtype": encoder.dtype, "device": encoder.device}
            left, right = torch.randn(tokens_here, columns, **like), torch.randn(columns, rows, **like)
            bias = torch.zeros(rows, **like)
            products: list[Callable[[], Any]] = [lambda left=left, right=right: left @ right]
            if encoder.device.type == "cpu":
                products.append(
                    lambda left=left, right=right, bias=bias: torch.ops.mkldnn._linear_pointwise(
                        left, right.t(), bias, "none", [], ""
                    )
                )
            seconds = min(seconds_of(product)[0] for product in products for _ in range(20))
            rates.append(2 * tokens_here * columns * rows / seconds)
    return tokens * flops_per_token / max(rates)


def compare(folder: Path, texts: list[str], dtype: Any, quick: bool, device: str) -> dict[str, Any]:
    """Ours and the peer's best on the same texts, in turns."""
    encoder = Encoder.load(folder, dtype=dtype, device=device)
    plain = Encoder.load(folder, dtype="float32", device=device, trainable=True)
    sample = texts[: 60 if quick else 300]
    reference = plain.embed(sample, "document")
    settings = peer_settings(folder, dtype, quick, device)
    best, tried = choose(settings, sample)
    encoder.embed(sample[:8], "document")
    ours, theirs, cosines = 0.0, 0.0, []
    block = max(1, min(2000, len(texts) // 2))
    for first in range(0, len(texts), block):
        part = texts[first : first + block]
        own_seconds, own = seconds_of(lambda part=part: encoder.embed(part, "document"))
        peer_seconds, peers = seconds_of(lambda part=part: settings[best](part))
        ours, theirs = ours + own_seconds, theirs + peer_seconds
        cosines.append(cosine(own, peers))
    tokens = sum(len(ids) for ids in encoder.tokenize(texts, "document"))
    own_cosine = cosine(encoder.embed(sample, "document"), reference)
    return {
        "ours": round(tokens / ours, 1),
        "peer": round(tokens / theirs, 1),
        "peer_name": f"sentence-transformers encode, {best}",
        "ratio": round(theirs / ours, 3),
        "floor_share": round(gemm_floor_seconds(encoder, tokens) / ours, 3),
        "equal": own_cosine > LEAST_COSINE[dtype] and min(cosines) > 2 * LEAST_COSINE[dtype] - 1,
        "min_cosine_to_plain_float32": round(own_cosine, 6),
        "min_cosine_of_peer_to_plain_float32": round(cosine(settings[best](sample), reference), 6),
        "min_cosine_to_peer": round(min(cosines), 6),
        "padding_share": round(encoder.tokens.padding_share, 4),
        "tokens": tokens,
        "seconds": {"ours": round(ours, 1), "peer": round(theirs, 1)},
        "peer_sample_seconds": {name: round(seconds, 2) for name, seconds in tried.items()},
    }


def cosine(left: Any, right: Any) -> float:
    """Smallest cosine between rows."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: 300 texts, fewer settings of the peer"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--texts", type=Path, default=TEXTS, metavar="FOLDER", help="folder of Parquet files")
    parser.add_argument("--documents", type=int, default=20_000, help="how many of them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()

    texts, source = load_texts(options.texts, 300 if options.quick else options.documents)
    dtypes = ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]
    device = pick_device(options.device).type
    skipped = options.dtype == "both" and not has_fast_bf16(torch.device(device))
    if skipped:
        dtypes = ["float32"]  # emulated bfloat16 is slower than float32 on either side
    folder = resolve_model("minilm-l6")
    by_dtype = {dtype: compare(folder, texts, dtype, options.quick, device) for dtype in dtypes}
    headline = by_dtype[dtypes[0]]
    keys = ("ours", "peer", "peer_name", "ratio", "floor_share", "equal")
    result = {"name": "embed_throughput", **{key: headline[key] for key in keys}, "unit": "real tokens/s"}
    result["work"] = {
        "texts": len(texts), "source": source, "tokens": headline["tokens"], "threads": torch.get_num_threads(),
        "min_cosine": headline["min_cosine_to_peer"], "padding_share": headline["padding_share"],
        "mean_tokens": round(headline["tokens"] / len(texts), 1), "headline_dtype": dtypes[0],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "no_fast_bfloat16_here": skipped, "by_dtype": by_dtype,
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
