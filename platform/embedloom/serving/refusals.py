"""How a request is refused: OpenAI's error shape, and JSON bodies read into closed types."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from embedloom.errors import ServeError

Body = TypeVar("Body", bound=BaseModel)
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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind or _kind(status)
        if retry_after_seconds is None and status in (429, 503):
            retry_after_seconds = _RETRY_AFTER_SECONDS
        self.retry_after_seconds = retry_after_seconds

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        headers = {}
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


def parse(model: type[Body], body: bytes) -> Body:
    """Read a JSON body into its closed type.

    Raises:
        ApiError: 400; the message names the field, what was seen and what is allowed.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt required key is both unknown and missing; naming the misspelling is what helps.
        first = next((found for found in problems if found["type"] == "extra_forbidden"), problems[0])
        raise _refusal(first, model) from error


def _refusal(problem: ErrorDetails, model: type[BaseModel]) -> ApiError:
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']}", code="invalid_json")
    if not problem["loc"]:
        message = problem["msg"] if problem["type"] == "request" else "the body must be a JSON object"
        context = problem.get("ctx", {})
        return ApiError(400, message, param=context.get("param"), code=context.get("code"))
    field = str(problem["loc"][0])[:_SHOWN]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, model.model_fields, n=1, cutoff=0.0)[0]
        return ApiError(400, f"{field}: unknown parameter; the nearest valid one is {near!r}", param=field)
    if problem["type"] == "request":
        return ApiError(400, problem["msg"], param=field)
    if problem["type"] == "missing":
        return ApiError(400, f"{field}: required, but missing", param=field)
    return ApiError(400, f"{field}: {problem['msg']} (seen: {_shown(problem['input'])})", param=field)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.{_SHOWN}}"
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return "a number of thousands of digits"
