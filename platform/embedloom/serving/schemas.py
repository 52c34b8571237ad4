"""OpenAI's embeddings request as a type: what it may hold, and how a refusal is told.

Kept apart from routes and Ray, so every rule can be tested as a function. A request is closed: an unknown key
is refused with the nearest valid one, because a misspelt ``input_type`` would otherwise return vectors of the
wrong side.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from embedloom.errors import ServeError
from embedloom.records import TASK_TYPES

INPUT_SCHEMA: dict[str, Any] = {
    "oneOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ]
}
_ALLOWED_INPUT = (
    "a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty"
)


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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def _input_error(message: str) -> PydanticCustomError:
    return PydanticCustomError("input", "{reason}", {"reason": message})


def check_input(value: Any) -> list[str] | list[list[int]]:
    """Bring all four input forms into one list: texts, or token ids of texts.

    Raises:
        PydanticCustomError: empty, mixed, or of another type; the message names the item.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise _input_error(f"input is of type {_json_type(value)}; allowed: {_ALLOWED_INPUT}")
    if not value:
        raise _input_error(f"input is an empty list; allowed: {_ALLOWED_INPUT}")
    if type(value[0]) is int:
        return [_token_ids(value, "input")]
    if isinstance(value[0], list):
        return [_token_ids(item, f"input[{index}]") for index, item in enumerate(value)]
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise _input_error(f"input[{index}] is of type {_json_type(item)}; allowed: {_ALLOWED_INPUT}")
        if not item.strip():
            raise _input_error(f"input[{index}] is an empty or blank string; allowed: {_ALLOWED_INPUT}")
    return value


def _token_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise _input_error(f"{where} is not a non-empty list of token ids; allowed: {_ALLOWED_INPUT}")
    for index, item in enumerate(value):
        # ``True`` is an int in Python but not in JSON, hence no isinstance.
        if type(item) is not int or item < 0:
            raise _input_error(f"{where}[{index}] is {item!r:.40}, not a token id (an integer of 0 or more)")
    return value


def _json_type(value: Any) -> str:
    names: dict[type, str] = {
        dict: "object",
        list: "array",
        bool: "boolean",
        int: "integer",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), "string")


class EmbeddingsRequest(BaseModel):
    """``POST /v1/embeddings``."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    input: Annotated[
        list[str] | list[list[int]], PlainValidator(check_input), WithJsonSchema(INPUT_SCHEMA)
    ] = Field(
        description="Texts, or token ids of this model's own tokenizer; ids are embedded without template."
    )
    model: str = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        default=None, ge=1, description="Only for models trained for it (Matryoshka)."
    )
    user: str | None = None
    input_type: Literal["query", "document"] = "document"
    task: str | None = Field(default=None, description="Task type; decides the default instruction.")
    instruction: str | None = Field(
        default=None, min_length=1, description="Replaces the task type's instruction."
    )
    truncate: Literal["none", "end"] = Field(
        default="none", description="none: too long an input is refused."
    )

    @property
    def is_token_ids(self) -> bool:
        """Whether the input came as token ids."""
        return not isinstance(self.input[0], str)


def parse_request(body: bytes) -> EmbeddingsRequest:
    """Read a JSON body.

    Raises:
        ApiError: 400; the message names the field, what was seen and what is allowed.
    """
    try:
        request = EmbeddingsRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from error
    if request.task is not None and request.task not in TASK_TYPES:
        raise ApiError(
            400, f"task: {request.task!r:.80} is unknown; allowed: {', '.join(TASK_TYPES)}", param="task"
        )
    if request.is_token_ids and (request.task or request.instruction):
        given = "task" if request.task else "instruction"
        raise ApiError(400, f"{given}: cannot be applied to token ids; send the text instead", param=given)
    return request


def _refusal(problem: ErrorDetails) -> ApiError:
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']}")
    if not problem["loc"]:
        return ApiError(400, "the body must be a JSON object")
    field = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, EmbeddingsRequest.model_fields, n=1, cutoff=0.0)[0]
        return ApiError(
            400, f"{field[:80]}: unknown parameter; the nearest valid one is {near!r}", param=field[:80]
        )
    if problem["type"] == "input":
        return ApiError(400, problem["msg"], param="input")
    if problem["type"] == "missing":
        return ApiError(400, f"{field}: required, but missing", param=field)
    return ApiError(400, f"{field}: {problem['msg']} (seen: {problem['input']!r:.80})", param=field)
