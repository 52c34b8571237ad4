"""The HTTP side of the endpoint: its routes over any backend that encodes, and their OpenAPI document. No Ray here."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from embedloom import __version__
from embedloom.config.serving import ModelAlias
from embedloom.serving.batches.objects import (
    BatchList,
    BatchObject,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
)
from embedloom.serving.batches.routes import (
    FORM_BYTES,
    BatchDesk,
    BatchQuery,
    BatchRoutes,
    FileQuery,
    upload_form,
)
from embedloom.serving.calls import CONTRACT_HEADER, TRUNCATED_HEADER, Backend, Calls, EndpointSettings
from embedloom.serving.dialects import (
    NOT_OFFERED,
    CohereEmbedRequest,
    CohereEmbedResponse,
    CohereRoutes,
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
from embedloom.serving.front import Drain, Front, FrontSettings, KeyRing, TidyPaths, hint
from embedloom.serving.members import Member, MemberRoutes, Members
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.refusals import ApiError
from embedloom.serving.routes import RankRoutes, Routes, json_reply
from embedloom.serving.schemas import (
    HASH_PATTERN,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    RerankRequest,
    RerankResponse,
    SearchRequest,
    SearchResponse,
    SimilarityRequest,
    SimilarityResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from embedloom.serving.searching import Corpus, InThreads, Lookup
from embedloom.serving.tracing import Tracing

# The OpenAPI document, made from the same types that read requests and from the endpoint's own limits.
#
# Written here and not by FastAPI, which knows bodies only as arguments of handlers: ours are read after their size,
# content type and sender were checked, and their limits are this endpoint's.


_REASONS = {
    400: "The request is not valid; param names the field.",
    401: "No API key, or an unknown one.",
    403: "Asked by a name that is not this machine's.",
    404: "No such model, file or batch.",
    408: "The body did not arrive in time.",
    409: "The request is pinned to another contract hash than the model's.",
    413: "The body is too large.",
    415: "The body does not call itself JSON, or has a coding that is not known here.",
    429: "Over capacity or over quota; Retry-After says when to try again.",
    500: "A fault of the endpoint.",
    503: "No encoder answers yet, or the endpoint is starting or stopping.",
    504: "No answer in time.",
}
_LISTS = ("input", "documents", "inputs", "texts", "sentences")  # fields with items of a request
_CUT = "How many items were cut to the model's limit; absent where none was."
_UPLOAD_PATH = "/v1/files"
_WITH_BODY = (400, 404, 408, 409, 413, 415, 429, 500, 503, 504)
_WITH_FORM = (400, 403, 408, 413, 415, 429, 500, 503)
_WITHOUT_BODY = (500, 503, 504)
_BY_NAME = (404, 500, 503, 504)


Types = type[BaseModel] | tuple[type[BaseModel], ...]


@dataclass(frozen=True, slots=True)
class Route:
    """One path: who answers it, and with what."""

    method: str
    path: str
    handler: Callable[..., Any]
    reply: Types | str  # one JSON type, or several of different dialects; or the media type of anything else
    body: Types | None = None
    needs_key: bool = True
    also: tuple[str, ...] = ()  # other paths, of clients that leave /v1 out
    form: dict[str, Any] | None = None  # JSON Schema of a multipart form
    query: type[BaseModel] | None = None  # its fields are query parameters
    refusals: tuple[int, ...] = ()  # statuses beside those that its kind has

    @property
    def paths(self) -> tuple[str, ...]:
        """All its paths."""
        return self.path, *self.also


def openapi_document(
    routes: Sequence[Route], settings: EndpointSettings, keyed: bool, modes: Sequence[str] = ()
) -> dict[str, Any]:
    """The document of an endpoint.

    Args:
        routes: what it answers.
        settings: its limits, which become ``maxItems`` and the like.
        keyed: whether it wants API keys.
        modes: in which its corpus can be searched.
    """
    bodies = [body for route in routes for body in types_of(route.body)]
    replies = [reply for route in routes for reply in types_of(route.reply)]
    types: dict[type[BaseModel], None] = dict.fromkeys([*bodies, *replies, ErrorResponse])
    _, schemas = models_json_schema(
        [(model, "validation") for model in types], ref_template="#/components/schemas/{model}"
    )
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    for schema in components["schemas"].values():
        _state_limits(schema, settings)
    if SearchRequest.__name__ in components["schemas"]:
        components["schemas"][SearchRequest.__name__]["properties"]["mode"]["anyOf"][0]["enum"] = list(modes)
    paths: dict[str, Any] = {}
    for route in routes:
        for path in route.paths:
            operation = _operation(route, settings, keyed) | {"operationId": _identifier(route, path)}
            paths.setdefault(path, {})[route.method.lower()] = operation
    if keyed:
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "Or Azure's header: api-key: KEY."}
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "embedloom", "version": __version__},
        "paths": paths,
        "components": components,
    }


def _operation(route: Route, settings: EndpointSettings, keyed: bool) -> dict[str, Any]:
    kind = (
        _WITH_BODY
        if route.body
        else _WITH_FORM
        if route.form
        else _BY_NAME
        if "{" in route.path
        else _WITHOUT_BODY
    )
    statuses = list(dict.fromkeys((*kind, *route.refusals)))
    if settings.hosts and 403 not in statuses:
        statuses.append(403)
    operation: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip().splitlines()[0],
    }
    if keyed and route.needs_key:
        statuses += [401] if 429 in statuses else [401, 429]
        operation["security"] = [{"key": []}]
    parameters: list[dict[str, Any]] = []
    for name in re.findall(r"{(\w+)}", route.path):
        parameters.append({"name": name, "in": "path", "required": True, "schema": {"type": "string"}})
    if route.query is not None:
        parameters += [
            {"name": name, "in": "query", "schema": schema}
            for name, schema in route.query.model_json_schema()["properties"].items()
        ]
    if route.body is not None:
        parameters.append(
            {"name": CONTRACT_HEADER, "in": "header", "schema": {"type": "string", "pattern": HASH_PATTERN}}
        )
        content = {"application/json": {"schema": _reference(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.form is not None:
        content = {"multipart/form-data": {"schema": route.form}}
        operation["requestBody"] = {"required": True, "content": content}
    if parameters:
        operation["parameters"] = parameters
    operation["responses"] = {"200": _success(route)} | {
        str(status): _error(status) for status in sorted(statuses)
    }
    return operation


def _success(route: Route) -> dict[str, Any]:
    if isinstance(route.reply, str):
        return {"description": "OK", "content": {route.reply: {"schema": {"type": "string"}}}}
    answer = {"description": "OK", "content": {"application/json": {"schema": _reference(route.reply)}}}
    if route.body is not None:
        answer["headers"] = {
            TRUNCATED_HEADER: {"schema": {"type": "integer", "minimum": 1}, "description": _CUT}
        }
    return answer


def types_of(types: Types | str | None) -> tuple[type[BaseModel], ...]:
    """The JSON types among what a route takes or answers."""
    return () if types is None or isinstance(types, str) else types if isinstance(types, tuple) else (types,)


def _reference(types: Types) -> dict[str, Any]:
    references = [{"$ref": f"#/components/schemas/{one.__name__}"} for one in types_of(types)]
    return references[0] if len(references) == 1 else {"anyOf": references}


def _identifier(route: Route, path: str) -> str:
    name = route.handler.__name__
    return name if path == route.path else f"{name}_at_{path.strip('/').replace('/', '_') or 'root'}"


def _error(status: int) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"}
    answer: dict[str, Any] = {
        "description": _REASONS[status],
        "content": {"application/json": {"schema": schema}},
    }
    if status in (429, 503):
        answer["headers"] = {"retry-after": {"schema": {"type": "integer", "minimum": 1}, "required": True}}
    return answer


def _state_limits(schema: dict[str, Any], settings: EndpointSettings) -> None:
    """Write the endpoint's limits and the names of its model into a schema."""
    properties = schema.get("properties", {})
    for name in _LISTS:
        for form in (properties.get(name, {}), *properties.get(name, {}).get("oneOf", ())):
            # A flat list of token ids is one item.
            if form.get("type") == "array" and form["items"].get("type") != "integer":
                form["maxItems"] = settings.max_items
    for name in (*_LISTS, "query"):
        if name in properties:
            _limit_texts(properties[name], settings.max_item_characters)
    for task in (properties.get(name, {}) for name in ("task", "prompt_name")):
        for form in (task, *task.get("anyOf", ())):
            if "enum" in form:
                form["enum"] = [*form["enum"], *settings.tasks]
    model = properties.get("model", {})
    for form in (model, *model.get("anyOf", ())):
        if form.get("type") == "string":
            form["enum"] = [settings.served_name, *settings.models]


