"""The drill of scaling on queueing time: from zero to one by a request, to two by a step of load, and back to zero.

    python tests/drills/serve_scaling.py [--model minilm-l6] [--clients 16]

The step is of bulk requests, few and large, which a number of requests in hand would not tell from queries.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from serve_process import NAME, Load, Running, endpoint, finish

# To the first sign of the new replica, its process: the decision (5 s at most), and Ray's starting of a process.
DECISION_SECONDS = 5.0
PROCESS_SECONDS = 10.0
TEXT = "The quick brown fox jumps over the lazy dog. " * 12
SCALING = {
    "target_ongoing_requests": None,
    "target_queue_seconds": 0.5,
    "scale_down_seconds": 15,
    # Well behind the way down to one, or that is over before a look at the processes sees it.
    "idle_to_zero_seconds": 45,
}


def encoders(running: Running) -> int:
    return sum(":encoder" in " ".join(process.cmdline()) for process in running.replicas())


def until(running: Running, count: int, seconds: float) -> float | None:
    """Seconds until there are so many encoders; None: not in time."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if encoders(running) == count:
            return round(time.monotonic() - started, 2)
        time.sleep(0.1)
    return None


def drill(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    problems: list[str] = []
    with endpoint(options.model, folder, (0, 2), scaling=SCALING) as running:
        seen: dict[str, Any] = {"to_zero": until(running, 0, 120.0)}
        started = time.monotonic()
        one = httpx.post(
            f"{running.url}/v1/embeddings",
            json={"model": NAME, "input": "wake up"},
            trust_env=False,
            timeout=120,  # the endpoint's own answer, 504, comes after 60
        )
        seen |= {"woken": one.status_code, "wake_seconds": round(time.monotonic() - started, 2)}
        with Load(running.url, lambda number: {"model": NAME, "input": [TEXT] * 32}, options.clients) as load:
            seen["to_two"] = until(running, 2, 60.0)
            time.sleep(20)
        seen |= {
            "statuses": dict(load.statuses),
            "to_one": until(running, 1, 120.0),
            "to_none": until(running, 0, 120.0),
        }
    if seen["woken"] != 200 or not set(load.statuses) <= {200, 429}:
        problems.append(f"not answered: {seen['woken']}, {load.errors}")
    if seen["to_two"] is None or seen["to_two"] > DECISION_SECONDS + PROCESS_SECONDS:
        problems.append(f"the second encoder came after {seen['to_two']} s")
    problems += [f"{name}: never" for name in ("to_zero", "to_one", "to_none") if seen[name] is None]
    return seen, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        finish(*drill(options, Path(folder)))


if __name__ == "__main__":
    main()
