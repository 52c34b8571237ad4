"""The HTTP side of the endpoint: OpenAI's routes over any backend that encodes. No Ray here."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from embedloom.config.base import FrozenConfig
from embedloom.serving.front import Front
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal
from embedloom.serving.metrics import CONTENT_TYPE, EndpointMetrics
from embedloom.serving.replies import (
    EmbeddingsResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    encode_vectors,
    reply_body,
    shorten,
)
from embedloom.serving.schemas import ApiError, EmbeddingsRequest, parse_request

RETRY_AFTER_SECONDS = 1
READY_TIMEOUT_SECONDS = 5.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 404, 413, 429, 500, 503, 504)
}


class EndpointSettings(FrozenConfig):
    """What the HTTP side needs to know."""

    served_name: str
    fingerprint: str
    created: int  # Unix seconds, as OpenAI's model list has it
    max_items: int
    max_requests: int  # computed and waiting together; one more is answered 429
    request_timeout_seconds: float


class Backend(Protocol):
    """Whatever turns jobs into vectors: an ``EncoderService`` here, or replicas elsewhere."""

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Vectors, or why not.

        Raises:
            ApiError: no replica (503).
        """
        ...

    async def describe(self) -> ModelInfo:
        """The loaded model; answers only when an encoder is up."""
        ...


