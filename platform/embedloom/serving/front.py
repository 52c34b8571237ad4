"""What happens to every request around its route: id, key, body limit, metrics, log, and no stack trace outside."""

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedloom.serving.decoding import BodyDecoder, BodyTooLarge, codings_of
from embedloom.serving.keys import KeyRing, key_headers
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.refusals import ApiError
from embedloom.serving.request_log import Facts, RequestLog, facts_of, write_line

REQUEST_ID_HEADER = b"x-request-id"
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_MODEL_PATH = "/v1/models/{name}"

logger = logging.getLogger("embedloom.serving")


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """What the front needs to know of the endpoint."""

    paths: frozenset[str]  # that metrics name
    open_paths: frozenset[str]  # that need no key
    methods: dict[str, str]  # of each path, as an Allow header lists them
    max_body_bytes: int
    keyed_posts: frozenset[str] = frozenset()  # need one to be posted to, also where they are open to read
    request_log: RequestLog = "none"
    hosts: frozenset[bytes] = frozenset()  # names it answers to, without port; none: to any


# What a load balancer's check asks for: answered under whatever name it asks, and while the endpoint stops.
HEALTH_PATHS = frozenset({"/health", "/ready", "/metrics"})
_CANCEL_SECONDS = 1.0  # that a cancelled request may take to be told so
_STOPPING_RETRY_SECONDS = 5.0  # by then another endpoint stands behind the same address, or none


class Drain:
    """Lets the requests in hand end, and takes no more."""

    def __init__(self) -> None:
        self.begun = False
        self.is_over = False
        self._running: set[asyncio.Task[Any]] = set()

    def enter(self) -> asyncio.Task[Any] | None:
        """The current request is in hand."""
        task = asyncio.current_task()
        if task is not None:
            self._running.add(task)
        return task

    def leave(self, task: asyncio.Task[Any] | None) -> None:
        """The request is answered."""
        if task is not None:
            self._running.discard(task)

    async def run(self, seconds: float) -> int:
        """Wait until nothing is in hand; what is after so many seconds is cancelled. Returns how many were."""
        self.begun = True
        if not self._running:
            return 0
        _, late = await asyncio.wait(set(self._running), timeout=seconds)
        self.is_over = True
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_CANCEL_SECONDS)
        return len(late)


def _tell(request_id: str, error: Exception) -> None:
    """Have the command that serves show a failure of ours in a line; its traceback is in the log."""
    from embedloom.progress import note  # brings pyarrow, which a gateway's process does without

    note("serve", f"request {request_id} failed: {type(error).__name__}: {error}")


class Front:
    """ASGI middleware; plain ASGI because Starlette's helper class copies every body through a queue."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: EndpointMetrics,
        settings: FrontSettings,
        keys: KeyRing | None,
        drain: Drain | None = None,
    ) -> None:
        self._app = app
        self._drain = drain or Drain()
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
        task = self._drain.enter()
        try:
            exchange.codings = self._check(scope, headers, facts)
            if scope["method"] == "OPTIONS":
                await self._say_what_is_allowed(scope, exchange)
            else:
                await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            if not self._drain.is_over:
                raise
            if task is not None:
                task.uncancel()
            await exchange.refuse(_stopping("this endpoint stopped before it was done"))
        except ApiError as error:
            await exchange.refuse(error)
        except BodyTooLarge:
            await exchange.refuse(self._too_large())
        except ClientDisconnect:
            pass  # nobody is left to answer; counted as 499
        except Exception as error:
            logger.exception("request %s failed", exchange.id.decode())
            _tell(exchange.id.decode(), error)
            await exchange.refuse(
                ApiError(500, f"internal error; quote request {exchange.id.decode()} when you report it")
            )
        finally:
            self._drain.leave(task)
            path, seconds = self._label(scope), time.perf_counter() - started
            self._metrics.ongoing.dec()
            self._metrics.answered(path, exchange.status, seconds)
            write_line(
                self._settings.request_log, facts, exchange.id.decode(), scope["method"], path, exchange.status,
                seconds,
            )  # fmt: skip

    def _check(self, scope: Scope, headers: dict[bytes, bytes], facts: Facts) -> list[str]:
        """Refuse who has no key and what is too large, before a byte of the body is read; the body's codings."""
        path = self._path(scope)
        if self._drain.begun and (path not in HEALTH_PATHS or path == "/ready"):
            raise _stopping("this endpoint is stopping")
        host = headers.get(b"host")
        # A browser, the only one that can be tricked, always states a host; HTTP/1.0 need not.
        if (
            self._settings.hosts
            and host is not None
            and _name(host) not in self._settings.hosts
            and path not in HEALTH_PATHS
        ):
            raise ApiError(
                403,
                "host: this endpoint answers only to names of this machine, lest a web page elsewhere points its own "
                "name here; give it API keys, or the name in serving.allowed_hosts",
                code="unknown_host",
            )
        # OPTIONS asks what there is, and some load balancers ask it of "/" to see who is alive.
        if self._keys is not None and scope["method"] != "OPTIONS" and self._needs_key(scope["method"], path):
            facts.client = self._keys.identify(*key_headers(headers))
            facts.client.begin()
        declared = headers.get(b"content-length", b"0")
        # Python refuses to read a number of thousands of digits; one of twenty is too large already.
        if declared.isdigit() and int(declared[:20]) > self._settings.max_body_bytes:
            raise self._too_large()
        if b"content-encoding" not in headers:
            return []
        return codings_of(b",".join(value for name, value in scope["headers"] if name == b"content-encoding"))

    async def _say_what_is_allowed(self, scope: Scope, exchange: "_Exchange") -> None:
        """Answer OPTIONS of a path; with CORS switched on, a browser's preflight does not come this far."""
        path = self._path(scope)
        allowed = self._settings.methods.get(_MODEL_PATH if path.startswith("/v1/models/") else path)
        if path == "*":
            allowed = "GET, HEAD, POST, OPTIONS"
        if allowed is None:
            raise ApiError(404, f"OPTIONS {path:.200}: Not Found")
        await exchange.send(
            {"type": "http.response.start", "status": 204, "headers": [(b"allow", allowed.encode())]}
        )
        await exchange.send({"type": "http.response.body", "body": b""})

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._settings.max_body_bytes} bytes", code="body_too_large"
        )

    def _needs_key(self, method: str, path: str) -> bool:
        keyed = method == "POST" and path in self._settings.keyed_posts
        return keyed or path not in self._settings.open_paths

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


def _stopping(message: str) -> ApiError:
    return ApiError(
        503, f"{message}; try again", code="stopping", retry_after_seconds=_STOPPING_RETRY_SECONDS
    )


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
        self.codings: list[str] = []  # of the body
        self._decoder: BodyDecoder | None = None
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
        if self.codings and message["type"] == "http.request":
            self._decoder = self._decoder or BodyDecoder(self.codings, self._max_body_bytes)
            last = not message.get("more_body", False)
            return {**message, "body": self._decoder.decode(message.get("body", b""), last)}
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
