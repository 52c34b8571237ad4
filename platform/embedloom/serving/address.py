"""Where endpoints run that `embedloom serve` started on this machine, so that `embedloom deploy` finds them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedloom.core.contents import cache_folder
from embedloom.errors import ConfigError, ServeError


@dataclass(frozen=True, slots=True)
class Address:
    """One endpoint: where clients ask, where its Ray listens, and the process that keeps it up."""

    port: int
    url: str
    ray_address: str
    pid: int


def remember(port: int, url: str, ray_address: str) -> Path:
    """Write down an endpoint of this process; returns the file, which goes when the endpoint stops."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{port}.json"
    path.write_text(json.dumps(asdict(Address(port, url, ray_address, os.getpid()))) + "\n")
    return path


def find(port: int | None) -> Address:
    """The endpoint of a port; None: the only one.

    Raises:
        ConfigError: none, or several without a port.
    """
    found = [address for address in _all() if port in (None, address.port)]
    if len(found) == 1:
        return found[0]
    running = ", ".join(str(address.port) for address in _all()) or "none"
    if found:
        raise ConfigError(f"--port: several endpoints run on this machine; allowed: {running}")
    asked = "no endpoint runs on this machine" if port is None else f"no endpoint runs here on port {port}"
    raise ConfigError(f"--port: {asked} (running: {running}); start one with `embedloom serve`")


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
    found = []
    for path in sorted(_folder().glob("*.json")):
        address = Address(**json.loads(path.read_text()))
        if _runs(address.pid):
            found.append(address)
        else:
            path.unlink(missing_ok=True)
    return found


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
