"""The soak: many minutes of mixed requests, good and bad ones; the slope of memory, and that nothing fails.

    python tests/drills/serve_soak.py [--model minilm-l6] [--minutes 15] [--clients 8] [--max-slope 1.0]

The slope is that of the second half: before, the libraries' caches fill with the batch shapes there are.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from embed_kills import WORDS
from serve_process import MIB, NAME, Load, endpoint, finish


def body(number: int) -> dict[str, Any]:
    """Short and long texts, single ones and lists, and one in twenty that must be refused."""
    draw = random.Random(number)
    if number % 20 == 0:
        return {"model": NAME, "input": ["", 3]}
    texts = [
        " ".join(draw.choices(WORDS, k=draw.choice((3, 8, 8, 30, 120))))
        for _ in range(draw.choice((1, 1, 1, 8)))
    ]
    kind = draw.choice(("query", "document"))
    return {"model": NAME, "input": texts, "input_type": kind, "truncate": "end"}


def slope(moments: list[float], sizes: list[int]) -> float:
    """MiB per minute, by least squares over the second half."""
    start = len(moments) // 2
    if len(moments) - start < 2:
        return 0.0
    return float(np.polyfit(np.array(moments[start:]) / 60, np.array(sizes[start:]) / MIB, 1)[0])


def series(moments: list[float], roles: list[dict[str, int]]) -> dict[str, list[int]]:
    """MiB at the end of each minute, by role."""
    last = {int(moment // 60): sizes for moment, sizes in zip(moments, roles, strict=True)}
    return {role: [round(sizes[role] / MIB) for sizes in last.values()] for role in roles[0]}


def drill(
    model: str, minutes: float, clients: int, max_slope: float, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    moments: list[float] = []
    roles: list[dict[str, int]] = []
    with endpoint(model, folder) as running:
        started = time.monotonic()
        with Load(running.url, body, clients, pause_seconds=0.01) as load:
            while time.monotonic() < started + 60 * minutes:
                time.sleep(max(1.0, min(10.0, 6 * minutes)))
                moments.append(time.monotonic() - started)
                roles.append(running.memory_by_role())
    sizes = [sum(role.values()) for role in roles]
    found = slope(moments, sizes)
    result = {
        "drill": "serve_soak", "model": model, "minutes": minutes, "requests": sum(load.statuses.values()),
        "statuses": {str(k): v for k, v in sorted(load.statuses.items())}, "p99_seconds": load.quantile(0.99),
        "first_mib": round(sizes[0] / MIB), "last_mib": round(sizes[-1] / MIB), "slope_mib_per_minute": round(found, 3),
        "series_mib": series(moments, roles),
    }  # fmt: skip
    problems = []
    if set(load.statuses) - {200, 400}:
        problems.append(f"other answers than 200 and 400: {load.errors}")
    if found > max_slope:
        problems.append(f"memory grows by {found:.2f} MiB a minute, allowed {max_slope}")
    return result, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-slope", type=float, default=1.0, help="MiB a minute")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="el-drill-", dir="/tmp") as folder:
        finish(*drill(options.model, options.minutes, options.clients, options.max_slope, Path(folder)))


if __name__ == "__main__":
    main()
