"""A local HTTP server that answers ``/v1/embeddings`` as it is told to."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

DIMENSION = 6


def vector_of(text: str) -> list[float]:
    """A vector that depends on the text alone; not of length 1."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return (3 * np.random.default_rng(seed).standard_normal(DIMENSION)).astype(np.float32).tolist()


class FakeEndpoint:
    """What the server was asked, and how it shall answer.

    ``failures``: statuses to answer first, one a request. ``habit``: "reversed" sends the vectors in reverse order,
    "short" leaves the last one out, "empty" sends none, "doubled" repeats index 0, "wider" adds a value to the first
    vector of the second request, "nan" sends a NaN, "base64" sends text, "silent" leaves the usage out. ``most``: texts a request may
    have before the server answers 413. ``longest``: words of a text that the server reads, saying how many texts it cut.
    """

    def __init__(
        self, habit: str = "", failures: tuple[int, ...] = (), most: int = 10**6, longest: int = 10**6
    ) -> None:
        self.habit = habit
        self.failures = list(failures)
        self.most = most
        self.longest = longest
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""
        self.lock = threading.Lock()

    def answer(self, request: dict[str, Any], key: str | None) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.requests.append(request)
            self.keys.append(key)
            if self.failures:
                return self.failures.pop(0), {"error": {"message": "not now", "type": "server_error"}}
            number = len(self.requests)
        texts = request["input"]
        if len(texts) > self.most:
            return 413, {"error": {"message": "too many"}}
        data = [
            {"object": "embedding", "index": n, "embedding": vector_of(text)} for n, text in enumerate(texts)
        ]
        if self.habit == "reversed":
            data.reverse()
        elif self.habit == "short":
            data.pop()
        elif self.habit == "empty":
            data.clear()
        elif self.habit == "doubled":
            data[-1]["index"] = 0
        elif self.habit == "wider" and number == 2:
            data[0]["embedding"].append(1.0)
        elif self.habit == "nan":
            data[0]["embedding"][0] = float("nan")
        elif self.habit == "base64":
            data[0]["embedding"] = "AACAPw=="
        body: dict[str, Any] = {"object": "list", "model": request["model"], "data": data}
        if self.habit != "silent":
            words = [len(text.split()) for text in texts]
            tokens = sum(min(count, self.longest) for count in words)
            body["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
            if cut := sum(count > self.longest for count in words):
                body["usage"]["truncated_items"] = cut
        return 200, body


@contextmanager
def serve(endpoint: FakeEndpoint) -> Iterator[FakeEndpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/embeddings"
            status, body = endpoint.answer(request, self.headers.get("Authorization"))
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
