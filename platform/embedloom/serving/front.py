"""What happens to every request around its route: path, id, API key, body limit, metrics, log, and no stack trace outside."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import yaml
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedloom.config.base import FrozenConfig, validate
from embedloom.config.serving import ServingConfig
from embedloom.errors import ConfigError
from embedloom.serving.decoding import BodyDecoder, BodyTooLarge, codings_of
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.refusals import ApiError
from embedloom.serving.tracing import Trace, Tracing

# API keys: who asks, and how much they may ask for.
#
# Only hashes are kept. A plain SHA-256 is enough because keys are meant to be random (``openssl rand -hex 32``): there
# is no dictionary to try. ``printf %s "$KEY" | sha256sum`` gives the hash for the key document:
#
#     search-page: {sha256: 9f86…, requests_per_minute: 600, tokens_per_minute: 2000000}


_HASH = re.compile(r"[0-9a-f]{64}")
_BEARER = re.compile(rb"(?i:bearer)[ \t]+(\S+)[ \t]*")
_ALLOWED = "Authorization: Bearer KEY, or api-key: KEY"


class ApiKey(FrozenConfig):
    """One client: the hash of its key and its quotas."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


def read_keys(config: ServingConfig) -> tuple[ApiKey, ...]:
    """The keys that a serving section points to; none where it points nowhere.

    Raises:
        ConfigError: file or variable missing, empty or malformed; no message repeats what might be a key.
    """
    if config.keys_file is not None:
        path = Path(config.keys_file).expanduser()
        if not path.is_file():
            raise ConfigError(f"serving.keys_file: {path}: no such file")
        return parse_keys(path.read_text(), str(path))
    if config.keys_variable is not None:
        text = os.environ.get(config.keys_variable)
        if text is None:
            raise ConfigError(f"serving.keys_variable: {config.keys_variable} is not in the environment")
        return parse_keys(text, f"${config.keys_variable}")
    return ()


def parse_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """Read a key document.

    Raises:
        ConfigError: see ``read_keys``.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not readable as YAML") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{source}: holds no keys; expected name: {{sha256: ...}}")
    keys = []
    for name, values in content.items():
        if isinstance(values, dict) and "sha256" not in values:  # perhaps misspelt, which the model says best
            validate(ApiKey, {"name": str(name), **values}, f"{source}: {name}")
        if not isinstance(values, dict) or not _HASH.fullmatch(str(values.get("sha256", ""))):
            raise ConfigError(
                f"{source}: {name}: sha256 is missing or is not 64 lower-case hex digits (the hash of the key)"
            )
        keys.append(validate(ApiKey, {"name": str(name), **values}, f"{source}: {name}"))
    if len({key.sha256 for key in keys}) != len(keys):
        raise ConfigError(f"{source}: two names have the same key")
    return tuple(keys)


class Quota:
    """So many a minute, a minute's worth at once; what is taken beyond it is made up for before more is given."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._most = float(per_minute)
        self._clock = clock
        self._left = self._most
        self._seen = clock()

    def seconds_until(self, amount: float) -> float:
        """How long until so much is left; 0 when it is."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._most / 60)
        self._seen = now
        return max(0.0, (amount - self._left) * 60 / self._most)

    def take(self, amount: float) -> None:
        """Use some up."""
        self._left -= amount


class Client:
    """A known client and what is left of its quotas."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self.name = key.name
        self.digest = key.sha256
        self._requests = Quota(key.requests_per_minute, clock) if key.requests_per_minute else None
        self._tokens = Quota(key.tokens_per_minute, clock) if key.tokens_per_minute else None
        self._used = (0, 0)  # requests and tokens that ``collect`` has not told yet

    @property
    def is_limited(self) -> bool:
        """Whether it has a quota."""
        return self._requests is not None or self._tokens is not None

    def begin(self) -> None:
        """Count one request.

        Raises:
            ApiError: 429, a quota is used up; Retry-After says until when.
        """
        # Tokens are known only afterwards, so the last request of a minute may overdraw; the next one waits for it.
        for quota, amount, unit in ((self._requests, 1.0, "requests"), (self._tokens, 1.0, "tokens")):
            if quota is not None and (seconds := quota.seconds_until(amount)) > 0:
                raise ApiError(
                    429,
                    f"the {unit} per minute of this key are used up; try again in {seconds:.0f} s",
                    code="rate_limit_exceeded",
                    retry_after_seconds=seconds,
                )
        if self._requests is not None:
            self._requests.take(1)
            self._used = self._used[0] + 1, self._used[1]

    def charge(self, tokens: int) -> None:
        """Count tokens that were computed."""
        if self._tokens is not None:
            self._tokens.take(tokens)
            self._used = self._used[0], self._used[1] + tokens

    def collect(self) -> tuple[int, int]:
        """Requests and tokens counted here since this was last asked, of the quotas that there are."""
        used, self._used = self._used, (0, 0)
        return used

    def take_elsewhere(self, requests: int, tokens: int) -> None:
        """Count what another gateway let through."""
        for quota, amount in ((self._requests, requests), (self._tokens, tokens)):
            if quota is not None:
                quota.take(amount)


