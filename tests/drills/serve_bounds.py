"""The drill of what comes before a request: huge headers, connections that never ask, bombs, half-closed clients.

    python tests/drills/serve_bounds.py [--model minilm-l6] [--connections 400] [--megabytes 40] [--replicas 1]

While each of them is tried, a well-behaved client asks short queries; its slowest answer and the memory of replicas and
proxy are in the result. Behind HAProxy (``--haproxy``) the bounds are its own: what they are is shown, not judged.
"""

import argparse
import contextlib
import gzip
import json
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from serve_process import MIB, NAME, Load, Running, endpoint, finish

HEADER_SECONDS = 10.0  # the default of serve.listener.header_seconds
GROWTH_MIB = 64.0  # of all processes together, while tens of megabytes are thrown at them


def query(number: int) -> dict[str, Any]:
    return {"model": NAME, "input": f"query {number}"}


def connect(port: int, address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60, source_address=(address, 0))


def reply(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        while piece := connection.recv(65536):
            found += piece
    return found


def status(found: bytes) -> str:
    return found.split(b" ", 2)[1].decode() if found.startswith(b"HTTP/") else "none"


def huge_header(running: Running, megabytes: int) -> str:
    with connect(running.port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\na: ")
        with contextlib.suppress(ConnectionError):  # who refuses may close before it has read it all
            for _ in range(megabytes):
                connection.sendall(b"x" * 10**6)
        return status(reply(connection))


def half_sent(running: Running, count: int) -> tuple[dict[str, int], float]:
    """Statuses of connections that never end their headers, and after how many seconds the last one was closed."""
    statuses: dict[str, int] = {}
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        # From several addresses, and so within what one client may have.
        open_ones = [
            stack.enter_context(connect(running.port, f"127.0.1.{n % 200 + 1}")) for n in range(count)
        ]
        for connection in open_ones:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: local")
        for connection in open_ones:
            connection.settimeout(max(0.1, started + 3 * HEADER_SECONDS - time.monotonic()))
            seen = status(reply(connection))
            statuses[seen] = statuses.get(seen, 0) + 1
    return statuses, time.monotonic() - started


def too_many(running: Running, count: int) -> dict[str, int]:
    """What one address sees that opens so many connections and keeps them."""
    statuses: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(connect(running.port, "127.0.2.1")) for _ in range(count)]
        for connection in open_ones:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        for connection in open_ones:
            # Answered ones stay open, so that a busy endpoint, which accepts some at a time, holds as many as a fast one.
            seen = "none"
            with contextlib.suppress(OSError):
                seen = status(connection.recv(4096))
            statuses[seen] = statuses.get(seen, 0) + 1
    return statuses


def send(running: Running, body: bytes, *headers: str, half_close: bool = False) -> str:
    head = ["POST /v1/embeddings HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    head += [f"content-length: {len(body)}"] + ([] if half_close else ["connection: close"])
    with connect(running.port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return status(reply(connection))


@contextlib.contextmanager
def watched(running: Running, name: str, into: dict[str, Any]) -> Iterator[None]:
    """A well-behaved client beside the trial: its statuses, its slowest answer, and the growth of memory."""
    before = running.memory()
    with Load(running.url, query, 1, pause_seconds=0.02) as load:
        time.sleep(1)
        yield
        time.sleep(1)
    into[name] = {
        "others": {str(k): v for k, v in load.statuses.items()},
        "others_p99_seconds": load.quantile(0.99),
        "growth_mib": round((running.memory() - before) / MIB, 1),
    }


def drill(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    beside: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    body = json.dumps(query(0)).encode()
    bomb = bytes(2**30)
    replicas = (options.replicas, options.replicas)
    with endpoint(options.model, folder, replicas, scaling={"haproxy": options.haproxy}) as running:
        with watched(running, "nothing", beside):
            time.sleep(3)
        with watched(running, "huge header", beside):
            seen["huge header"] = huge_header(running, options.megabytes)
        with watched(running, "half-sent headers", beside):
            seen["half-sent"], seconds = half_sent(running, options.connections)
        with watched(running, "one client's connections", beside):
            seen["one client"] = too_many(running, 700)
        with watched(running, "bombs", beside):
            seen["gzip bomb"] = send(running, gzip.compress(bomb), "content-encoding: gzip")
            seen["zstd bomb"] = send(running, zstandard.compress(bomb), "content-encoding: zstd")
        seen["gzip"] = send(running, gzip.compress(body), "content-encoding: gzip")
        seen["zstd"] = send(running, zstandard.compress(b"\xef\xbb\xbf" + body), "content-encoding: zstd")
        seen["br"] = send(running, body, "content-encoding: br")
        seen["half-closed"] = send(running, body, half_close=True)
    expected = {
        "huge header": "431",
        "gzip bomb": "413",
        "zstd bomb": "413",
        "gzip": "200",
        "zstd": "200",
        "br": "415",
    }
    expected["half-closed"] = "200"
    judged = [name for name in expected if name not in ("huge header", "half-closed") or not options.haproxy]
    problems = [
        f"{name}: {seen[name]}, expected {expected[name]}" for name in judged if seen[name] != expected[name]
    ]
    if not options.haproxy:
        problems += _bounds(seen, seconds)
    for name, found in beside.items():
        if set(found["others"]) != {"200"}:
            problems.append(f"{name}: others were answered {found['others']}")
        if found["growth_mib"] > GROWTH_MIB:
            problems.append(f"{name}: memory grew by {found['growth_mib']} MiB")
    result = {
        "drill": "serve_bounds", "replicas": options.replicas, "haproxy": options.haproxy, **seen,
        "half_sent_closed_seconds": round(seconds, 1), "beside": beside,
    }  # fmt: skip
    return result, problems


def _bounds(seen: dict[str, Any], seconds: float) -> list[str]:
    problems = []
    if set(seen["half-sent"]) != {"408"} or seconds > 2 * HEADER_SECONDS:
        problems.append(f"half-sent headers: {seen['half-sent']} after {seconds:.1f} s")
    if set(seen["one client"]) != {"200", "429"}:
        problems.append(f"700 connections of one client: {seen['one client']}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--connections", type=int, default=400)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--haproxy", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="el-drill-", dir="/tmp") as folder:
        finish(*drill(options, Path(folder)))


if __name__ == "__main__":
    main()
