"""The drill of too much at once: large requests, all in the same moment. Some are answered, the rest is refused at once
with 429, none runs into its time limit; and SIGTERM while they run ends the endpoint within its grace period.

    python tests/drills/serve_limits.py [--model minilm-l6] [--requests 13] [--tokens 6000] [--seconds 20] [--replicas 1]
    python tests/drills/serve_limits.py --requests 30 --tokens 12000 --seconds 60
    python tests/drills/serve_limits.py --requests 16 --tokens 12000 --seconds 60 --stop

A document has 230 tokens or so. ``--stop`` sends SIGTERM a second after the requests. From before the endpoint listens to
when it is ready, and from SIGTERM to when the port is closed, it is asked too: it may only answer 503 with Retry-After.
"""

import argparse
import concurrent.futures
import contextlib
import math
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from serve_process import NAME, Running, endpoint, finish, free_port

GRACE_SECONDS = 30.0  # Kubernetes' default
REFUSED_WITHIN_SECONDS = 5.0  # of the first second's crowd on a machine whose cores the encoder has


def body(number: int, tokens: int) -> dict[str, Any]:
    texts = [
        f"document {number} {n} " + "merge two sorted lists of words " * 37 for n in range(tokens // 230)
    ]
    return {"model": NAME, "input": texts, "truncate": "end"}


def ask(running: Running, number: int, tokens: int) -> tuple[int, float, dict[str, Any]]:
    started = time.monotonic()
    try:
        reply = httpx.post(
            f"{running.url}/v1/embeddings", json=body(number, tokens), trust_env=False, timeout=180
        )
        content = (
            reply.json() if reply.headers["content-type"] == "application/json" else {"text": reply.text}
        )
        content.pop("data", None)
        content["retry-after"] = reply.headers.get("retry-after")
        return reply.status_code, time.monotonic() - started, content
    except httpx.HTTPError as error:
        return 0, time.monotonic() - started, {"error": repr(error)}


@contextlib.contextmanager
def asked_from_the_start(port: int, statuses: Counter[int], problems: list[str]) -> Iterator[None]:
    """Ask an endpoint that is being started, until the block ends."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.1):
            with contextlib.suppress(httpx.HTTPError):
                url = f"http://127.0.0.1:{port}/v1/embeddings"
                reply = httpx.post(url, json=body(0, 230), trust_env=False, timeout=60)
                statuses[reply.status_code] += 1
                if reply.status_code != 200:
                    told(reply, "while starting", problems)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def told(reply: httpx.Response, when: str, problems: list[str]) -> None:
    """Whether a reply says that the endpoint is not there, as it should."""
    if reply.status_code != 503 or "retry-after" not in reply.headers or "error" not in reply.json():
        problems.append(f"{when}: {reply.status_code} {reply.text[:100]}")


def stopped(running: Running, log: Path, statuses: Counter[int], problems: list[str]) -> float:
    """SIGTERM while requests run, and questions until the port is closed; seconds to the end."""
    started = time.monotonic()
    ended: list[float] = []

    def wait() -> None:
        running.process.wait()
        ended.append(time.monotonic() - started)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # until the signal was seen
    while not ended and time.monotonic() - started < 3 * GRACE_SECONDS:
        with contextlib.suppress(httpx.HTTPError):
            reply = httpx.post(f"{running.url}/v1/embeddings", json=body(0, 230), trust_env=False, timeout=30)
            statuses[reply.status_code] += 1
            if reply.status_code != 200 or statuses[503]:  # it may have come before the signal
                told(reply, "while stopping", problems)
        time.sleep(0.2)
    seconds = ended[0] if ended else math.inf
    if running.process.poll() != 0:
        problems.append(f"exit code {running.process.poll()}")
    if "Traceback" in log.read_text():
        problems.append(f"a traceback: {log.read_text()[-600:]}")
    if seconds > GRACE_SECONDS:
        problems.append(f"it took {seconds:.1f} s to end, allowed {GRACE_SECONDS:g}")
    return seconds


def drill(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    problems: list[str] = []
    starting: Counter[int] = Counter()
    stopping: Counter[int] = Counter()
    ended = None
    settings = (f"request_timeout_seconds={options.seconds:g}",)
    port, replicas = free_port(), (options.replicas, options.replicas)
    with contextlib.ExitStack() as stack:
        with asked_from_the_start(port, starting, problems):
            running = stack.enter_context(endpoint(options.model, folder, replicas, settings, port=port))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(options.requests))
        lone = ask(running, 99, options.tokens)
        asked = [pool.submit(ask, running, number, options.tokens) for number in range(options.requests)]
        if options.stop:
            time.sleep(1)
            ended = stopped(running, folder / "serve.log", stopping, problems)
        answers = [future.result() for future in asked]
    statuses = Counter(status for status, *_ in answers)
    refused = [seconds for status, seconds, _ in answers if status == 429]
    result = {
        "drill": "serve_limits", "requests": options.requests, "limit_seconds": options.seconds,
        "tokens": lone[2].get("usage", {}).get("prompt_tokens"), "lone_seconds": round(lone[1], 2),
        "replicas": options.replicas, "statuses": {str(k): v for k, v in sorted(statuses.items())},
        "answered_within": round(max([s for status, s, _ in answers if status == 200], default=0.0), 1),
        "refused_within": round(max(refused, default=0.0), 2),
        "ended_seconds": ended and round(ended, 1), "while_starting": dict(starting), "while_stopping": dict(stopping),
        "refusal": next((content for status, _, content in answers if status == 429), None),
    }  # fmt: skip
    allowed = {200, 429, 503} if options.stop else {200, 429}
    others = [(status, content) for status, _, content in answers if status not in allowed]
    if others:
        problems.append(f"other answers: {others[:3]}")
    if not statuses[200] and not options.stop:
        problems.append("none was answered")
    if max(refused, default=0.0) > REFUSED_WITHIN_SECONDS:
        problems.append(f"a refusal took {max(refused):.1f} s")
    return result, problems[:5]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--requests", type=int, default=13)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--stop", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="el-drill-", dir="/tmp") as folder:
        finish(*drill(options, Path(folder)))


if __name__ == "__main__":
    main()
