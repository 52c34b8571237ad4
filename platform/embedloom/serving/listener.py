"""The listening side of HTTP: bounds of a connection, what is answered where nobody serves, and the socket that the command
lends to the process that answers. No Ray here.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
import uvicorn.config
from pydantic_core import to_json
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from embedloom.config.base import validate
from embedloom.config.cluster import LISTENER_VARIABLE, ListenerConfig
from embedloom.errors import ConfigError
from embedloom.serving.refusals import ApiError

# The listening side of HTTP: what a connection may cost before it is a request, and what is said where nobody answers.
#
# ``BoundedProtocol`` is uvicorn's own protocol with bounds. ``ServeAnswers`` stands in Serve's proxy, whose texts it puts as
# the endpoint puts its refusals. Serve calls ``proxy_middlewares`` in each process of its own that listens
# (``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``; cluster/environment.py sets it). No Ray here.


_STATUS_START = b"HTTP/1.1 "  # of every reply, whatever becomes of it
_PROBE_SECONDS = 0.25
_FRAMING_BYTES = 16  # a byte of a chunked body may be sent with so many around it
SERVE_RETRY_SECONDS = 2.0  # a single replica that died is back in a few seconds, or half a minute


def limits_of_environment() -> ListenerConfig:
    """The bounds this node was started with.

    Raises:
        ConfigError: the variable holds something else.
    """
    return validate(ListenerConfig, json.loads(os.environ.get(LISTENER_VARIABLE, "{}")), LISTENER_VARIABLE)


class BoundedProtocol(HttpToolsProtocol):
    """One connection: its headers are bounded in size, number and time, and one client in connections.

    A client that closes its sending side after a request still gets the reply; one that is gone is noticed.
    """

    limits: ClassVar[ListenerConfig] = limits_of_environment()
    open_by_client: ClassVar[Counter[str]] = Counter()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and begin to wait for the first request's headers."""
        super().connection_made(transport)
        self._in_head = True
        self._head_bytes = 0
        self._framing_bytes = 0  # of a body, and trailers behind it
        self._discards = False
        self._half_closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._client_name = self.client[0] if self.client else ""
        self.open_by_client[self._client_name] += 1
        most = self.limits.max_client_connections
        if most is not None and self.open_by_client[self._client_name] > most:
            self._refuse(
                ApiError(
                    429, f"this client has {most} connections open; allowed: no more", code="connections"
                )
            )
            return
        self._set_timer(self.limits.header_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._cancel_timer()
        self.open_by_client[self._client_name] -= 1
        if not self.open_by_client[self._client_name]:
            del self.open_by_client[self._client_name]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and stop as soon as a bound is passed; no more than one read is held beyond it."""
        if self._discards:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._timer is None:
                self._set_timer(self.limits.header_seconds, self._head_is_late)
        else:
            self._framing_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self.limits.max_header_bytes:
            self._refuse_head()
        elif self._framing_bytes > self.limits.max_header_bytes:
            self._refuse(ApiError(431, "the trailers are too large", code="headers_too_large"))

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one trailer; those beyond the number are not kept."""
        if len(self.headers) > self.limits.max_headers:
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, unless its headers pass a bound."""
        self._in_head = False
        self._framing_bytes = 0
        self._cancel_timer()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if len(self.headers) > self.limits.max_headers or size > self.limits.max_header_bytes:
            self._refuse_head()
        if not self._discards:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._framing_bytes = max(0, self._framing_bytes - (1 + _FRAMING_BYTES) * len(body))
        if not self._discards:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete; what follows is the next one's headers."""
        self._in_head, self._head_bytes, self._framing_bytes = True, 0, 0
        if not self._discards:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser takes for no HTTP."""
        self._refuse(ApiError(400, f"not an HTTP request: {msg}", code="invalid_http"))

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends no more: it waits for its reply, or has left; returns whether the connection stays open.

        Both look alike until something is sent to it: a client that is gone answers with a reset. So the start of the
        status line, which is known, is sent now, and the rest when there is a reply.
        """
        if self._discards or not self._is_owed_a_reply() or self.scheme == "https":
            return None
        self._half_closed = True
        self.cycle.keep_alive = False
        if not self.pipeline and not self.cycle.response_started:
            self.transport.write(_STATUS_START)
            self.cycle.transport = _Begun(self.transport)  # type: ignore[assignment]
        self._probe()
        return True

    def _is_owed_a_reply(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _probe(self) -> None:
        """Drop a half-closed connection whose client turned out to be gone."""
        if self.transport.is_closing():
            return
        connection: socket.socket = self.transport.get_extra_info("socket")
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        self._set_timer(_PROBE_SECONDS, self._probe)

    def _head_is_late(self) -> None:
        self._timer = None
        if not self._head_bytes:  # nothing was asked
            self.transport.close()
            return
        seconds = self.limits.header_seconds
        self._refuse(ApiError(408, f"the headers did not arrive within {seconds:g} seconds", code="timeout"))

    def _refuse_head(self) -> None:
        limits = self.limits
        if len(self.url) > limits.max_header_bytes:
            error = ApiError(
                414, f"the URL is longer than {limits.max_header_bytes} bytes", code="url_too_long"
            )
        else:
            error = ApiError(
                431,
                f"the headers are too large; allowed: {limits.max_headers}, of {limits.max_header_bytes} bytes together",
                code="headers_too_large",
            )
        self._refuse(error)

    def _refuse(self, error: ApiError) -> None:
        """Answer and close; what still comes is read and thrown away for a while, lest a reset takes the answer along."""
        if self._discards:
            return
        self._discards = True
        self._unset_keepalive_if_required()
        self._set_timer(self.limits.header_seconds, self.transport.abort)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # an earlier request is being answered; this one closes with it
            return
        self.transport.write(_reply(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _set_timer(self, seconds: float, call: Any) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, call)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Begun:
    """A transport to which the start of the status line was written already."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._begun = True

    def write(self, data: bytes) -> None:
        self._transport.write(data[len(_STATUS_START) :] if self._begun else data)
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _reply(error: ApiError) -> bytes:
    body = to_json(error.body())
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[error.status] + lines.encode() + b"\r\n" + body


class ServeAnswers:
    """ASGI middleware of Serve's proxy: what Serve itself says in plain text, as JSON of the endpoint's shape.

    A path without an application is 503 while there is no application at all (the endpoint starts, or stops), 404
    beside others. A replica that died with the request is 503 too: embedding changes nothing, so it may be asked again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event; Serve's own routes below ``/-/`` are left alone."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        reply = _Reply(send)
        await self._app(scope, receive, reply.send)
        # None: Serve leaves it to uvicorn to say 500, of a replica that died.
        if reply.status is None or reply.said_by_serve:
            await send_error(send, scope, await self._error(scope, reply.status))

    async def _error(self, scope: Scope, status: int | None) -> ApiError:
        if status == 404:
            if routes := await self._routes(scope):
                return ApiError(
                    404, f"{scope['path']:.200}: not found; served here: {', '.join(sorted(routes))}"
                )
            return ApiError(
                503,
                "the endpoint is starting or stopping; try again shortly",
                code="unavailable",
                retry_after_seconds=SERVE_RETRY_SECONDS,
            )
        if status in (408, 429, 503):
            return ApiError(status, "this endpoint is busy or being restarted; try again", code="unavailable")
        return ApiError(
            503,
            "the process that had this request ended before it answered; try again",
            code="unavailable",
            retry_after_seconds=SERVE_RETRY_SECONDS,
        )

    async def _routes(self, scope: Scope) -> dict[str, str]:
        """Applications by route prefix, as Serve lists them; none while it knows of none."""
        body = bytearray()
        status = 0

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            body.extend(message.get("body", b""))

        asked = {**scope, "method": "GET", "path": "/-/routes", "raw_path": b"/-/routes", "headers": []}
        await self._app(asked, receive, send)
        found: dict[str, str] = json.loads(body) if status == 200 else {}
        return found


class _Reply:
    """Hands a reply on, but for one that Serve itself wrote: an error in plain text."""

    def __init__(self, send: Send) -> None:
        self.status: int | None = None
        self.said_by_serve = False
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            # All refusals of the endpoint are JSON.
            self.said_by_serve = message["status"] >= 400 and kind.startswith(b"text/plain")
            self.status = message["status"]
        if not self.said_by_serve:
            await self._send(message)


async def send_error(send: Send, scope: Scope, error: ApiError) -> None:
    """Answer a request, none of which was handled, with an error in the endpoint's shape."""
    body = to_json(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    given = dict(scope["headers"]).get(b"x-request-id")
    stamped = [(b"x-request-id", given)] if given else []
    start = [*((name.encode(), value.encode()) for name, value in headers.items()), *stamped]
    await send({"type": "http.response.start", "status": error.status, "headers": start})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def proxy_middlewares() -> list[Middleware]:
    """What Serve puts around the application in this process; also makes its uvicorn use ``BoundedProtocol``.

    Serve has no setting for uvicorn's protocol, so the entry that it looks up is replaced.
    """
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        # Then every client comes through HAProxy, and is one to a replica.
        BoundedProtocol.limits = BoundedProtocol.limits.model_copy(update={"max_client_connections": None})
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    return [Middleware(ServeAnswers)]


# The listening socket of an endpoint on one machine: kept by the command, lent to the process that answers.
#
# Serve's own way from a socket to a replica is a proxy process, or HAProxy and Serve's ASGI wrapper inside the replica. For a
# short query they cost more than the model. Here the replica's event loop accepts connections itself, from a socket
# that ``embedloom serve`` has opened (``ListenerOwner``) and hands over through a Unix socket (``ReplicaServer``). As the socket is the same
# for an old and a new replica, a replacement loses no connection, and while there is no replica (start, crash) the command
# answers 503 itself. No Ray here: Serve goes on starting, watching and replacing the replica.


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
    # The backlog is the socket's, which all gateways share: whoever listens with a smaller one has the kernel drop connections.
    return uvicorn.Config(
        app, http=BoundedProtocol, ws="none", lifespan="off", log_config=None, log_level=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS, backlog=_BACKLOG,
    )  # fmt: skip
