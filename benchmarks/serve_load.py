"""Requests and latency of `embedloom serve` beside its peers: same model, same cores, same texts, one run.

    python benchmarks/serve_load.py [--quick] [--json] [--model minilm-l6] [--seconds 5] [--install] [--only NAME]

Peers: vLLM's pooling server, Infinity, and what a CPU user would build himself: sentence-transformers on ONNX Runtime
(int8) or OpenVINO, and fastembed, each behind a minimal FastAPI. Every server runs alone, in processes of its own, on
all cores, the clients beside it; float32 unless its name says otherwise. Closed loops with 1, 16, 64 and 256 clients on
short queries and 64 and 256 on mixed lengths, then an open loop of short queries at ``--rate``, the same for all (default: a
quarter of our encoder's offline rate), so that p99 is compared at equal load. The headline is requests a second of
64 clients, short queries. The floor is our encoder's offline rate on the same texts in batches: the share of it that
the endpoint reaches under saturation. With the default 5 seconds a cell, all servers take about nine minutes. A peer that is
missing is reported with how to install it (--install builds the environments in .bench/).
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from serving.client import STOCK, texts

from serving import servers

_QUARTER = 0.25
CLIENT = Path(__file__).parent / "serving" / "client.py"
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def offline(model: str, kind: str, threads: int) -> float:
    """Tokens a second of the encoder alone, the best of three: whatever else runs only takes from it."""
    from embedloom.encoder.model import Encoder

    encoder = Encoder.load(Path(model), threads=threads, dtype="float32")
    ids = encoder.tokenize(texts(kind, 600), "document")
    encoder.embed_tokens(ids[:64])
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        encoder.embed_tokens(ids)
        best = max(best, sum(map(len, ids)) / (time.perf_counter() - started))
    return best


def count_tokens(model: Path, kinds: tuple[str, ...], out: Path) -> None:
    """Tokens of every text that clients send, special ones included."""
    from embedloom.encoder.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    counts = {kind: [len(ids) for ids in tokenizer(texts(kind, STOCK))["input_ids"]] for kind in kinds}
    out.write_text(json.dumps(counts))


def load(url: str, server: servers.Server, *options: str) -> dict[str, Any]:
    """One stretch of load, by a client process."""
    run = subprocess.run(
        [sys.executable, str(CLIENT), url, server.model, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def vectors(url: str, server: servers.Server) -> Any:
    """Vectors of a few texts, of unit length."""
    body = json.dumps(
        {"model": server.model, "input": texts("mixed", 8, 7), "encoding_format": "float"}
    ).encode()
    request = urllib.request.Request(f"{url}/embeddings", body, {"content-type": "application/json"})
    with _NO_PROXY.open(request, timeout=60) as reply:
        found = np.array([item["embedding"] for item in json.loads(reply.read())["data"]])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def cells(options: argparse.Namespace) -> list[list[str]]:
    """The stretches of load that every server gets, as the client's options."""
    closed = [("short", clients) for clients in options.clients]
    if not options.quick:
        closed += [("mixed", clients) for clients in (64, 256)]
    loops = [["--kind", kind, "--clients", str(clients)] for kind, clients in closed]
    return [*loops, ["--kind", "short", "--rate", str(options.rate)]]


