"""What happens to every request around its route: id, key, body limit, metrics, log, and no stack trace outside."""

import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedloom.serving.keys import KeyRing, key_headers
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.refusals import ApiError
from embedloom.serving.request_log import Facts, RequestLog, facts_of, write_line

REQUEST_ID_HEADER = b"x-request-id"
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_MODEL_PATH = "/v1/models/{name}"

logger = logging.getLogger("embedloom.serving")


class BodyTooLarge(Exception):
    """The body grew past the limit while it was read."""


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """What the front needs to know of the endpoint."""

    paths: frozenset[str]  # that metrics name
    open_paths: frozenset[str]  # that need no key
    max_body_bytes: int
    request_log: RequestLog = "none"
    hosts: frozenset[bytes] = frozenset()  # names it answers to, without port; none: to any


class Front:
    """ASGI middleware; plain ASGI because Starlette's helper class copies every body through a queue."""

    def __init__(
        self, app: ASGIApp, metrics: EndpointMetrics, settings: FrontSettings, keys: KeyRing | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._settings = settings
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = _Exchange(headers.get(REQUEST_ID_HEADER), receive, send, self._settings.max_body_bytes)
        facts, started = facts_of(scope), time.perf_counter()
        self._metrics.ongoing.inc()
        try:
            self._check(scope, headers, facts)
            await self._app(scope, exchange.receive, exchange.send)
        except ApiError as error:
            await exchange.refuse(error)
        except BodyTooLarge:
            await exchange.refuse(self._too_large())
        except ClientDisconnect:
            pass  # nobody is left to answer; counted as 499
        except Exception:
            logger.exception("request %s failed", exchange.id.decode())
            await exchange.refuse(
                ApiError(500, f"internal error; quote request {exchange.id.decode()} when you report it")
            )
        finally:
            path, seconds = self._label(scope), time.perf_counter() - started
            self._metrics.ongoing.dec()
            self._metrics.answered(path, exchange.status, seconds)
            write_line(
                self._settings.request_log, facts, exchange.id.decode(), scope["method"], path, exchange.status,
                seconds,
            )  # fmt: skip

    def _check(self, scope: Scope, headers: dict[bytes, bytes], facts: Facts) -> None:
        """Refuse who has no key and what is too large, before a byte of the body is read."""
        if self._settings.hosts and _name(headers.get(b"host", b"")) not in self._settings.hosts:
            raise ApiError(
                403,
                "host: this endpoint answers only to names of this machine, lest a web page elsewhere points its own "
                "name here; give it API keys, or the name in serving.allowed_hosts",
                code="unknown_host",
            )
        if self._keys is not None and self._path(scope) not in self._settings.open_paths:
            facts.client = self._keys.identify(*key_headers(headers))
            facts.client.begin()
        declared = headers.get(b"content-length", b"0")
        # Python refuses to read a number of thousands of digits; one of twenty is too large already.
        if declared.isdigit() and int(declared[:20]) > self._settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._settings.max_body_bytes} bytes", code="body_too_large"
        )

    @staticmethod
    def _path(scope: Scope) -> str:
        """The path below the route prefix that the application is under."""
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return path or "/"

    def _label(self, scope: Scope) -> str:
        """The path as metric label; all unknown ones share a label, or a scanner could fill the memory."""
        path = self._path(scope)
        if path in self._settings.paths:
            return path
        return _MODEL_PATH if path.startswith("/v1/models/") else "other"


def _name(host: bytes) -> bytes:
    """The name in a Host header: no port, no brackets."""
    if host.startswith(b"["):
        return host[1:].partition(b"]")[0].lower()
    return host.partition(b":")[0].lower()


class _Exchange:
    """Counts the body coming in and stamps the reply going out."""

    def __init__(self, given_id: bytes | None, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self.id = given_id if given_id and _GIVEN_ID.fullmatch(given_id) else uuid.uuid4().hex.encode()
        # Serve's proxy gives every request an id and stamps the reply with it; a second stamp would double it.
        self._stamp = given_id is None
        self.status = 499  # the client left before an answer began
        self._received = 0
        self._max_body_bytes = max_body_bytes
        self._receive = receive
        self._send = send
        self._begun = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._max_body_bytes:
            raise BodyTooLarge
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self.status = int(message["status"])
            if self._stamp:
                message = {**message, "headers": [*message.get("headers", []), (REQUEST_ID_HEADER, self.id)]}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, unless an answer has begun."""
        if self._begun:
            return
        body = to_json(error.body())
        headers: list[Any] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode()) for name, value in error.headers.items()),
        ]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
