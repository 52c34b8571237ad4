"""The listening side of HTTP: what a connection may cost before it is a request, and what is said where nobody answers.

``BoundedProtocol`` is uvicorn's own protocol with bounds. ``ServeAnswers`` stands in Serve's proxy, whose texts it puts as
the endpoint puts its refusals. Serve calls ``proxy_middlewares`` in each process of its own that listens
(``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``; cluster/environment.py sets it). No Ray here.
"""

import asyncio
import json
import os
import socket
from collections import Counter
from typing import Any, ClassVar

import uvicorn.config
from pydantic_core import to_json
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from embedloom.config.base import validate
from embedloom.config.resources import LISTENER_VARIABLE, ListenerConfig
from embedloom.serving.refusals import ApiError

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
