"""The listening socket of an endpoint on one machine: kept by the command, lent to the process that answers.

Serve's own way from a socket to a replica is a proxy process, or HAProxy and Serve's ASGI wrapper inside the replica. For a
short query they cost more than the model. Here the replica's event loop accepts connections itself, from a socket
that ``embedloom serve`` has opened (``ListenerOwner``) and hands over through a Unix socket (``ReplicaServer``). As the socket is the same
for an old and a new replica, a replacement loses no connection, and while there is no replica (start, crash) the command
answers 503 itself. No Ray here: Serve goes on starting, watching and replacing the replica.
"""

import asyncio
import contextlib
import errno
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedloom.errors import ConfigError
from embedloom.serving.listener import SERVE_RETRY_SECONDS, BoundedProtocol, send_error
from embedloom.serving.refusals import ApiError

_BACKLOG = 2048
_CLOSING_SECONDS = 2.0  # for which idle connections of a leaving replica may still ask, and are told to close
# As Serve's proxy has it: longer than load balancers and pools of clients keep an idle connection (60 s), so that they
# close it first and no request meets a closing one.
_KEEP_ALIVE_SECONDS = 90
_REQUEST_ID = b"x-request-id"


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address.

    Raises:
        ConfigError: it is in use, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"serving.port: {port} is in use on {host}; choose a free port, "
                f"e.g. --set serving.port={port + 1}"
            ) from error
        raise ConfigError(
            f"serving.host: cannot listen on {host!r}, port {port}: {error.strerror or error}"
        ) from error
    return found


class ListenerOwner:
    """The command's side: lends the socket, and answers 503 while nobody has it."""

    def __init__(self, host: str, port: int) -> None:
        """Open it.

        Raises:
            ConfigError: the address is in use, or not one of this machine.
        """
        self._listener = bound_socket(host, port)
        self._listener.listen(_BACKLOG)
        # A folder of its own, as nobody else may enter it.
        self._folder = tempfile.TemporaryDirectory(prefix="embedloom-")
        self.path = str(Path(self._folder.name) / "listener")
        self._handoff = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._handoff.bind(self.path)
        self._handoff.listen()
        self._lock = threading.Lock()
        self._replicas = 0
        self._unavailable_server: _UnavailableServer | None = _UnavailableServer(self._listener)
        self._closed = False
        threading.Thread(target=self._lend, daemon=True, name="listener-handoff").start()

    def close(self) -> None:
        """Listen no more; safe to call twice."""
        with self._lock:
            self._closed = True
            responder, self._unavailable_server = self._unavailable_server, None
        if responder is not None:
            responder.stop()
        # Wakes the thread that waits in accept, which closing alone would not.
        with contextlib.suppress(OSError):
            self._handoff.shutdown(socket.SHUT_RDWR)
        self._handoff.close()
        self._listener.close()
        self._folder.cleanup()

    def _lend(self) -> None:
        while True:
            try:
                replica, _ = self._handoff.accept()
            except OSError:
                return
            threading.Thread(
                target=self._lend_to, args=(replica,), daemon=True, name="listener-replica"
            ).start()

    def _lend_to(self, replica: socket.socket) -> None:
        """One replica, until it closes its connection or dies."""
        with replica, contextlib.suppress(OSError):
            # First, so that nobody is told 503 any more once the replica answers; till then connections wait.
            self._replicas_changed(1)
            try:
                socket.send_fds(replica, [b"+"], [self._listener.fileno()])
                replica.recv(1)
            finally:
                self._replicas_changed(-1)

    def _replicas_changed(self, change: int) -> None:
        with self._lock:
            self._replicas += change
            leaving = None
            if self._replicas:
                leaving, self._unavailable_server = self._unavailable_server, None
            elif self._unavailable_server is None and not self._closed:
                self._unavailable_server = _UnavailableServer(self._listener)
        if leaving is not None:
            leaving.stop()


class _UnavailableServer:
    """Answers 503 to everybody, in a thread of its own."""

    def __init__(self, listener: socket.socket) -> None:
        self._server = uvicorn.Server(_settings(_unavailable))
        # A copy: uvicorn closes what it was given.
        self._thread = threading.Thread(
            target=self._server.run, args=([listener.dup()],), daemon=True, name="listener-unavailable"
        )
        self._thread.start()

    def stop(self) -> None:
        """Take no more connections; who is connected gets an answer and is let go."""
        self._server.should_exit = True
        self._thread.join(timeout=5.0)


async def _unavailable(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    error = ApiError(
        503,
        "the endpoint is starting or stopping; try again shortly",
        code="unavailable",
        retry_after_seconds=SERVE_RETRY_SECONDS,
    )
    await send_error(_stamping(send, [(b"connection", b"close")]), scope, error)


class ReplicaServer:
    """The replica's side: answers on the borrowed socket, by the event loop that it is made in."""

    def __init__(self, app: ASGIApp, path: str, prefix: str) -> None:
        """Borrow the socket and begin to answer.

        Args:
            app: what answers.
            path: of the owner's Unix socket.
            prefix: of all routes, such as ``/`` or ``/embed``.

        Raises:
            OSError: no owner listens at that path.
        """
        self._mounted = _Mounted(app, prefix.rstrip("/"))
        self._owner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._owner.connect(path)
        _, descriptors, _, _ = socket.recv_fds(self._owner, 1, 1)
        self._server = uvicorn.Server(_settings(self._mounted))
        # Not `serve`, which takes over the process's signals.
        listener = socket.socket(fileno=descriptors[0])
        self._serving = asyncio.get_running_loop().create_task(self._server._serve([listener]))

    async def leave(self) -> None:
        """Take no more connections, answer what is asked on those there are, and tell them to close."""
        self._mounted.leaving = True
        for server in self._server.servers:
            server.close()
        self._owner.close()
        deadline = asyncio.get_running_loop().time() + _CLOSING_SECONDS
        while self._server.server_state.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self._server.should_exit = True
        await self._serving


class _Mounted:
    """The application below its prefix, with what Serve's proxy does to a reply: the client's own request id on it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.leaving = False
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._prefix and scope["type"] == "http":
            if not f"{scope['path']}/".startswith(f"{self._prefix}/"):
                error = ApiError(404, f"{scope['path']:.200}: not found; served here: {self._prefix}")
                await send_error(send, scope, error)
                return
            scope["root_path"] = self._prefix
        stamps = [(name, value) for name, value in scope["headers"] if name == _REQUEST_ID]
        if self.leaving:
            stamps.append((b"connection", b"close"))
        await self._app(scope, receive, _stamping(send, stamps) if stamps else send)


def _stamping(send: Send, stamps: list[tuple[bytes, bytes]]) -> Send:
    async def stamped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *stamps]}
        await send(message)

    return stamped


def _settings(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app, http=BoundedProtocol, ws="none", lifespan="off", log_config=None, log_level=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )  # fmt: skip
