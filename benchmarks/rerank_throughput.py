"""Pairs a second of a reranker beside sentence-transformers' CrossEncoder at the best of its settings: same pairs, model, dtype, cores.

    python benchmarks/rerank_throughput.py [--quick] [--json] [--model FOLDER] [--dtype float32|bfloat16|both] [--pairs N]

Work: queries with 50 documents each, as a search hands them on: documentation of networkx, numpy and scikit-learn at its natural lengths,
pairs cut at 256 tokens, through MiniLM-L6 with a head of one label. The peer's batch sizes (for bfloat16 weights cast or
autocast) are tried on a sample and the best runs on everything; the two take turns, block by block. ``equal``: every logit
is the peer's, to 0.0001 in float32 and 0.05 in bfloat16. The headline is float32; ``work.by_dtype`` holds both, and the ratio of CPU seconds, which other work on
the machine moves less.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from embedloom.config.corpus import CorpusSource
from embedloom.corpus.python_docs import read_python_docs
from embedloom.encoder.backbone import DTypeName, has_fast_bf16
from embedloom.encoder.pairs import PairEncoder, prepare_reranker
from embedloom.encoder.registry import resolve_model

MAX_TOKENS = 256
DOCUMENTS = 50
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.05}
Pairs = list[tuple[str, str]]


def load_pairs(count: int) -> Pairs:
    """Queries (first lines of docstrings) with 50 documents each, drawn at random."""
    source = CorpusSource(format="python_docs", packages=("networkx", "numpy", "sklearn"))
    texts = [row.text for row in read_python_docs(source)]
    drawn = np.random.default_rng(0)
    pairs: Pairs = []
    while len(pairs) < count:
        chosen = drawn.choice(len(texts), DOCUMENTS, replace=False)
        query = next(line for line in texts[chosen[0]].splitlines() if line.strip())
        pairs += [(query, texts[at]) for at in chosen]
    return pairs[:count]


def seconds_of(work: Callable[[], Any]) -> tuple[np.ndarray[Any, Any], Any]:
    """Wall and CPU seconds, and the result."""
    started = np.array([time.perf_counter(), time.process_time()])
    found = work()
    return np.array([time.perf_counter(), time.process_time()]) - started, found


def peer_settings(folder: Path, dtype: str, quick: bool) -> dict[str, Callable[[Pairs], Any]]:
    """The ways of running the peer, by name."""

    def load(stored: torch.dtype) -> CrossEncoder:
        return CrossEncoder(str(folder), device="cpu", max_length=MAX_TOKENS, model_kwargs={"dtype": stored})

    models = {"": load(getattr(torch, dtype))}
    if dtype == "bfloat16":
        models[", autocast"] = load(torch.float32)
    settings: dict[str, Callable[[Pairs], Any]] = {}
    for mode, model in models.items():
        for size in (16, 32) if quick else (8, 16, 32, 64, 128):

            def predict(pairs: Pairs, model: Any = model, size: int = size, mode: str = mode) -> Any:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(mode)):
                    identity = torch.nn.Identity()
                    found = model.predict(
                        pairs, batch_size=size, activation_fn=identity, show_progress_bar=False
                    )
                return np.asarray(found, dtype=np.float32)

            settings[f"batch_size={size}{mode}"] = predict
    return settings


def compare(folder: Path, pairs: Pairs, dtype: DTypeName, quick: bool) -> dict[str, Any]:
    """Ours and the peer's best on the same pairs, in turns."""
    encoder = PairEncoder.open(folder, dtype=dtype, device="cpu")
    settings = peer_settings(folder, dtype, quick)
    sample = pairs[:: max(1, len(pairs) // (60 if quick else 200))]
    tried = {}
    for name, predict in settings.items():
        predict(sample[:8])
        tried[name] = float(seconds_of(lambda predict=predict: predict(sample))[0][0])
    best = min(tried, key=lambda name: tried[name])
    encoder.score(*zip(*sample[:8], strict=True))
    ours, theirs, largest = np.zeros(2), np.zeros(2), 0.0
    block = max(DOCUMENTS, min(1000, len(pairs) // 2))
    for first in range(0, len(pairs), block):
        part = pairs[first : first + block]
        own_seconds, own = seconds_of(lambda part=part: encoder.score(*zip(*part, strict=True)))
        peer_seconds, peers = seconds_of(lambda part=part: settings[best](part))
        ours, theirs = ours + own_seconds, theirs + peer_seconds
        largest = max(largest, float(np.abs(own - peers).max()))
    return {
        "ours": round(len(pairs) / ours[0], 1),
        "peer": round(len(pairs) / theirs[0], 1),
        "peer_name": f"sentence-transformers CrossEncoder.predict, {best}",
        "ratio": round(theirs[0] / ours[0], 3),
        "ratio_of_cpu_seconds": round(theirs[1] / ours[1], 3),
        "equal": largest <= LARGEST_DIFFERENCE[dtype],
        "largest_difference": largest,
        "seconds": {"ours": ours.round(1).tolist(), "peer": theirs.round(1).tolist()},
        "peer_sample_seconds": {name: round(seconds, 2) for name, seconds in tried.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: 200 pairs, fewer settings of the peer"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--model", type=Path, help="a reranker; default: MiniLM-L6 with a fresh head")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    options = parser.parse_args()

    pairs = load_pairs(200 if options.quick else options.pairs)
    dtypes: list[DTypeName] = ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]
    if options.dtype == "both" and not has_fast_bf16(torch.device("cpu")):
        dtypes = ["float32"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch)
        if options.model is None:
            prepare_reranker(resolve_model("minilm-l6"), MAX_TOKENS, 0, folder)
        by_dtype = {dtype: compare(folder, pairs, dtype, options.quick) for dtype in dtypes}
        encoder = PairEncoder.open(folder, dtype="float32", device="cpu")
        tokens = sum(map(len, encoder.tokenize_pairs(*zip(*pairs, strict=True))[0]))
    headline = by_dtype[dtypes[0]]
    result = {
        "name": "rerank_throughput",
        **{key: headline[key] for key in ("ours", "peer", "peer_name", "ratio", "equal")},
    }
    result |= {
        "unit": "pairs/s",
        "work": {
            "pairs": len(pairs), "mean_tokens": round(tokens / len(pairs), 1), "max_tokens": MAX_TOKENS,
            "threads": torch.get_num_threads(), "headline_dtype": dtypes[0], "by_dtype": by_dtype,
        },
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
