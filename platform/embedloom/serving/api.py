"""The HTTP side of the endpoint: its routes over any backend that encodes. No Ray here."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from embedloom.serving.calls import CONTRACT_HEADER, TRUNCATED_HEADER, Backend, Calls, EndpointSettings
from embedloom.serving.cohere import CohereEmbedRequest, CohereEmbedResponse, CohereRoutes
from embedloom.serving.front import Drain, Front, FrontSettings
from embedloom.serving.keys import KeyRing
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.openapi import Route, openapi_document
from embedloom.serving.paths import TidyPaths, hint
from embedloom.serving.rank_routes import Corpus, RankRoutes
from embedloom.serving.refusals import ApiError
from embedloom.serving.replies import (
    EmbeddingsResponse,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    RerankResponse,
    SearchResponse,
    SimilarityResponse,
    TokenizeResponse,
)
from embedloom.serving.routes import Routes, json_reply
from embedloom.serving.schemas import (
    EmbeddingsRequest,
    RerankRequest,
    SearchRequest,
    SimilarityRequest,
    TokenizeRequest,
)
from embedloom.serving.tei import (
    NOT_OFFERED,
    TeiEmbeddings,
    TeiEmbedRequest,
    TeiInfo,
    TeiRanking,
    TeiRerankRequest,
    TeiRoutes,
    TeiSimilarities,
    TeiSimilarityRequest,
    TeiTokenizeRequest,
    TeiTokens,
)


def create_api(
    backend: Backend,
    settings: EndpointSettings,
    metrics: EndpointMetrics | None = None,
    corpus: Corpus | None = None,
    drain: Drain | None = None,
) -> FastAPI:
    """The FastAPI application of one endpoint.

    Args:
        backend: what encodes.
        settings: names and limits.
        metrics: where requests are counted; None: its own.
        corpus: documents that ``/v1/search`` searches; None: no such route.
        drain: by which the endpoint is stopped.
    """
    metrics = metrics or EndpointMetrics()
    routes = _routes(Calls(backend, settings, metrics), corpus)
    # FastAPI's own document and pages are off: the pages load scripts from elsewhere, openapi.py says why.
    api = FastAPI(title="embedloom", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for given, route in [(path, one) for one in routes for path in one.paths]:
        # A served name may hold a slash, as names of Hugging Face do.
        path = given.replace("{name}", "{name:path}")
        # Starlette's route, not FastAPI's: handlers take the request as it is, so there is nothing to inject.
        api.add_route(path, route.handler, methods=[route.method])
    document = openapi_document(routes, settings, keyed=bool(settings.keys))

    async def openapi(http: Request) -> Response:
        return json_reply({**document, "servers": [{"url": http.scope.get("root_path") or "/"}]})

    api.add_route("/openapi.json", openapi, methods=["GET"])
    api.add_exception_handler(ApiError, _answer_error)
    api.add_exception_handler(HTTPException, _http_errors([path for route in routes for path in route.paths]))
    front = _front_settings(routes, settings)
    keys = KeyRing(settings.keys) if settings.keys else None
    api.add_middleware(Front, metrics=metrics, settings=front, keys=keys, drain=drain)
    api.add_middleware(TidyPaths)
    if settings.allowed_origins:
        # Outside the front: a browser asks for leave (OPTIONS) without the key, and must be able to read refusals.
        api.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            # Whatever an allowed page asks for: SDKs send headers of their own (x-stainless-os, openai-project, api-key),
            # other ones with every version, and none of them does anything here that a key would not be asked for.
            allow_headers=["*"],
            expose_headers=["retry-after", "x-request-id", CONTRACT_HEADER, TRUNCATED_HEADER],
        )
    return api


def _front_settings(routes: Sequence[Route], settings: EndpointSettings) -> FrontSettings:
    return FrontSettings(
        paths=frozenset({"/openapi.json", *(path for route in routes for path in route.paths)}),
        open_paths=frozenset(path for route in routes if not route.needs_key for path in route.paths),
        keyed_posts=frozenset(
            path for route in routes if route.needs_key and route.method == "POST" for path in route.paths
        ),
        methods=_methods(routes),
        max_body_bytes=settings.max_body_bytes,
        request_log=settings.request_log,
        hosts=frozenset(name.encode().lower() for name in settings.hosts),
    )


def _methods(routes: Sequence[Route]) -> dict[str, str]:
    """What an Allow header says of each path."""
    found = {"/openapi.json": {"GET"}}
    for route in routes:
        for path in route.paths:
            found.setdefault(path, set()).add(route.method)
    return {
        path: ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))
        for path, methods in found.items()
    }


def _routes(calls: Calls, corpus: Corpus | None) -> Sequence[Route]:
    plain = Routes(calls, corpus.card if corpus is not None else None)
    rank, cohere = RankRoutes(calls, corpus), CohereRoutes(calls)
    tei = TeiRoutes(calls, plain, rank, cohere)
    reranks = (RerankResponse, TeiRanking), (RerankRequest, TeiRerankRequest)
    tokens = (TokenizeResponse, TeiTokens), (TokenizeRequest, TeiTokenizeRequest)
    roots = (TeiEmbeddings, CohereEmbedResponse), (TeiEmbedRequest, CohereEmbedRequest)
    embeddings = EmbeddingsResponse, EmbeddingsRequest
    routes = [
        Route("POST", "/v1/embeddings", plain.embeddings, *embeddings, also=("/embeddings",)),
        Route("POST", "/v1/rerank", rank.rerank, RerankResponse, RerankRequest, also=("/v2/rerank",)),
        Route("POST", "/v1/similarity", rank.similarity, SimilarityResponse, SimilarityRequest),
        Route("POST", "/tokenize", tei.tokenize_either, *tokens),
        Route("GET", "/v1/models", plain.models, ModelList, also=("/models",)),
        Route("GET", "/v1/models/{name}", plain.model, ModelCard),
        Route(
            "POST",
            "/v1/embed",
            cohere.cohere_embed,
            CohereEmbedResponse,
            CohereEmbedRequest,
            also=("/v2/embed",),
        ),
        Route("POST", "/embed", tei.tei_embed, TeiEmbeddings, TeiEmbedRequest),
        Route("POST", "/rerank", tei.rerank_at_root, *reranks),
        Route("POST", "/similarity", tei.tei_similarity, TeiSimilarities, TeiSimilarityRequest),
        Route("POST", "/", tei.embed_at_root, *roots, also=("/v1",)),
        Route("GET", "/info", tei.info, TeiInfo),
        Route("GET", "/", plain.page, "text/html", needs_key=False),
        Route("GET", "/health", plain.health, Health, needs_key=False),
        Route("GET", "/ready", plain.ready, Readiness, needs_key=False),
        Route("GET", "/metrics", plain.metrics, "text/plain"),
    ]
    if corpus is not None:
        routes.insert(3, Route("POST", "/v1/search", rank.search, SearchResponse, SearchRequest))
    return routes


async def _answer_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return json_reply(error.body(), error.status, error.headers)


def _http_errors(known: Sequence[str]) -> Callable[[Request, Exception], Response]:
    """What answers a path or a method that is not there; ``known`` are the paths that are."""

    def answer(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        path = request.url.path
        meant = hint(path, known) if error.status_code == 404 else ""
        for ending, reason in NOT_OFFERED.items():
            if path.endswith(ending):
                meant = f"; {reason}"
        refusal = ApiError(error.status_code, f"{request.method} {path:.200}: {error.detail}{meant}")
        headers: dict[str, Any] = dict(error.headers or {})
        return json_reply(refusal.body(), error.status_code, refusal.headers | headers)

    return answer