def measure(server: servers.Server, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All cells of a server."""
    rows = []
    common = ["--seconds", str(options.seconds), "--counts", str(folder / "counts.json")]
    started = time.monotonic()
    with servers.running(server, folder / f"{server.name}.log") as url:
        up = time.monotonic()
        found = vectors(url, server)
        load(url, server, "--clients", "8", "--seconds", "1")
        for cell in cells(options):
            rows.append(load(url, server, *common, *cell))
            print(f"{server.name}: {rows[-1]}", file=sys.stderr, flush=True)
    return {"rows": rows, "vectors": found, "start_seconds": round(up - started, 1)}


def headline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The stretch that is compared: short queries, the most clients up to 64."""
    fitting = [row for row in rows if row["kind"] == "short" and row.get("clients", 999) <= 64]
    return max(fitting, key=lambda row: int(row["clients"]))


def candidates(
    model: Path, folder: Path, options: argparse.Namespace
) -> tuple[list[servers.Server], dict[str, str]]:
    """Servers that can run here, ours first, and why the others cannot."""
    found, missing = [], {}
    makers = {
        "embedloom": lambda: servers.ours(model, folder, options.threads),
        "embedloom-int8": lambda: servers.ours(model, folder, options.threads, "int8"),
        "vllm": lambda: servers.vllm(model, options.threads),
        "infinity": lambda: servers.infinity(model, options.threads, options.install),
        **{
            engine: functools.partial(servers.minimal, engine, model, options.threads, options.install)
            for engine in ("onnx-int8", "openvino", "fastembed")
        },
    }
    for name, make in makers.items():
        if options.only and name not in ("embedloom", *options.only):
            continue
        try:
            found.append(make())
        except servers.Missing as error:
            missing[name] = str(error)
    return found, missing


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything and put it side by side."""
    from embedloom.encoder.registry import resolve_model

    model = resolve_model(options.model)
    count_tokens(model, options.kinds, folder / "counts.json")
    found, missing = candidates(model, folder, options)
    rates = {kind: offline(str(model), kind, options.threads) for kind in options.kinds}
    options.rate = options.rate or round(_QUARTER * rates["short"] / _mean_tokens(folder))
    results: dict[str, dict[str, Any]] = {}
    for server in found:
        try:
            results[server.name] = measure(server, folder, options)
        except (servers.Missing, subprocess.CalledProcessError) as error:
            missing[server.name] = str(error)
    if "embedloom" not in results:
        raise SystemExit(missing["embedloom"])
    return summary(options, results, missing, rates)


def _mean_tokens(folder: Path) -> float:
    """Tokens of a short query, on average."""
    return float(np.mean(json.loads((folder / "counts.json").read_text())["short"]))


def summary(
    options: argparse.Namespace, results: dict[str, Any], missing: dict[str, str], rates: dict[str, float]
) -> dict[str, Any]:
    """The JSON object of the last line."""
    own = results["embedloom"]
    closed = {name: [row for row in r["rows"] if row["loop"] == "closed"] for name, r in results.items()}
    ours = headline(closed["embedloom"])["requests_per_second"]
    # Of equal work: what computes in 8 bits stands in the rows, not in the headline.
    peers = {
        name: headline(rows)["requests_per_second"]
        for name, rows in closed.items()
        if name != "embedloom" and "int8" not in name
    }
    best = max(peers, key=lambda name: peers[name], default=None)
    saturated = {
        kind: max(row["tokens_per_second"] for row in closed["embedloom"] if row["kind"] == kind) / rate
        for kind, rate in rates.items()
    }
    cosines = {
        name: float((r["vectors"] * own["vectors"]).sum(axis=1).min())
        for name, r in results.items()
        if name != "embedloom"
    }
    return {
        "name": "serve_load", "ours": ours, "peer": peers.get(best, 0.0) if best else 0.0,
        "peer_name": best or "none could be started", "ratio": round(ours / peers[best], 2) if best else 0.0,
        "unit": f"requests/s, {headline(closed['embedloom'])['clients']} clients, short queries",
        "floor_share": round(min(saturated.values()), 3),
        "equal": all(value >= 0.999 for name, value in cosines.items() if "int8" not in name) if cosines else None,
        "work": {
            "model": options.model, "threads": options.threads, "seconds": options.seconds,
            "offline_tokens_per_second": {kind: round(rate) for kind, rate in rates.items()},
            "share_of_offline_rate": {kind: round(share, 3) for kind, share in saturated.items()},
            "lowest_cosine_to_ours": cosines, "missing": missing, "open_loop_rate": options.rate,
            "start_seconds": {name: r["start_seconds"] for name, r in results.items()},
            "rows": [{"server": name, **row} for name, r in results.items() for row in r["rows"]],
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 and 16 clients, short stretches")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument(
        "--model", default="minilm-l6", help="a folder or registry name that every server can load"
    )
    parser.add_argument("--seconds", type=float, help="of each cell; default 5, 3 with --quick")
    parser.add_argument("--rate", type=float, default=0.0, help="of the open loop, requests a second")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--install",
        action="store_true",
        help="make the peers' environments in .bench/ where they are not there",
    )
    parser.add_argument("--only", action="append", help="a peer; repeatable; default: all")
    options = parser.parse_args()
    options.seconds = options.seconds or (3.0 if options.quick else 5.0)
    options.clients = (1, 16) if options.quick else (1, 16, 64, 256)
    options.kinds = ("short",) if options.quick else ("short", "mixed")
    with tempfile.TemporaryDirectory(prefix="el-", dir="/tmp") as folder:
        result = compare(options, Path(folder))
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
