"""The drill of a replica killed with -9, a redeploy and a scale-down, all under load: how many requests fail?

    python tests/drills/serve_kills.py [--model minilm-l6] [--kills 2] [--clients 8] [--replicas 2] [--gateways 1]

Behind a gateway (two replicas or more) the goal is none. A single replica is the endpoint itself: what it had in hand
when it was killed is lost, so there only redeploy and drain are held to none, and kills are left out. With several gateways one
of those is killed, too: the requests it had in hand lose their connection (at most one a client), and every other is answered.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from serve_process import NAME, Load, Running, endpoint, finish

from embedloom.encoder.registry import resolve_model

DEPLOY_RULES = ("min_requests=5", "min_compared=5", "max_latency_ratio=50", "latency_slack_seconds=30")


def body(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    return {
        "model": NAME,
        "input": [f"text {draw.randrange(5000)} of a client" for _ in range(draw.choice((1, 1, 4)))],
    }


def kill_one(running: Running, role: str = ":encoder") -> int:
    """Kill a process of that role; returns its id."""
    found = [process for process in running.replicas() if role in " ".join(process.cmdline())]
    victim = random.choice(found)
    os.kill(victim.pid, signal.SIGKILL)
    return victim.pid


def redeploy(running: Running, model: Path, watch: float) -> tuple[int, str]:
    """`embedloom deploy` as a user calls it; exit code and its last words."""
    command = [sys.executable, "-m", "embedloom.cli", "deploy", str(model), "--port", str(running.port)]
    command += ["--cluster", str(running.cluster), "--canary", "0.3", "--watch", str(watch)]
    for rule in DEPLOY_RULES:
        command += ["--set", rule]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    words = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return done.returncode, words[-2] if len(words) > 1 else words[-1]


def drill(
    model: str, kills: int, clients: int, replicas: int, watch: float, folder: Path, gateways: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    copy = folder / "next-version"
    shutil.copytree(
        resolve_model(model), copy
    )  # the same weights under another name: no drift, another fingerprint
    problems: list[str] = []
    settings = (f"gateways={gateways}",) if gateways > 1 else ()
    with endpoint(model, folder, (replicas, replicas), settings) as running:
        with Load(running.url, body, clients, pause_seconds=0.01) as load:
            time.sleep(2)
            for _ in range(kills if replicas > 1 else 0):
                kill_one(running)
                time.sleep(4)
            if gateways > 1:
                kill_one(running, ":gateway")
                time.sleep(6)
            after_kills = dict(load.statuses)
            code, words = redeploy(running, copy, watch)
            card = httpx.get(f"{running.url}/v1/models", trust_env=False, timeout=60).json()["data"][0]
            time.sleep(2)
        requests = sum(load.statuses.values())
        # Ctrl-C while requests run: each that was accepted is answered.
        with Load(running.url, body, 4) as draining:
            time.sleep(1)
            draining.over.set()
        drained = dict(draining.statuses)
    if code != 0:
        problems.append(f"deploy ended with {code}: {words}")
    if not card["fingerprint"].startswith("next-version@"):
        problems.append(f"still served: {card['fingerprint']}")
    failed = {str(status): count for status, count in load.statuses.items() if status != 200}
    # Connections that a killed gateway had, of clients that each wait for one answer.
    lost = min(load.statuses.get(0, 0), clients) if gateways > 1 else 0
    if sum(failed.values()) > lost or set(drained) != {200}:
        problems.append(
            f"failed requests: {failed} {load.errors}; while stopping: {drained} {draining.errors}"
        )
    result = {
        "drill": "serve_kills", "model": model, "replicas": replicas, "kills": kills if replicas > 1 else 0, "gateways": gateways,
        "requests": requests, "failed": failed, "after_kills": {str(k): v for k, v in after_kills.items()},
        "deploy": words, "p99_seconds": load.quantile(0.99),
    }  # fmt: skip
    return result, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--watch", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="el-drill-", dir="/tmp") as folder:
        finish(
            *drill(
                options.model,
                options.kills,
                options.clients,
                options.replicas,
                options.watch,
                Path(folder),
                options.gateways,
            )
        )


if __name__ == "__main__":
    main()