def _limit_texts(node: Any, characters: int) -> None:
    if isinstance(node, dict):
        if node.get("type") == "string":
            node["maxLength"] = characters
        for value in node.values():
            _limit_texts(value, characters)
    elif isinstance(node, list):
        for value in node:
            _limit_texts(value, characters)


def create_api(
    backend: Backend,
    settings: EndpointSettings,
    metrics: EndpointMetrics | None = None,
    corpus: Corpus | Lookup | None = None,
    drain: Drain | None = None,
    keys: KeyRing | None = None,
    desk: BatchDesk | None = None,
    further: Sequence[Member] = (),
    tracing: Tracing | None = None,
    reranker: Backend | None = None,
) -> FastAPI:
    """The FastAPI application of one endpoint.

    Args:
        backend: what encodes.
        settings: names and limits.
        metrics: where requests are counted; None: its own.
        corpus: documents that ``/v1/search`` searches; None: no such route.
        drain: by which the endpoint is stopped.
        keys: of the settings, where somebody else counts with them too; None: its own.
        desk: where batches are taken; None: no routes of theirs.
        further: other models behind the same paths, each asked by its names.
        tracing: where traces of requests go; None: there are none.
        reranker: what orders documents for the first model, see ``reranking``; None: similarity does.
    """
    metrics = metrics or EndpointMetrics()
    calls = [
        Calls(backend, settings, metrics, reranker),
        *(Calls(one.backend, one.settings, metrics) for one in further),
    ]
    routes = _member_routes(calls, InThreads.of(corpus))
    if desk is not None:
        routes += _batch_routes(calls[0], desk)
    # FastAPI's own document and pages are off: the pages load scripts from elsewhere, api.py says why.
    api = FastAPI(title="embedloom", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for given, route in [(path, one) for one in routes for path in one.paths]:
        # A served name may hold a slash, as names of Hugging Face do.
        path = given.replace("{name}", "{name:path}")
        # Starlette's route, not FastAPI's: handlers take the request as it is, so there is nothing to inject.
        api.add_route(path, route.handler, methods=[route.method])
    document = openapi_document(
        routes, _of_all(calls), keyed=bool(settings.keys), modes=corpus.card.modes if corpus else ()
    )

    async def openapi(http: Request) -> Response:
        return json_reply({**document, "servers": [{"url": http.scope.get("root_path") or "/"}]})

    api.add_route("/openapi.json", openapi, methods=["GET"])
    api.add_exception_handler(ApiError, _answer_error)
    api.add_exception_handler(HTTPException, _http_errors([path for route in routes for path in route.paths]))
    front = _front_settings(
        routes, settings, {} if desk is None else {_UPLOAD_PATH: desk.max_file_bytes + FORM_BYTES}
    )
    keys = keys or (KeyRing(settings.keys) if settings.keys else None)
    api.add_middleware(Front, metrics=metrics, settings=front, keys=keys, drain=drain, tracing=tracing)
    api.add_middleware(TidyPaths)
    if settings.allowed_origins:
        _let_pages_ask(api, settings.allowed_origins)
    return api


def _let_pages_ask(api: FastAPI, origins: Sequence[str]) -> None:
    """Answer browsers that ask for leave (CORS): outside the front, as they ask (OPTIONS) without the key, and must be able to read
    refusals.
    """
    api.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        # Whatever an allowed page asks for: SDKs send headers of their own (x-stainless-os, openai-project, api-key),
        # other ones with every version, and none of them does anything here that a key would not be asked for.
        allow_headers=["*"],
        expose_headers=["retry-after", "x-request-id", CONTRACT_HEADER, TRUNCATED_HEADER],
    )


