"""Attention of a packed batch in one compiled loop, beside torch's sdpa over groups of like lengths: the same tensors.

    python benchmarks/attention.py [--quick] [--json] [--seconds 0.3]

Work: one layer of MiniLM (12 heads of 32) or SmolLM2 (9 query heads, 3 key/value heads of 64), both ways of
``packed_attention``, float32 and bfloat16, one thread; the two are timed in turn and the least CPU time of five rounds
counts, so that other work on the machine disturbs little. The headline is the geometric mean of the ratios. The floor
is a float32 product of 1,024 x 1,024 matrices on the same thread.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from embedloom.encoder.attention import PackedLayout, load_kernel, packed_attention

QUERIES = sorted((random.Random(0).randint(7, 17) for _ in range(48)), reverse=True)
LENGTHS = {
    "48 queries of 7 to 17": QUERIES,
    "48 x 12": [12] * 48,
    "8 x 60": [60] * 8,
    "4 x 160": [160] * 4,
    "1 x 512": [512],
    "1 x 2,048": [2048],
}
HEADS = {"minilm": (12, 12, 32), "smollm2": (9, 3, 64)}
ROUNDS = 5


def sides(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Random queries, keys and values: [1, heads, tokens, d] each."""
    query_heads, kv_heads, d = heads
    torch.manual_seed(0)
    shapes = ((query_heads, d), (kv_heads, d), (kv_heads, d))
    return [torch.randn(1, tokens, *shape).to(dtype).transpose(1, 2) for shape in shapes]


def cpu_seconds(work: Callable[[], Any], seconds: float) -> float:
    """CPU time of one call."""
    work()
    started, calls = time.process_time(), 0
    while time.process_time() - started < seconds:
        work()
        calls += 1
    return (time.process_time() - started) / calls


def compare(name: str, lengths: list[int], dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Both ways on one batch."""
    heads = HEADS[name]
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]  # type: ignore[assignment]
    given = sides(heads, sum(lengths), dtype)
    layout = PackedLayout(lengths, False, torch.device("cpu"))

    def ours() -> Tensor:
        with torch.no_grad():
            return packed_attention(module, *given, None, layout)[0]

    def sdpa() -> Tensor:
        with torch.enable_grad():  # the way that is taken for training; nothing here asks for a gradient
            return packed_attention(module, *given, None, layout)[0]

    difference = float((ours().float() - sdpa().float()).abs().max())
    times = [(cpu_seconds(ours, seconds), cpu_seconds(sdpa, seconds)) for _ in range(ROUNDS)]
    own, peer = (min(column) for column in zip(*times, strict=True))
    flops = 4 * heads[0] * heads[2] * sum(length * length for length in lengths)
    return {
        "heads": name, "dtype": str(dtype).removeprefix("torch."), "own_us": round(1e6 * own, 1),
        "sdpa_us": round(1e6 * peer, 1), "ratio": round(peer / own, 2), "gflops": round(flops / own / 1e9, 1),
        "sdpa_gflops": round(flops / peer / 1e9, 1), "largest_difference": difference,
    }  # fmt: skip


def product_gflops(seconds: float) -> float:
    """What this thread reaches in a large float32 product."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    least = min(cpu_seconds(lambda: left @ right, seconds) for _ in range(ROUNDS))
    return 2 * 1024**3 / least / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--seconds", type=float, default=0.3, help="of CPU time, each measurement")
    options = parser.parse_args()
    if load_kernel() is None:
        raise SystemExit("the compiled attention is missing here; `embedloom doctor` says why")
    torch.set_num_threads(1)
    seconds = 0.03 if options.quick else options.seconds
    rows = [
        {"work": work, **compare(name, lengths, dtype, seconds)}
        for name in HEADS
        for dtype in (torch.float32, torch.bfloat16)
        for work, lengths in LENGTHS.items()
    ]
    best, floor = max(row["gflops"] for row in rows), product_gflops(seconds)
    limits = {"float32": 5e-6, "bfloat16": 0.02}
    result = {
        "name": "attention", "ours": round(geometric_mean(row["own_us"] for row in rows), 1),
        "peer": round(geometric_mean(row["sdpa_us"] for row in rows), 1), "peer_name": "torch sdpa by groups of length",
        "ratio": round(geometric_mean(row["ratio"] for row in rows), 2), "unit": "us of CPU, geometric mean",
        "floor_share": round(best / floor, 3),
        "equal": all(row["largest_difference"] <= limits[row["dtype"]] for row in rows),
        "work": {"product_gflops": round(floor, 1), "rows": rows},
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
