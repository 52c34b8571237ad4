"""Encoder throughput beside sentence-transformers on the same texts, model, dtype and threads.

    python benchmarks/embed_throughput.py [--quick] [--json]

Work: documentation of an installed package at its natural lengths, cut at 256 tokens, MiniLM-L6 in float32. Both
sides run in this process, in turn, twice, and the better run of each counts; the vectors must agree. The floor is
the time of the bare matrix products of the real tokens, measured here.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedloom.config.data import CorpusSource
from embedloom.corpus.python_docs import read_python_docs
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import resolve_model

MAX_TOKENS = 256
ST_BATCH_SIZES = (16, 32, 64)


def best_of(runs: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Shortest of ``runs`` timings in seconds, and the last result."""
    seconds, result = [], None
    for _ in range(runs):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def gemm_floor_seconds(encoder: Encoder, tokens: int) -> float:
    """Time of the linear layers' products alone for this many tokens, from the rate measured on this machine."""
    config = encoder.backbone.config
    hidden, inner = config.hidden_size, config.intermediate_size
    flops_per_token = 2 * config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * inner)
    left, right = torch.randn(2048, hidden), torch.randn(hidden, inner)
    seconds, _ = best_of(10, lambda: left @ right)
    rate = 2 * 2048 * hidden * inner / seconds
    return tokens * flops_per_token / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args()

    texts = [
        row.text for row in read_python_docs(CorpusSource(format="python_docs", packages=("networkx",)))
    ][: 200 if options.quick else 1000]
    folder = resolve_model("minilm-l6")
    encoder = Encoder.load(folder, dtype="float32")
    peer = SentenceTransformer(str(folder), device="cpu")
    peer.max_seq_length = MAX_TOKENS
    tokens = sum(len(ids) for ids in encoder.tokenize(texts, "document"))

    ours_seconds, ours = best_of(2, lambda: encoder.embed(texts, "document"))
    peer_seconds, theirs, batch_size = (
        min(
            (*best_of(2, lambda size=size: peer.encode(texts, batch_size=size)), size)
            for size in ST_BATCH_SIZES
        )
        if options.quick is False
        else (*best_of(2, lambda: peer.encode(texts, batch_size=32)), 32)
    )
    cosine = float((ours * theirs).sum(axis=1).min())
    result = {
        "name": "embed_throughput",
        "ours": round(tokens / ours_seconds, 1),
        "peer": round(tokens / peer_seconds, 1),
        "peer_name": f"sentence-transformers encode, batch_size={batch_size}",
        "ratio": round(peer_seconds / ours_seconds, 3),
        "unit": "real tokens/s",
        "floor_share": round(gemm_floor_seconds(encoder, tokens) / ours_seconds, 3),
        "equal": bool(cosine > 0.9999),
        "work": {"texts": len(texts), "tokens": tokens, "threads": torch.get_num_threads(), "min_cosine": round(cosine, 6),
                 "padding_share": round(encoder.tokens.padding_share, 4), "mean_tokens": round(float(np.mean(tokens / len(texts))), 1)},
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
