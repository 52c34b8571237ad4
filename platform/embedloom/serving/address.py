"""Where endpoints run that `embedloom serve` started on this machine, so that `embedloom deploy` and `serve --stop` find them."""

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedloom.core.contents import cache_folder
from embedloom.errors import ConfigError, ServeError


@dataclass(frozen=True, slots=True)
class Address:
    """One endpoint: where clients ask, where its Ray listens, and the process that keeps it up.

    Attributes:
        port: that clients connect to.
        url: that clients ask.
        ray_address: of its Ray.
        pid: of the command that started it.
        name: what clients put into ``model``.
        session: the folder of a Ray that the command started for itself; empty: the Ray was there before.
    """

    port: int
    url: str
    ray_address: str
    pid: int
    name: str = ""
    session: str = ""

    @property
    def path(self) -> Path:
        """The file that says so."""
        return _folder() / f"{self.port}.json"

    @property
    def runs(self) -> bool:
        """Whether its command does."""
        return _runs(self.pid)


def remember(port: int, url: str, ray_address: str, name: str = "", session: str = "") -> Path:
    """Write down an endpoint of this process; returns the file, which goes when the endpoint stops."""
    address = Address(port, url, ray_address, os.getpid(), name, session)
    address.path.parent.mkdir(parents=True, exist_ok=True)
    address.path.write_text(json.dumps(asdict(address)) + "\n")
    return address.path


def started(name: str) -> Address:
    """The endpoint of a served name, or of a port; also one whose command was killed and left its Ray behind.

    Raises:
        ConfigError: none, or several of that name.
    """
    known = _all()
    found = [one for one in known if name in (one.name, str(one.port))]
    if len(found) == 1:
        return found[0]
    allowed = ", ".join(f"{one.name or '?'} (port {one.port})" for one in known) or "none runs"
    if found:
        raise ConfigError(
            f"--stop: several endpoints are called {name!r}; allowed: their ports, of {allowed}"
        )
    raise ConfigError(f"--stop: no endpoint {name!r} was started on this machine; allowed: {allowed}")


def interrupt(address: Address, seconds: float) -> None:
    """Have the command of an endpoint stop it, as Ctrl-C does, and wait until it has.

    Raises:
        ServeError: it has not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        os.kill(address.pid, signal.SIGTERM)
    while address.runs:
        if time.monotonic() > deadline:
            raise ServeError(
                f"process {address.pid}, which serves {address.name!r}, did not stop within {seconds:g} s; kill it, and then "
                "`embedloom serve --stop` ends what it leaves"
            )
        time.sleep(0.1)


def answers(ray_address: str) -> bool:
    """Whether somebody listens where a Ray was."""
    host, _, port = ray_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return False
    return True


def find(port: int | None) -> Address:
    """The endpoint of a port; None: the only one.

    Raises:
        ConfigError: none, or several without a port.
    """
    running = [address for address in _all() if address.runs]
    found = [address for address in running if port in (None, address.port)]
    if len(found) == 1:
        return found[0]
    ports = ", ".join(str(address.port) for address in running) or "none"
    if found:
        raise ConfigError(f"--port: several endpoints run on this machine; allowed: {ports}")
    asked = "no endpoint runs on this machine" if port is None else f"no endpoint runs here on port {port}"
    raise ConfigError(f"--port: {asked} (running: {ports}); start one with `embedloom serve`")


def ask(url: str, timeout_seconds: float, body: Any = None) -> Any:
    """The JSON that an endpoint answers to a GET, or to a POST of ``body``.

    Raises:
        ServeError: it refused, did not answer, or answered something else.
    """
    import httpx  # a tenth of a second that no other command needs

    method = "GET" if body is None else "POST"
    try:
        reply = httpx.request(method, url, json=body, timeout=timeout_seconds, follow_redirects=True)
        reply.raise_for_status()
        return reply.json()
    except httpx.HTTPStatusError as error:
        raise ServeError(
            f"{url} answered {error.response.status_code}: {error.response.text[:200]}"
        ) from error
    except httpx.HTTPError as error:
        raise ServeError(f"{url} did not answer: {error}") from error
    except ValueError as error:
        raise ServeError(f"{url} did not answer with JSON: {error}") from error


def _folder() -> Path:
    return cache_folder() / "endpoints"


def _all() -> list[Address]:
    """Endpoints whose command runs, or whose Ray is still there; files about others are deleted."""
    found = []
    for path in sorted(_folder().glob("*.json")):
        address = Address(**json.loads(path.read_text()))
        if address.runs or answers(address.ray_address):
            found.append(address)
        else:
            path.unlink(missing_ok=True)
    return found


def _runs(pid: int) -> bool:
    import psutil  # only where there is an endpoint to look at

    try:
        # A process that ended, and that nobody has asked how, still has its number.
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
