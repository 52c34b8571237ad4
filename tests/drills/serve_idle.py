"""The drill of an endpoint at zero that is watched: probes of every kind, and it stays at zero; a request then wakes it.

    python tests/drills/serve_idle.py [--minutes 10] [--every 5] [--idle 20] [--model minilm-l6]

Every ``--every`` seconds each of the probes asks once: what load balancers, Prometheus, Kubernetes and the page ask.
"""

import argparse
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from serve_process import NAME, Running, endpoint, finish

WAIT_FOR_ZERO_SECONDS = 180.0
PROBES = (
    ("GET", "/ready", {}), ("GET", "/health", {}), ("GET", "/metrics", {}), ("GET", "/", {}), ("GET", "/v1/models", {}),
    ("HEAD", "/", {}), ("HEAD", "/ready", {}), ("OPTIONS", "/", {}), ("OPTIONS", "/v1/embeddings", {}),
    ("GET", "/ready", {"host": "10.1.2.3:8000", "user-agent": "kube-probe/1.33"}),
    ("GET", "/health", {"host": "embeddings.internal", "user-agent": ""}),
    ("GET", f"/v1/models/{NAME}", {}),
)  # fmt: skip


def oldest_check(port: int) -> int:
    """HAProxy's classic check: HTTP/1.0 without a Host."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"OPTIONS / HTTP/1.0\r\n\r\n")
        return int(connection.recv(1024).split()[1])


def encoders(running: Running) -> int:
    return sum(":encoder" in " ".join(process.cmdline()) for process in running.replicas())


def probe(running: Running, client: httpx.Client, seen: Counter[str]) -> list[Any]:
    """Ask everything once; returns the counts of replicas that ``/ready`` told."""
    told = []
    for method, path, headers in PROBES:
        reply = client.request(method, f"{running.url}{path}", headers=headers)
        seen[f"{method} {path} {reply.status_code}"] += 1
        if method == "GET" and path == "/ready":
            told.append(reply.json().get("replicas"))
    seen[f"OPTIONS / HTTP/1.0 {oldest_check(running.port)}"] += 1
    return told


def drill(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    problems: list[str] = []
    seen: Counter[str] = Counter()
    woken, told = 0, set()
    scaling = {"idle_to_zero_seconds": options.idle}
    with (
        endpoint(options.model, folder, (0, 1), scaling=scaling) as running,
        httpx.Client(trust_env=False, timeout=60) as client,
    ):
        deadline = time.monotonic() + WAIT_FOR_ZERO_SECONDS + options.idle
        while encoders(running) and time.monotonic() < deadline:  # the probes must not keep it up either
            probe(running, client, Counter())
            time.sleep(options.every)
        if encoders(running):
            problems.append("it did not go to zero while it was probed")
        end = time.monotonic() + 60 * options.minutes
        rounds = 0
        while time.monotonic() < end:
            told.update(probe(running, client, seen))
            rounds += 1
            next_round = time.monotonic() + options.every
            while time.monotonic() < next_round:
                woken += encoders(running) > 0
                time.sleep(0.5)
        started = time.monotonic()
        woke = client.post(f"{running.url}/v1/embeddings", json={"model": NAME, "input": "a"})
        wake_seconds = time.monotonic() - started
    bad = {line: count for line, count in seen.items() if line.split()[-1] not in ("200", "204")}
    if bad:
        problems.append(f"answers: {bad}")
    if woken or told != {0}:
        problems.append(f"an encoder was up at {woken} looks; /ready told {sorted(map(str, told))}")
    if woke.status_code != 200:
        problems.append(f"the request that wakes it: {woke.status_code} {woke.text[:200]}")
    result = {
        "drill": "serve_idle", "minutes": options.minutes, "rounds": rounds, "probes": sum(seen.values()),
        "looks_with_an_encoder": woken, "wake_seconds": round(wake_seconds, 1), "answers": dict(seen),
    }  # fmt: skip
    return result, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--idle", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="el-drill-", dir="/tmp") as folder:
        finish(*drill(options, Path(folder)))


if __name__ == "__main__":
    main()
