"""The soak: many minutes of mixed requests, good and bad ones; the slope of memory, and that nothing fails.

    python tests/drills/serve_soak.py [--model minilm-l6] [--minutes 15] [--clients 8] [--max-slope 1.0]

The slope is that of the second half, with its interval: before, the libraries' caches fill with the batch shapes there are.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from embed_kills import WORDS
from scipy.stats import linregress, t
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


def floors(moments: list[float], sizes: list[int]) -> list[float]:
    """MiB, the lowest of each whole minute: what is kept. Between two trims of the heap, some 40 more come and go."""
    lowest: dict[int, int] = {}
    for moment, size in zip(moments, sizes, strict=True):
        minute = int(moment // 60)
        lowest[minute] = min(size, lowest.get(minute, size))
    return [size / MIB for minute, size in lowest.items() if 60 * (minute + 1) <= moments[-1]]


def slope(kept: list[float]) -> tuple[float, float]:
    """MiB a minute over the second half of the minutes, and half its 95 % interval."""
    half = kept[len(kept) // 2 :]
    if len(half) < 3:
        return 0.0, 0.0
    fit = linregress(range(len(half)), half)
    return float(fit.slope), float(fit.stderr * t.ppf(0.975, len(half) - 2))


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
                time.sleep(2.0)
                moments.append(time.monotonic() - started)
                roles.append(running.memory_by_role())
    sizes = [sum(role.values()) for role in roles]
    found, margin = slope(floors(moments, sizes))
    result = {
        "drill": "serve_soak", "model": model, "minutes": minutes, "requests": sum(load.statuses.values()),
        "statuses": {str(k): v for k, v in sorted(load.statuses.items())}, "p99_seconds": load.quantile(0.99),
        "first_mib": round(sizes[0] / MIB), "last_mib": round(sizes[-1] / MIB), "slope_mib_per_minute": round(found, 3),
        "slope_margin": round(margin, 3),
        "lowest_mib": {
            role: [round(kept) for kept in floors(moments, [sizes[role] for sizes in roles])] for role in roles[0]
        },
    }  # fmt: skip
    problems = []
    if set(load.statuses) - {200, 400}:
        problems.append(f"other answers than 200 and 400: {load.errors}")
    if found - margin > max_slope:
        problems.append(f"memory grows by {found:.2f} +- {margin:.2f} MiB a minute, allowed {max_slope}")
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
