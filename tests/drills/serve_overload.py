"""The overload drill: ten times what the endpoint can do, for a minute. Every request is answered 200 or 429, those
accepted in bounded time, and memory stays flat.

    python tests/drills/serve_overload.py [--model minilm-l6] [--seconds 60] [--factor 10] [--replicas 1]

Capacity is measured first, with as many clients as its queue has room for; then ``factor`` times as many clients ask, and
wait after a 429 just so long that together they ask ``factor`` times what it can do. Clients and endpoint share the
cores, so what refusing and being refused cost is in the figures.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from serve_process import MIB, NAME, Load, endpoint, finish

TEXT = "how do I merge two sorted lists without copying either of them into a third "
TEXTS_PER_REQUEST = 16
MAX_REQUESTS = 16  # running and waiting together, of one replica


def body(number: int) -> dict[str, Any]:
    return {"model": NAME, "input": [f"{TEXT} {number} {n}" for n in range(TEXTS_PER_REQUEST)]}


def drill(
    model: str, seconds: float, factor: int, replicas: int, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    limits = (f"max_ongoing_requests={MAX_REQUESTS // 2}", f"max_queued_requests={MAX_REQUESTS // 2}")
    with endpoint(model, folder, (replicas, replicas), limits) as running:
        room = replicas * (MAX_REQUESTS // 2) + MAX_REQUESTS // 2
        calm_seconds = max(10.0, seconds / 3)
        with Load(running.url, body, room) as calm:
            time.sleep(calm_seconds)
        capacity = len(calm.seconds) / calm_seconds
        before = running.memory()
        memory = []
        pause = room / max(capacity, 0.1)
        with Load(running.url, body, factor * room, refused_seconds=pause) as load:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(2)
                memory.append(running.memory())
        with Load(running.url, body, 1) as after:
            time.sleep(3)
    # A queue of at most ``room`` requests is computed at the capacity; twice that bounds what noise adds.
    bound = 2 * room / max(capacity, 0.1) + 1.0
    # Means of the middle and of the last third: in between two trims of the heap it rises by some 100 MiB and falls again.
    third = max(1, len(memory) // 3)
    growth = (fmean(memory[-third:]) - fmean(memory[-2 * third : -third] or [before])) / MIB
    result = {
        "drill": "serve_overload", "model": model, "seconds": seconds, "clients": factor * room,
        "requests": sum(load.statuses.values()), "statuses": {str(k): v for k, v in sorted(load.statuses.items())},
        "capacity_per_second": round(capacity, 1), "accepted_per_second": round(len(load.seconds) / seconds, 1),
        "p50_seconds": load.quantile(0.5), "p99_seconds": load.quantile(0.99), "p99_bound_seconds": round(bound, 2),
        "memory_before_mib": round(before / MIB), "memory_peak_mib": round(max(memory, default=0) / MIB),
        "memory_growth_mib": round(growth, 1), "after": {str(k): v for k, v in after.statuses.items()},
    }  # fmt: skip
    problems = []
    if set(load.statuses) - {200, 429}:
        problems.append(f"other answers than 200 and 429: {load.errors}")
    if not load.statuses[200] or not load.statuses[429]:
        problems.append("an overload has both answers")
    if load.quantile(0.99) > bound:
        problems.append(f"p99 of accepted requests is {load.quantile(0.99)} s, bound {bound:.2f} s")
    if growth > max(50.0, 0.05 * before / MIB):
        problems.append(f"memory grew by {growth:.0f} MiB while overloaded")
    if set(after.statuses) != {200}:
        problems.append(f"not recovered: {dict(after.statuses)}")
    return result, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="el-drill-", dir="/tmp") as folder:
        finish(*drill(options.model, options.seconds, options.factor, options.replicas, Path(folder)))


if __name__ == "__main__":
    main()
