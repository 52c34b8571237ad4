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
from embedloom.serving.calls import CONTRACT_HEADER, EndpointSettings
from embedloom.serving.fields import HASH_PATTERN, NOT_BLANK
from embedloom.serving.replies import ErrorResponse

_REASONS = {
    400: "The request is not valid; param names the field.",
    401: "No API key, or an unknown one.",
    403: "Asked by a name that is not this machine's.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    409: "The request is pinned to another contract hash than the model's.",
    413: "The body is too large.",
    415: "The body does not call itself JSON.",
    429: "Over capacity or over quota; Retry-After says when to try again.",
    500: "A fault of the endpoint.",
    503: "No encoder answers yet.",
    504: "No answer in time.",
}
_WITH_BODY = (400, 404, 408, 409, 413, 415, 429, 500, 503, 504)
_WITHOUT_BODY = (500, 503, 504)
_BY_NAME = (404, 500, 503, 504)


@dataclass(frozen=True, slots=True)
class Route:
    """One path: who answers it, and with what."""

    method: str
    path: str
    handler: Callable[..., Any]
    reply: type[BaseModel] | str  # a JSON type, or the media type of anything else
    body: type[BaseModel] | None = None
    needs_key: bool = True


def openapi_document(routes: Sequence[Route], settings: EndpointSettings, keyed: bool) -> dict[str, Any]:
    """The document of an endpoint.

    Args:
        routes: what it answers.
        settings: its limits, which become ``maxItems`` and the like.
        keyed: whether it wants API keys.
    """
    bodies = [route.body for route in routes if route.body is not None]
    replies = [route.reply for route in routes if not isinstance(route.reply, str)]
    types: dict[type[BaseModel], None] = dict.fromkeys([*bodies, *replies, ErrorResponse])
    _, schemas = models_json_schema(
        [(model, "validation") for model in types], ref_template="#/components/schemas/{model}"
    )
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    for model in bodies:
        _state_limits(components["schemas"][model.__name__], settings)
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, settings, keyed)
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
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
        "operationId": route.handler.__name__,
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
        reference = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    if parameters:
        operation["parameters"] = parameters
    operation["responses"] = {"200": _success(route)} | {
        str(status): _error(status) for status in sorted(statuses)
    }
    return operation


def _success(route: Route) -> dict[str, Any]:
    if isinstance(route.reply, str):
        return {"description": "OK", "content": {route.reply: {"schema": {"type": "string"}}}}
    schema = {"$ref": f"#/components/schemas/{route.reply.__name__}"}
    return {"description": "OK", "content": {"application/json": {"schema": schema}}}


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
    """Write the endpoint's limits and the served name into a request's schema."""
    properties = schema["properties"]
    for name in ("input", "documents"):
        for form in (properties.get(name, {}), *properties.get(name, {}).get("oneOf", ())):
            # A flat list of token ids is one item.
            if form.get("type") == "array" and form["items"].get("type") != "integer":
                form["maxItems"] = settings.max_items
    for name in ("input", "documents", "query"):
        if name in properties:
            _limit_texts(properties[name], settings.max_item_characters)
    model = properties["model"]
    for form in (model, *model.get("anyOf", ())):
        if form.get("type") == "string":
            form["enum"] = [settings.served_name]


def _limit_texts(node: Any, characters: int) -> None:
    if isinstance(node, dict):
        if node.get("pattern") == NOT_BLANK:
            node["maxLength"] = characters
        for value in node.values():
            _limit_texts(value, characters)
    elif isinstance(node, list):
        for value in node:
            _limit_texts(value, characters)