class KeyRing:
    """All clients of an endpoint."""

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._clients = [Client(key, clock) for key in keys]

    @property
    def has_quotas(self) -> bool:
        """Whether any client is limited."""
        return any(client.is_limited for client in self._clients)

    def collect(self) -> dict[str, tuple[int, int]]:
        """By name of the key, see ``Client.collect``; only those that used anything."""
        found = {client.name: client.collect() for client in self._clients}
        return {name: used for name, used in found.items() if any(used)}

    def take_elsewhere(self, usage: Mapping[str, tuple[int, int]]) -> None:
        """See ``Client.take_elsewhere``; keys that are not known here are another version's."""
        for client in self._clients:
            client.take_elsewhere(*usage.get(client.name, (0, 0)))

    def identify(self, authorization: bytes | None, api_key: bytes | None = None) -> Client:
        """The client whose key stands in an Authorization header, or in Azure's.

        Every hash is compared, each in constant time, so that how long it takes tells nothing. Where both headers are
        there, either may hold the key: gateways put credentials of their own into Authorization.

        Raises:
            ApiError: 401, no key or an unknown one.
        """
        if authorization is None and api_key is None:
            raise ApiError(401, f"no API key; send the header {_ALLOWED}", code="missing_api_key")
        given = _BEARER.fullmatch(authorization or b"")
        secrets = [given.group(1) if given else b""] + ([api_key.strip()] if api_key is not None else [])
        found: Client | None = None
        for secret in secrets:
            digest = hashlib.sha256(secret).hexdigest()
            for client in self._clients:
                if hmac.compare_digest(client.digest, digest) and secret:
                    found = client
        if found is None:
            raise ApiError(401, f"the API key is not known here; allowed: {_ALLOWED}", code="invalid_api_key")
        return found


def key_headers(headers: Mapping[bytes, bytes]) -> tuple[bytes | None, bytes | None]:
    """The headers that may hold a key: Authorization, and Azure's ``api-key`` or its other spelling."""
    return headers.get(b"authorization"), headers.get(b"api-key") or headers.get(b"x-api-key")


# One JSON line a request, on stderr: what was asked and what it cost, and its texts only where that is wanted.


RequestLog = Literal["none", "facts", "texts"]
SCOPE_KEY = "embedloom.facts"
request_logger = logging.getLogger("embedloom.serving.requests")
_TEXT_CHARACTERS = 1000  # of one logged text
_FLUSH_SECONDS = 0.1


@dataclass(slots=True)
class Facts:
    """What handlers learn about a request; the front writes it down when the request is over."""

    client: Any = None  # keys.Client, where keys are wanted
    values: dict[str, Any] = field(default_factory=dict)
    trace: Trace | None = None  # where it is traced
    texts: list[str] | None = None


def facts_of(scope: Any) -> Facts:
    """The facts of the request being handled."""
    facts: Facts = scope.setdefault(SCOPE_KEY, Facts())
    return facts


def write_line(
    mode: RequestLog, facts: Facts, request_id: str, method: str, path: str, status: int, seconds: float
) -> None:
    """Log one request that is over."""
    if mode == "none":
        return
    line: dict[str, Any] = {
        "time": round(time.time(), 3),
        "request_id": request_id,
        "method": method,
        "path": path,
        "status": status,
        "seconds": round(seconds, 6),
    }
    if facts.client is not None:
        line["key"] = facts.client.name
    line |= facts.values
    if mode == "texts" and facts.texts is not None:
        line["texts"] = [text[:_TEXT_CHARACTERS] for text in facts.texts]
    request_logger.info("%s", to_json(line).decode())


class LineBuffer(logging.Handler):
    """Writes the lines of a tenth of a second at once; a process that is killed loses those.

    Every write gives up Python's lock, and the event loop then waits for the computing threads to get it back: a line at
    a time, that was a third of what the loop did under load, and 5 to 8 % of the requests. (``MemoryHandler`` of logging
    hands its records on one by one.)
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line; the first one sees to it that all are written."""
        self._lines.append(self.format(record))
        if len(self._lines) > 1:
            return
        try:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)
        except RuntimeError:  # no event loop, so nothing that a write holds up
            self.flush()

    def flush(self) -> None:
        """Write what is kept; ``logging`` does so too when the process ends."""
        with self.lock or contextlib.nullcontext():
            lines, self._lines = self._lines, []
            if lines:
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._stream.flush()


