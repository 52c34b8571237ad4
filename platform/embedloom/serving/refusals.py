"""How a request is refused: OpenAI's error shape, and JSON bodies read into closed types."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from embedloom.errors import ServeError
from embedloom.serving.schemas import FOREIGN

Body = TypeVar("Body", bound=BaseModel)
_NEAR = 0.7  # of difflib: "input_typ" and "querry" are near, "normalize" and "timeout" are near nothing
_SURROGATE = re.compile("[\ud800-\udfff]")
_RETRY_AFTER_SECONDS = 1
_SHOWN = 80  # characters of a client's own value that come back to it


class ApiError(ServeError):
    """A request that is answered with an error status; the message is safe to show to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry_after_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind or _kind(status)
        if retry_after_seconds is None and status in (429, 503):
            retry_after_seconds = _RETRY_AFTER_SECONDS
        self.retry_after_seconds = retry_after_seconds
        self._headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        headers = dict(self._headers)
        if self.retry_after_seconds is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_seconds)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def _kind(status: int) -> str:
    names = {401: "authentication_error", 429: "rate_limit_error"}
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")


def check_content_type(headers: Mapping[str, str]) -> None:
    """Refuse a body that does not call itself JSON.

    A web page elsewhere may send a browser's user's own endpoint a form or plain text without being asked for
    leave (CORS); it may not send JSON.

    Raises:
        ApiError: 415.
    """
    given = headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415,
            f"content-type: {given!r:.80} is not supported; allowed: application/json",
            code="unsupported_content_type",
        )


def parse(model: type[Body], body: bytes, tasks: Sequence[str] = ()) -> Body:
    """Read a JSON body into its closed type.

    Args:
        model: the type.
        body: as it came.
        tasks: names of the served model's own tasks, which a request may name beside the task types.

    Raises:
        ApiError: 400; the message names the field, what was seen and what is allowed.
    """
    return read_into(model, read_json(body), tasks)


def read_json(body: bytes) -> Any:
    """The value of a JSON body; half a surrogate pair, which JavaScript writes where a text was cut, becomes U+FFFD.

    Raises:
        ApiError: 400, not JSON, or an item that is not UTF-8, by name.
    """
    try:
        return from_json(body)
    except ValueError as error:
        reason = str(error)
    # Python's parser takes half pairs; it is asked only here, as it is the slower one.
    try:
        return _mended(json.loads(body.decode("utf-8", "surrogateescape")), _is_utf8(body))
    except _NotText as item:
        where = item.place.removeprefix(".") or "its text"
        raise ApiError(
            400,
            f"the body is not UTF-8: {where:.200} holds bytes that are none; allowed: JSON in UTF-8",
            code="invalid_json",
        ) from None
    except (ValueError, RecursionError):
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None


class _NotText(Exception):
    """Bytes that are no text; ``place`` grows on the way out, so that good items cost nothing."""

    place = ""


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _mended(value: Any, is_utf8: bool) -> Any:
    """The value with U+FFFD for every half pair.

    Raises:
        _NotText: the first text with bytes that are not UTF-8, where the body has such.
    """
    if isinstance(value, str):
        if value.isascii():
            return value
        if not is_utf8 and re.search("[\udc80-\udcff]", value):
            raise _NotText
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)
    if not isinstance(value, (list, dict)):
        return value
    entries: Iterable[tuple[Any, Any]] = enumerate(value) if isinstance(value, list) else value.items()
    mended = []
    for place, item in entries:
        try:
            mended.append(_mended(item, is_utf8))
        except _NotText as found:
            found.place = (f"[{place}]" if isinstance(value, list) else f".{place:.{_SHOWN}}") + found.place
            raise
    if isinstance(value, list):
        return mended
    return {_mended(key, is_utf8): item for key, item in zip(value, mended, strict=True)}


def read_into(model: type[Body], value: Any, tasks: Sequence[str] = ()) -> Body:
    """A JSON value as its closed type.

    Raises:
        ApiError: see ``parse``.
    """
    try:
        return model.model_validate(value, context={"tasks": tasks})
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt required key is both unknown and missing; naming the misspelling is what helps.
        first = next((found for found in problems if found["type"] == "extra_forbidden"), problems[0])
        raise _refusal(first, model) from error


def _refusal(problem: ErrorDetails, model: type[BaseModel]) -> ApiError:
    if not problem["loc"]:
        message = problem["msg"] if problem["type"] == "request" else "the body must be a JSON object"
        context = problem.get("ctx", {})
        return ApiError(400, message, param=context.get("param"), code=context.get("code"))
    field = str(problem["loc"][0])[:_SHOWN]
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: unknown parameter; {_near(field, model)}", param=field)
    if problem["type"] == "request":
        return ApiError(400, problem["msg"], param=field)
    if problem["type"] == "missing":
        return ApiError(400, f"{field}: required, but missing", param=field)
    return ApiError(400, f"{field}: {problem['msg']} (seen: {_shown(problem['input'])})", param=field)


def _near(field: str, model: type[BaseModel]) -> str:
    """The parameter that was perhaps meant, else all there are; not those that change nothing."""
    names = [
        name
        for name, known in model.model_fields.items()
        if not (isinstance(known.json_schema_extra, dict) and FOREIGN in known.json_schema_extra)
    ]
    near = difflib.get_close_matches(field, names, n=1, cutoff=_NEAR)
    return f"the nearest valid one is {near[0]!r}" if near else f"allowed: {', '.join(names)}"


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.{_SHOWN}}"
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return "a number of thousands of digits"