def _front_settings(
    routes: Sequence[Route], settings: EndpointSettings, body_limits: dict[str, int]
) -> FrontSettings:
    return FrontSettings(
        paths=frozenset({"/openapi.json", *(path for route in routes for path in route.paths)}),
        templates=tuple((route.path, _pattern(route.path)) for route in routes if "{" in route.path),
        body_limits=body_limits,
        open_paths=frozenset(path for route in routes if not route.needs_key for path in route.paths),
        keyed_posts=frozenset(
            path for route in routes if route.needs_key and route.method == "POST" for path in route.paths
        ),
        methods=_methods(routes),
        max_body_bytes=settings.max_body_bytes,
        request_log=settings.request_log,
        hosts=frozenset(name.encode().lower() for name in settings.hosts),
    )


def _pattern(path: str) -> re.Pattern[str]:
    """What matches a path with names in it; a model's own may hold slashes."""
    return re.compile(re.sub(r"{(\w+)}", lambda found: ".+" if found[1] == "name" else "[^/]+", path))


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


def _of_all(calls: Sequence[Calls]) -> EndpointSettings:
    """The settings of an endpoint as its document states them: the names and tasks of all its models."""
    first, *others = (one.settings for one in calls)
    names = {name: ModelAlias() for one in others for name in one.names}
    tasks = dict.fromkeys(task for one in calls for task in one.settings.tasks)
    return first.model_copy(update={"models": {**first.models, **names}, "tasks": tuple(tasks)})


