"""The soak: many minutes of mixed requests, good and bad ones; the slope of memory, and that nothing fails.

    python tests/drills/serve_soak.py [--model minilm-l6] [--minutes 15] [--clients 8] [--max-slope 1.0]

Memory is taken at rest, twice a minute: the clients pause, the same 80 requests are sent, and one more when the heap
is due to be trimmed. Under load it swings by 40 MiB with what is computed at the moment and with the shapes that are
cached, which hid everything below 5 MiB a minute; at rest, only what was kept differs. The slope is that of the second half,
with its 95 % interval: before, the libraries' caches fill.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from embed_kills import WORDS
from scipy.stats import linregress, t
from serve_process import MIB, NAME, Load, Running, endpoint, finish

from embedloom.serving.service import TRIM_SECONDS

_BUSY_SECONDS = 18.0
_REFERENCE = 80  # more than the 64 shapes that a replica's compiled products are kept for


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


def at_rest(running: Running, load: Load) -> dict[str, int]:
    """Bytes by role when nothing is computed, the caches hold the same shapes and the heap has just been trimmed."""
    with load.paused(), httpx.Client(trust_env=False, timeout=120) as client:
        last = time.monotonic()
        for number in range(1, 1 + _REFERENCE):
            # Never a twentieth of them, which would be refused.
            client.post(f"{running.url}/v1/embeddings", json=body(20 * number + 1)).raise_for_status()
            last = time.monotonic()
        # A trim follows the first batch that ends so long after the one before.
        time.sleep(max(0.0, last + TRIM_SECONDS + 0.5 - time.monotonic()))
        client.post(f"{running.url}/v1/embeddings", json=body(1)).raise_for_status()
        return running.memory_by_role()


def slope(minutes: list[float], kept: list[float]) -> tuple[float, float]:
    """MiB a minute over the second half of the samples, and half its 95 % interval."""
    half = len(kept) // 2
    if len(kept) - half < 3:
        return 0.0, float("inf")
    fit = linregress(minutes[half:], kept[half:])
    return float(fit.slope), float(fit.stderr * t.ppf(0.975, len(kept) - half - 2))


def drill(
    model: str, minutes: float, clients: int, max_slope: float, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    moments: list[float] = []
    roles: list[dict[str, int]] = []
    highest = 0
    with endpoint(model, folder) as running:
        started = time.monotonic()
        with Load(running.url, body, clients, pause_seconds=0.01) as load:
            while time.monotonic() < started + 60 * minutes:
                busy_until = time.monotonic() + _BUSY_SECONDS
                while time.monotonic() < busy_until:
                    time.sleep(1.0)
                    highest = max(highest, running.memory())
                roles.append(at_rest(running, load))
                moments.append((time.monotonic() - started) / 60)
    sizes = [sum(role.values()) / MIB for role in roles]
    found, margin = slope(moments, sizes)
    result = {
        "drill": "serve_soak", "model": model, "minutes": minutes, "requests": sum(load.statuses.values()),
        "statuses": {str(k): v for k, v in sorted(load.statuses.items())}, "p99_seconds": load.quantile(0.99),
        "first_mib": round(sizes[0]), "last_mib": round(sizes[-1]), "highest_under_load_mib": round(highest / MIB),
        "slope_mib_per_minute": round(found, 3), "slope_margin": round(margin, 3),
        "at_rest_mib": {role: [round(sizes[role] / MIB, 1) for sizes in roles] for role in roles[0]},
    }  # fmt: skip
    problems = []
    if set(load.statuses) - {200, 400}:
        problems.append(f"other answers than 200 and 400: {load.errors}")
    if found - margin > max_slope:
        problems.append(f"memory grows by {found:.2f} +- {margin:.2f} MiB a minute, allowed {max_slope}")
    if margin > max_slope:
        problems.append(f"the interval, +- {margin:.2f} MiB a minute, would not show a growth of {max_slope}")
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