class Routes:
    """The handlers of one endpoint."""

    def __init__(self, backend: Backend, settings: EndpointSettings, metrics: EndpointMetrics) -> None:
        self._backend = backend
        self._settings = settings
        self._metrics = metrics
        self._known: ModelInfo | None = None
        self._running = 0

    async def embeddings(self, http: Request) -> Response:
        """Embed texts or token ids (OpenAI-compatible, plus input_type, task, instruction and truncate)."""
        request = parse_request(await http.body())
        self._check(request)
        info = await self._info()
        self._check_dimensions(request, info)
        result = await self._admitted(_job(request))
        if isinstance(result, Refusal):
            raise ApiError(400, result.message, param="input", code=result.code)
        self._metrics.embedded(result, request.input_type)
        vectors = result.vectors
        if request.dimensions is not None:
            vectors = shorten(vectors, request.dimensions, info.normalize)
        body = reply_body(
            encode_vectors(vectors, request.encoding_format), self._settings.served_name, result.tokens
        )
        return _json(body, headers={"x-contract-hash": info.contract_hash})

    async def models(self) -> Response:
        """The served model, with the hash of its prompt contract and its fingerprint."""
        return _json({"object": "list", "data": [(await self._card()).model_dump()]})

    async def model(self, name: str) -> Response:
        """One model by name."""
        self._check_model(name)
        return _json((await self._card()).model_dump())

    async def health(self) -> Response:
        """Live: this process answers."""
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """Ready: an encoder answers."""
        try:
            info = await asyncio.wait_for(self._backend.describe(), READY_TIMEOUT_SECONDS)
        except Exception as error:  # whatever is wrong with the encoder, the answer is "not ready"
            raise ApiError(503, "no encoder replica answers yet", code="not_ready") from error
        return _json(
            {"status": "ready", "model": self._settings.served_name, "contract_hash": info.contract_hash}
        )

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    def _check(self, request: EmbeddingsRequest) -> None:
        self._check_model(request.model)
        if len(request.input) > self._settings.max_items:
            raise ApiError(
                400,
                f"input has {len(request.input)} items; allowed: at most {self._settings.max_items}",
                param="input",
            )

    def _check_model(self, name: str) -> None:
        if name != self._settings.served_name:
            raise ApiError(
                404,
                f"model: {name!r:.80} is not served here; allowed: {self._settings.served_name!r}",
                param="model",
                code="model_not_found",
            )

    @staticmethod
    def _check_dimensions(request: EmbeddingsRequest, info: ModelInfo) -> None:
        allowed = sorted({*info.matryoshka_dimensions, info.dimension})
        if request.dimensions is not None and request.dimensions not in allowed:
            trained = "" if info.matryoshka_dimensions else " (the model was not trained for shorter ones)"
            raise ApiError(
                400,
                f"dimensions: {request.dimensions} is not available; "
                f"allowed: {', '.join(map(str, allowed))}{trained}",
                param="dimensions",
            )

    async def _admitted(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Encode unless the endpoint is full.

        Counted here and not by Serve's queue limit, which counts a request as queued until a replica accepts
        it, so that a burst is refused while replicas idle, and whose refusals are not in OpenAI's shape.
        """
        if self._running >= self._settings.max_requests:
            raise ApiError(
                429,
                f"this endpoint is full with {self._running} requests running or waiting; try again shortly",
                code="overloaded",
                kind="rate_limit_error",
            )
        self._running += 1
        try:
            result: EncodeResult | Refusal = await self._within_time(self._backend.encode(job))
        finally:
            self._running -= 1
        return result

    async def _info(self) -> ModelInfo:
        if self._known is None:
            self._known = await self._within_time(self._backend.describe())
        return self._known

    async def _card(self) -> ModelCard:
        info = await self._info()
        return ModelCard(
            id=self._settings.served_name,
            created=self._settings.created,
            fingerprint=self._settings.fingerprint,
            contract_hash=info.contract_hash,
            dimension=info.dimension,
            matryoshka_dimensions=list(info.matryoshka_dimensions),
            max_query_tokens=info.max_query_tokens,
            max_document_tokens=info.max_document_tokens,
        )

    async def _within_time(self, answer: Any) -> Any:
        limit = self._settings.request_timeout_seconds
        try:
            return await asyncio.wait_for(answer, limit)
        except TimeoutError as error:
            raise ApiError(504, f"no answer within {limit:g} seconds", code="timeout") from error


def _job(request: EmbeddingsRequest) -> EncodeJob:
    texts: Any = None if request.is_token_ids else request.input
    ids: Any = request.input if request.is_token_ids else None
    return EncodeJob(
        side=request.input_type,
        texts=texts,
        token_ids=ids,
        task_type=request.task or "retrieval",
        instruction=request.instruction,
        truncate=request.truncate,
    )


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # pydantic's own writer: several times faster on long lists of numbers than the json module.
    return Response(to_json(content), status, headers, media_type="application/json")


def create_api(
    backend: Backend, settings: EndpointSettings, metrics: EndpointMetrics | None = None
) -> FastAPI:
    """The FastAPI application of one endpoint."""
    metrics = metrics or EndpointMetrics()
    routes = Routes(backend, settings, metrics)
    # No docs pages: they load scripts from elsewhere. /openapi.json describes the same.
    api = FastAPI(title="embedloom", docs_url=None, redoc_url=None, responses=_ERRORS)
    schema = EmbeddingsRequest.model_json_schema()
    table: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = [
        (
            "POST",
            "/v1/embeddings",
            routes.embeddings,
            {
                "response_model": EmbeddingsResponse,
                "openapi_extra": {
                    "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
                },
            },
        ),
        ("GET", "/v1/models", routes.models, {"response_model": ModelList}),
        ("GET", "/v1/models/{name}", routes.model, {"response_model": ModelCard}),
        ("GET", "/health", routes.health, {}),
        ("GET", "/ready", routes.ready, {}),
        ("GET", "/metrics", routes.metrics, {"response_class": Response}),
    ]
    for method, path, handler, options in table:
        api.add_api_route(path, handler, methods=[method], **options)
    api.add_exception_handler(ApiError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_http_error)
    api.add_middleware(Front, metrics=metrics, paths=frozenset(path for _, path, _, _ in table))
    return api


async def _answer_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if error.status in (429, 503) else None
    return _json(error.body(), error.status, headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    refusal = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return _json(refusal.body(), error.status_code, dict(error.headers or {}))
