"""The OpenAPI document, made from the same types that read requests and from the endpoint's own limits.

Written here and not by FastAPI, which knows bodies only as arguments of handlers: ours are read after their size,
content type and sender were checked, and their limits are this endpoint's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from embedloom import __version__
from embedloom.serving.calls import CONTRACT_HEADER, TRUNCATED_HEADER, EndpointSettings
from embedloom.serving.fields import HASH_PATTERN
from embedloom.serving.replies import ErrorResponse

_REASONS = {
    400: "The request is not valid; param names the field.",
    401: "No API key, or an unknown one.",
    403: "Asked by a name that is not this machine's.",
    404: "No such model.",
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
_WITH_BODY = (400, 404, 408, 409, 413, 415, 429, 500, 503, 504)
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

    @property
    def paths(self) -> tuple[str, ...]:
        """All its paths."""
        return self.path, *self.also


def openapi_document(routes: Sequence[Route], settings: EndpointSettings, keyed: bool) -> dict[str, Any]:
    """The document of an endpoint.

    Args:
        routes: what it answers.
        settings: its limits, which become ``maxItems`` and the like.
        keyed: whether it wants API keys.
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
    statuses = list(_WITH_BODY if route.body else _BY_NAME if "{" in route.path else _WITHOUT_BODY)
    if settings.hosts:
        statuses.append(403)
    operation: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip().splitlines()[0],
    }
    if keyed and route.needs_key:
        statuses += [401] if 429 in statuses else [401, 429]
        operation["security"] = [{"key": []}]
    parameters: list[dict[str, Any]] = []
    if "{name}" in route.path:
        parameters.append({"name": "name", "in": "path", "required": True, "schema": {"type": "string"}})
    if route.body is not None:
        parameters.append(
            {"name": CONTRACT_HEADER, "in": "header", "schema": {"type": "string", "pattern": HASH_PATTERN}}
        )
        content = {"application/json": {"schema": _reference(route.body)}}
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
