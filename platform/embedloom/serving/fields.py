"""Fields that several requests share: texts, token ids, tasks, pins; each with the JSON Schema of what it takes.

The check and the schema say the same, so that a client made from the OpenAPI document never meets a surprise.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from embedloom.records import TASK_TYPES

# Python's and ECMAScript's ideas of a blank, so that the schema's pattern refuses what the check refuses.
NOT_BLANK = r"[^\s\u001c-\u001f\u0085\ufeff]"
_NOT_BLANK = re.compile(NOT_BLANK)
HASH_PATTERN = "^[0-9a-f]{16}$"
_ALLOWED_INPUT = (
    "a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty"
)
_ALLOWED_DOCUMENTS = "a non-empty list of strings or of objects with the key text"

TEXT_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1, "pattern": NOT_BLANK}
# An instruction is repeated before every item of a request.
MAX_INSTRUCTION_CHARACTERS = 4096
_IDS_SCHEMA: dict[str, Any] = {
    "type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
}  # fmt: skip
INPUT_SCHEMA: dict[str, Any] = {
    "oneOf": [
        TEXT_SCHEMA,
        {"type": "array", "minItems": 1, "items": TEXT_SCHEMA},
        _IDS_SCHEMA,
        {"type": "array", "minItems": 1, "items": _IDS_SCHEMA},
    ]
}
DOCUMENTS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "oneOf": [
            TEXT_SCHEMA,
            {
                "type": "object",
                "properties": {"text": TEXT_SCHEMA},
                "required": ["text"],
                "additionalProperties": False,
            },
        ]
    },
}


class ClosedRequest(BaseModel):
    """A request body. Closed: a misspelt ``input_type`` would otherwise return vectors of the wrong side."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def refuse(message: str, **context: Any) -> PydanticCustomError:
    """A refusal whose message is shown as it stands; ``param`` and ``code`` go into the error."""
    return PydanticCustomError("request", "{reason}", {"reason": message, **context})


def check_input(value: Any) -> list[str] | list[list[int]]:
    """Bring all four input forms into one list: texts, or token ids of texts.

    Raises:
        PydanticCustomError: empty, mixed, or of another type; the message names the item.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise refuse(f"input is of type {_json_type(value)}; allowed: {_ALLOWED_INPUT}")
    if not value:
        raise refuse(f"input is an empty list; allowed: {_ALLOWED_INPUT}")
    if type(value[0]) in (int, float):
        return [_token_ids(value, "input")]
    if isinstance(value[0], list):
        return [_token_ids(item, f"input[{index}]") for index, item in enumerate(value)]
    return [_text(item, f"input[{index}]", _ALLOWED_INPUT) for index, item in enumerate(value)]


def check_texts(value: Any) -> list[str]:
    """A non-empty list of texts, strings or Cohere's ``{"text": ...}``, as strings.

    Raises:
        PydanticCustomError: empty or of another type; the message names the item.
    """
    if not isinstance(value, list) or not value:
        raise refuse(f"documents is {_described(value)}; allowed: {_ALLOWED_DOCUMENTS}")
    texts = []
    for index, item in enumerate(value):
        where = f"documents[{index}]"
        if isinstance(item, dict):
            strange = next((key for key in item if key != "text"), None)
            if strange is not None or "text" not in item:
                found = f"has the key {strange!r:.80}" if strange is not None else "has no key 'text'"
                raise refuse(f"{where} {found}; allowed: {_ALLOWED_DOCUMENTS}")
            item, where = item["text"], f"{where}.text"
        texts.append(_text(item, where, _ALLOWED_DOCUMENTS))
    return texts


def _text(value: Any, where: str, allowed: str) -> str:
    if not isinstance(value, str):
        raise refuse(f"{where} is of type {_json_type(value)}; allowed: {allowed}")
    if not _NOT_BLANK.search(value):
        raise refuse(f"{where} is an empty or blank string; allowed: {allowed}")
    return value


def _token_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise refuse(f"{where} is not a non-empty list of token ids; allowed: {_ALLOWED_INPUT}")
    numbers = [whole_number(item) for item in value]
    for index, item in enumerate(numbers):
        # ``True`` is an int in Python but not in JSON, hence no isinstance.
        if type(item) is not int or not 0 <= item < 2**31:
            seen = f"{item!r:.40}" if type(item) is not int or abs(item) < 2**62 else "too large a number"
            raise refuse(f"{where}[{index}] is {seen}, not a token id (an integer from 0 to 2^31 - 1)")
    return numbers


def whole_number(value: Any) -> Any:
    """8.0 as 8: JSON, and JSON Schema's "integer", know no difference between the two."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _described(value: Any) -> str:
    return "an empty list" if isinstance(value, list) else f"of type {_json_type(value)}"


def _json_type(value: Any) -> str:
    names: dict[type, str] = {
        dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), "string")


def _not_blank(name: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        return _text(value, name, "a string that is not blank")

    return check


def _known_task(value: str) -> str:
    if value not in TASK_TYPES:
        raise refuse(f"task: {value!r:.80} is unknown; allowed: {', '.join(TASK_TYPES)}")
    return value


Input = Annotated[list[str] | list[list[int]], PlainValidator(check_input), WithJsonSchema(INPUT_SCHEMA)]
Documents = Annotated[list[str], PlainValidator(check_texts), WithJsonSchema(DOCUMENTS_SCHEMA)]
Query = Annotated[str, AfterValidator(_not_blank("query")), WithJsonSchema(TEXT_SCHEMA)]
Instruction = Annotated[
    str,
    Field(max_length=MAX_INSTRUCTION_CHARACTERS),
    AfterValidator(_not_blank("instruction")),
    WithJsonSchema({**TEXT_SCHEMA, "maxLength": MAX_INSTRUCTION_CHARACTERS}),
]
Task = Annotated[
    str, AfterValidator(_known_task), WithJsonSchema({"type": "string", "enum": list(TASK_TYPES)})
]
Count = Annotated[int, Field(ge=1), BeforeValidator(whole_number)]
Pin = Annotated[str, Field(pattern=HASH_PATTERN)]
Truncate = Literal["none", "start", "end"]
