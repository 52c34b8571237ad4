"""What the drills of the endpoint share: `embedloom serve` in a process of its own, clients, and memory."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

NAME = "drill"
START_SECONDS = 240.0
MIB = 2**20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Running:
    """A started endpoint."""

    process: subprocess.Popen[bytes]
    port: int
    cluster: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def replicas(self) -> list[psutil.Process]:
        """Serve's replica processes of this endpoint."""
        return [child for child in self._children() if "ServeReplica:" in _title(child)]

    def memory(self) -> int:
        """Bytes of replicas and proxy together; see ``memory_by_role``."""
        return sum(self.memory_by_role().values())

    def memory_by_role(self) -> dict[str, int]:
        """Bytes that are a process's alone (USS), of replicas and of proxies: what requests can make grow.

        A share of common pages (PSS) would grow whenever another process that maps them ends.
        """
        roles = {"ServeReplica:": "replicas", "ProxyActor": "proxy"}
        sizes = dict.fromkeys(roles.values(), 0)
        for process in self._children():
            role = next((role for mark, role in roles.items() if mark in _title(process)), None)
            if role is not None:
                with contextlib.suppress(psutil.Error):
                    sizes[role] += int(process.memory_full_info().uss)
        return sizes

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextlib.contextmanager
def endpoint(
    model: str,
    folder: Path,
    replicas: tuple[int, int] = (1, 1),
    settings: tuple[str, ...] = (),
    scaling: dict[str, Any] | None = None,
    port: int | None = None,
) -> Iterator[Running]:
    """Serve a model with so many replicas (min, max), and what else a profile's ``serve`` states, until the block ends."""
    scaling = {
        "min_replicas": replicas[0],
        "max_replicas": replicas[1],
        "target_ongoing_requests": 8,
        "threads": 1,
        **(scaling or {}),
    }
    cluster = folder / "cluster.yaml"
    profile = {"backend": "local", "logical_cpus": 8, "object_store_mib": 300, "serve": scaling}
    token = {"mode": "token", "token_path": str(folder / "token")}
    ray = {"version": "2.60.0", "python": "3.11"}
    cluster.write_text(
        yaml.safe_dump({"version": 1, "ray": ray, "auth": token, "profiles": {"local": profile}})
    )
    port = port or free_port()
    command = [sys.executable, "-m", "embedloom.cli", "serve", model, "--name", NAME, "--port", str(port)]
    command += [
        "--cluster",
        str(cluster),
        "--set",
        "require_gate=false",
        "--set",
        "request_log=none",
        "--verbose",
    ]
    for item in settings:
        command += ["--set", item]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
    try:
        running = Running(process, port, cluster)
        _wait(running, folder / "serve.log")
        yield running
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; then, if it does not go, its process group."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(running: Running, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            raise RuntimeError(f"serve ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{running.url}/ready", trust_env=False, timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(f"not ready: {log.read_text()[-2000:]}")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass(slots=True)
class Load:
    """Clients in threads, each asking again as soon as it is answered."""

    url: str
    body: Callable[[int], dict[str, Any]]
    clients: int
    pause_seconds: float = 0.0
    refused_seconds: float = 0.05  # pause after a 429
    statuses: Counter[int] = field(default_factory=Counter)  # 0: no answer
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of answers with 200
    over: threading.Event = field(default_factory=threading.Event)
    waved_on: threading.Event = field(default_factory=threading.Event)  # cleared while clients pause
    asking: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self.waved_on.set()
        self.threads = [
            threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(self.clients)
        ]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.waved_on.set()
        for thread in self.threads:
            thread.join(180)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """All clients have their answers, and ask nothing until the block ends."""
        self.waved_on.clear()
        while self.asking:
            time.sleep(0.02)
        try:
            yield
        finally:
            self.waved_on.set()

    def _ask(self, number: int) -> None:
        with httpx.Client(trust_env=False, timeout=120) as client:
            while not self.over.is_set():
                self.waved_on.wait()
                with self.lock:
                    self.asking += 1
                number += self.clients
                started = time.monotonic()
                status, text = 0, ""
                try:
                    reply = client.post(f"{self.url}/v1/embeddings", json=self.body(number))
                    status, text = reply.status_code, reply.text
                except httpx.HTTPError as error:
                    text = f"{type(error).__name__}: {error}"
                with self.lock:
                    self.asking -= 1
                    self.statuses[status] += 1
                    if status == 200:
                        self.seconds.append(time.monotonic() - started)
                    elif status != 429 and len(self.errors) < 5:
                        self.errors.append(f"{status} {text[:200]}")
                self.over.wait(max(self.pause_seconds, self.refused_seconds if status == 429 else 0.0))

    def quantile(self, share: float) -> float:
        """Seconds within which so many of the 200s came."""
        ordered = sorted(self.seconds)
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else 0.0


def finish(result: dict[str, Any], problems: list[str]) -> None:
    """One JSON line; exit 1 where something failed."""
    print(json.dumps({**result, "problems": problems}), flush=True)
    sys.exit(bool(problems))