def log_to_stderr() -> None:
    """Write the lines to this process's stderr, which Ray keeps beside a replica's other output."""
    if not request_logger.handlers:
        handler = LineBuffer(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        request_logger.addHandler(handler)
    request_logger.setLevel(logging.INFO)
    request_logger.propagate = False


# Paths as clients really write them: what is meant beyond doubt is answered, for the rest a hint says what there is.


_SLASHES = re.compile("/{2,}")


class TidyPaths:
    """ASGI middleware: ``/v1//embeddings/`` is ``/v1/embeddings``, as a base URL with a slash at its end makes it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on one connection event."""
        if scope["type"] == "http":
            path: str = scope["path"]
            prefix = scope.get("root_path", "")
            if "//" in path or (path.endswith("/") and path.removeprefix(prefix) != "/"):
                tidy = _SLASHES.sub("/", path)
                tidy = tidy.rstrip("/") if tidy.removeprefix(prefix) != "/" else tidy
                scope = {**scope, "path": tidy, "raw_path": tidy.encode()}
        await self._app(scope, receive, send)


def hint(path: str, known: Iterable[str]) -> str:
    """What is said of a path that is not there: the one that its end names, where there is one.

    >>> hint("/v1/v1/embeddings", ["/v1/embeddings"])
    '; did you mean /v1/embeddings? A base URL ends with /v1 once'
    """
    last = path.rstrip("/").rsplit("/", 1)[-1]
    # The longest, so that /v1/rerank and not /rerank answers to /api/v1/rerank.
    ends = sorted((one for one in known if one != "/" and path.endswith(one)), key=len)
    named = ends[-1:] or sorted(one for one in known if last and one.rsplit("/", 1)[-1] == last)[-1:]
    if not named:
        return ""
    doubled = " A base URL ends with /v1 once" if "/v1/v1" in path else ""
    return f"; did you mean {named[0]}?{doubled}"


REQUEST_ID_HEADER = b"x-request-id"
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

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
    templates: tuple[tuple[str, re.Pattern[str]], ...] = ()  # paths with names in them, and what matches each
    body_limits: Mapping[str, int] = field(default_factory=dict)  # of paths that take larger ones, in bytes


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
    from embedloom.core.progress import note  # brings pyarrow, which a gateway's process does without

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
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._tracing = tracing
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
        most = self._body_limit(scope)
        exchange = _Exchange(headers.get(REQUEST_ID_HEADER), receive, send, most)
        facts, started = facts_of(scope), time.perf_counter()
        if self._tracing is not None and self._path(scope) not in HEALTH_PATHS:
            facts.trace = self._tracing.begin(headers, scope["method"])
        self._metrics.ongoing.inc()
        task = self._drain.enter()
        try:
            exchange.codings = self._check(scope, headers, facts, most)
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
            await exchange.refuse(_too_large(most))
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
            if self._tracing is not None and facts.trace is not None:
                request_id = exchange.id.decode()
                self._tracing.end(
                    facts.trace, scope["method"], path, exchange.status, request_id, facts.values
                )
                facts.values["trace_id"] = facts.trace.id
            write_line(
                self._settings.request_log, facts, exchange.id.decode(), scope["method"], path, exchange.status,
                seconds,
            )  # fmt: skip

    def _check(self, scope: Scope, headers: dict[bytes, bytes], facts: Facts, most: int) -> list[str]:
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
        if declared.isdigit() and int(declared[:20]) > most:
            raise _too_large(most)
        if b"content-encoding" not in headers:
            return []
        return codings_of(b",".join(value for name, value in scope["headers"] if name == b"content-encoding"))

    async def _say_what_is_allowed(self, scope: Scope, exchange: "_Exchange") -> None:
        """Answer OPTIONS of a path; with CORS switched on, a browser's preflight does not come this far."""
        path = self._path(scope)
        allowed = self._settings.methods.get(self._label(scope))
        if path == "*":
            allowed = "GET, HEAD, POST, OPTIONS"
        if allowed is None:
            raise ApiError(404, f"OPTIONS {path:.200}: Not Found")
        await exchange.send(
            {"type": "http.response.start", "status": 204, "headers": [(b"allow", allowed.encode())]}
        )
        await exchange.send({"type": "http.response.body", "body": b""})

    def _body_limit(self, scope: Scope) -> int:
        limits = self._settings.body_limits
        return (
            limits.get(self._path(scope), self._settings.max_body_bytes)
            if limits
            else self._settings.max_body_bytes
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
        return next((name for name, pattern in self._settings.templates if pattern.fullmatch(path)), "other")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")


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
