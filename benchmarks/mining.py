"""Hard-negative mining beside sentence-transformers' ``mine_hard_negatives`` on the same given vectors.

    python benchmarks/mining.py [--quick] [--json] [--queries N --documents N --exact] [--scaling | --shares N]

Work: random unit vectors of 384 dimensions, each query near its own document, top 50 candidates, 95 % margin, four
negatives. Every side runs in a process of its own, which reports its wall time and peak memory; the negatives are
compared. The peer is the faster of its two modes (FAISS, and exact with ``--exact``, which at its default settings
needs 13 GB for 200,000 documents). ``--scaling`` instead times our search of 1,000 queries in 50,000, 200,000 and
1,000,000 documents on disk, the last also with a quarter of the memory it would take. ``--shares`` counts, for the first
1,000 queries, what shares that nominate by bfloat16, as GPUs do, leave to be scored exactly: once merged, and beside it the
k + 16 of every share that were scored before; the products are made on the CPU and not timed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

DIMENSION = 384
TOP_K = 50
NEGATIVES = 4
MARGIN = 0.05


def unit_rows(generator: np.random.Generator, rows: int) -> Any:
    values = generator.standard_normal((rows, DIMENSION), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def write_vectors(folder: Path, queries: int, documents: int) -> None:
    generator = np.random.default_rng(0)
    found = unit_rows(generator, documents)
    asked = found[:queries] + generator.standard_normal((queries, DIMENSION), dtype=np.float32) * np.float32(
        0.04
    )
    np.save(folder / "documents.npy", found)
    np.save(folder / "queries.npy", asked / np.linalg.norm(asked, axis=1, keepdims=True))


def ours(queries: Any, documents: Any) -> Any:
    from embedloom.config.mining import SelectionConfig
    from embedloom.mining.select import select_negatives
    from embedloom.retrieval.search import pair_scores, top_k

    rules = SelectionConfig(margin_ratio=1 - MARGIN, negatives=NEGATIVES)
    found = top_k(queries, documents, TOP_K + 1)
    positives = pair_scores(queries, documents[: len(queries)])
    chosen = np.full((len(queries), NEGATIVES), -1)
    for row, (ids, scores) in enumerate(zip(found.positions, found.scores, strict=True)):
        one = select_negatives(ids.tolist(), scores.tolist(), {row}, float(positives[row]), rules)
        chosen[row, : len(one.ids)] = one.ids
    return chosen


class GivenVectors:
    """What the peer needs of a model."""

    tokenizer = None
    prompts: dict[str, str] = {}  # noqa: RUF012
    device = "cpu"

    def __init__(self, queries: Any, documents: Any) -> None:
        self.queries, self.documents = queries, documents

    def encode_query(self, _: Any, **__: Any) -> Any:
        return self.queries

    def encode_document(self, _: Any, **__: Any) -> Any:
        return self.documents

    def get_embedding_dimension(self) -> int:
        return DIMENSION

    def similarity(self, left: Any, right: Any) -> Any:
        from sentence_transformers.util import cos_sim

        return cos_sim(left, right)

    def similarity_pairwise(self, left: Any, right: Any) -> Any:
        from sentence_transformers.util import pairwise_cos_sim

        return pairwise_cos_sim(left, right)


def theirs(queries: Any, documents: Any, use_faiss: bool) -> Any:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    pairs = {
        "query": [f"q{n}" for n in range(len(queries))],
        "document": [f"d{n}" for n in range(len(queries))],
    }
    mined = mine_hard_negatives(
        Dataset.from_dict(pairs), GivenVectors(queries, documents), corpus=[f"d{n}" for n in range(len(documents))],
        relative_margin=MARGIN, num_negatives=NEGATIVES, range_max=TOP_K, sampling_strategy="top", output_format="n-tuple",
        verbose=False, use_faiss=use_faiss,
    )  # fmt: skip
    chosen = np.full((len(queries), NEGATIVES), -1)
    for row in mined:
        chosen[int(row["query"][1:])] = [int(row[f"negative_{n}"][1:]) for n in range(1, NEGATIVES + 1)]
    return chosen


def run_side(side: str, folder: Path) -> None:
    import datasets  # noqa: F401 - both sides pay for the same imports before the clock starts
    import faiss  # noqa: F401
    import sentence_transformers  # noqa: F401

    import embedloom.retrieval.search  # noqa: F401

    queries, documents = np.load(folder / "queries.npy"), np.load(folder / "documents.npy")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    chosen = ours(queries, documents) if side == "ours" else theirs(queries, documents, side == "faiss")
    seconds = time.perf_counter() - started
    np.save(folder / f"{side}.npy", chosen)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps({"seconds": round(seconds, 2), "peak_mb": round(peak), "added_mb": round(peak - before)})
    )


def child(*arguments: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(run.stdout.splitlines()[-1]))


def int8_floor_seconds(queries: int, documents: int) -> float:
    """Time of the bare 8-bit products, at the rate measured here."""
    import torch

    left = torch.randint(-127, 127, (1024, DIMENSION), dtype=torch.int8)
    right = torch.randint(-127, 127, (32768, DIMENSION), dtype=torch.int8)
    out = torch.empty(1024, 32768, dtype=torch.int32)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch._int_mm(left, right.T, out=out)
        best = min(best, time.perf_counter() - started)
    return best * queries * documents / (1024 * 32768)


def compare(queries: int, documents: int, exact: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vectors(folder, queries, documents)
        peers = ["faiss", "exact"] if exact else ["faiss"]
        sides = {side: child("--side", side, "--folder", name) for side in ["ours", *peers]}
        best = min(peers, key=lambda side: sides[side]["seconds"])
        mine, other = np.load(folder / "ours.npy"), np.load(folder / f"{best}.npy")
    full = (other >= 0).all(axis=1)  # the peer drops rows with fewer
    same = float((mine[full] == other[full]).mean()) if full.any() else 0.0
    return {
        "name": "mining",
        "ours": sides["ours"]["seconds"],
        "peer": sides[best]["seconds"],
        "peer_name": f"sentence-transformers mine_hard_negatives, {best}",
        "ratio": round(sides[best]["seconds"] / sides["ours"]["seconds"], 3),
        "unit": "s",
        "floor_share": round(int8_floor_seconds(queries, documents) / sides["ours"]["seconds"], 3),
        "peak_mb": sides["ours"]["peak_mb"],
        "peer_peak_mb": sides[best]["peak_mb"],
        "equal": bool(same >= 0.999),
        "work": {"queries": queries, "documents": documents, "top_k": TOP_K, "same_negatives": round(same, 6), "sides": sides},
    }  # fmt: skip


def scaling() -> dict[str, Any]:
    from embedloom.core.storage import Place
    from embedloom.retrieval.embed import vector_table
    from embedloom.retrieval.sharded import VectorCatalogue, VectorStore

    table: dict[str, float] = {}
    queries = unit_rows(np.random.default_rng(1), 1000)
    for documents in (50_000, 200_000, 1_000_000):
        with tempfile.TemporaryDirectory() as name:
            place, generator = Place(name), np.random.default_rng(2)
            for part in range(documents // 50_000):
                ids = [f"d{part:03d}-{n:06d}" for n in range(50_000)]
                rows = vector_table(ids, unit_rows(generator, 50_000), "c", "m", 1)
                place.write_table(f"v/part-{part:06d}.parquet", rows)
            catalogue = VectorCatalogue.read(place, "v")
            whole = documents * DIMENSION * 5
            for label, memory in {"": whole, ", a quarter in memory": whole // 4}.items():
                store = VectorStore(catalogue, memory)
                store.search(queries[:10], TOP_K)  # reads and prepares what stays
                started = time.perf_counter()
                store.search(queries, TOP_K)
                table[f"{documents:,}{label}"] = round(time.perf_counter() - started, 2)
    return {"name": "mining scaling", "unit": "s for 1,000 queries", "seconds": table}


def shares(queries: int, documents: int, count: int) -> dict[str, Any]:
    from embedloom.retrieval.search import DocumentBlock, nearest, nothing_near, pair_scores, top_k

    with tempfile.TemporaryDirectory() as name:
        write_vectors(Path(name), queries, documents)
        asked, held = np.load(f"{name}/queries.npy")[:1000], np.load(f"{name}/documents.npy")
    nominated = [
        DocumentBlock(held[rows], rows, "bf16").nominate(asked, TOP_K + 1, nothing_near(len(asked)))
        for rows in np.array_split(np.arange(documents), count)
    ]
    near = nearest(nominated, TOP_K + 1)
    rows, positions = near.unscored()
    started = time.perf_counter()
    scored = near.scored(pair_scores(asked[rows], held[positions])).best(TOP_K + 1)
    seconds = time.perf_counter() - started
    expected = top_k(asked, held, TOP_K + 1)
    before = count * (TOP_K + 1 + 16) * len(asked)
    return {
        "name": "mining in shares",
        "unit": "pairs scored exactly per query",
        "before": before / len(asked),
        "nominated": round(sum(int((one.rows >= 0).sum()) for one in nominated) / len(asked), 1),
        "after": round(len(rows) / len(asked), 1),
        "share_of_before": round(len(rows) / before, 5),
        "score_seconds": round(seconds, 3),
        "equal": bool(
            np.array_equal(scored.positions, expected.positions) and scored.scores.tobytes() == expected.scores.tobytes()
        ),
        "work": {"queries": len(asked), "documents": documents, "dimension": DIMENSION, "shares": count, "top_k": TOP_K + 1},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--exact", action="store_true", help="the peer's exact mode too")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--shares", type=int, help="count what so many shares leave to be scored")
    parser.add_argument("--side", choices=["ours", "faiss", "exact"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.folder)
        return
    size = (5_000, 50_000) if options.quick else (options.queries, options.documents)
    if options.shares:
        result = shares(*size, options.shares)
    else:
        result = scaling() if options.scaling else compare(*size, options.exact)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