def _member_routes(calls: Sequence[Calls], corpus: Lookup | None) -> list[Route]:
    """The routes of all models: those with a body hand a request to the model that it names."""
    plain = [Routes(one, corpus.card if corpus is not None and one is calls[0] else None) for one in calls]
    first, *others = (
        _routes(one, own, corpus if one is calls[0] else None) for one, own in zip(calls, plain, strict=True)
    )
    if not others and calls[0].settings.allowed_keys is None:
        return first
    members = Members(calls)
    together = MemberRoutes(members, plain)
    of_all = {"models": together.models, "model": together.model, "ready": together.ready}
    handlers = [{(route.method, route.path): route.handler for route in own} for own in others]
    return [
        replace(
            route,
            handler=of_all.get(route.handler.__name__, route.handler)
            if route.body is None
            else members.dispatched(
                [route.handler, *(own.get((route.method, route.path)) for own in handlers)]
            ),
        )
        for route in first
    ]


def _routes(calls: Calls, plain: Routes, corpus: Lookup | None) -> list[Route]:
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


def _batch_routes(calls: Calls, desk: BatchDesk) -> list[Route]:
    own = BatchRoutes(calls, desk)
    file, batch = f"{_UPLOAD_PATH}/{{file_id}}", "/v1/batches/{batch_id}"
    return [
        Route("POST", _UPLOAD_PATH, own.upload_file, FileObject, form=upload_form(desk.limits)),
        Route("GET", _UPLOAD_PATH, own.files, FileList, query=FileQuery, refusals=(400, 404)),
        Route("GET", file, own.file, FileObject),
        Route("GET", f"{file}/content", own.file_content, "application/octet-stream"),
        Route("DELETE", file, own.delete_file, FileDeleted),
        Route("POST", "/v1/batches", own.create_batch, BatchObject, BatchRequest),
        Route("GET", "/v1/batches", own.batches, BatchList, query=BatchQuery, refusals=(400, 404)),
        Route("GET", batch, own.batch, BatchObject),
        Route("POST", f"{batch}/cancel", own.cancel_batch, BatchObject, refusals=(409,)),
    ]


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
            if path.endswith(ending) and not any(one.endswith(ending) for one in known):
                meant = f"; {reason}"
        refusal = ApiError(error.status_code, f"{request.method} {path:.200}: {error.detail}{meant}")
        headers: dict[str, Any] = dict(error.headers or {})
        return json_reply(refusal.body(), error.status_code, refusal.headers | headers)

    return answer
