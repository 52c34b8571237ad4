"""Fields that several requests share: texts, token ids, tasks, pins; each with the JSON Schema of what it takes.

The check and the schema say the same, so that a client made from the OpenAPI document never meets a surprise.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from embedloom.instructions import Side
from embedloom.records import TASK_TYPES

# Python's and ECMAScript's ideas of a blank, so that the schema's pattern refuses what the check refuses.
NOT_BLANK = r"[^\s\u001c-\u001f\u0085\ufeff]"
_NOT_BLANK = re.compile(NOT_BLANK)
HASH_PATTERN = "^[0-9a-f]{16}$"
_ALLOWED_INPUT = (
    "a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty"
)
_ALLOWED_DOCUMENTS = "a non-empty list of strings or of objects with the key text"

TEXT_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1}
_LINE_SCHEMA: dict[str, Any] = {**TEXT_SCHEMA, "pattern": NOT_BLANK}
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
TEXTS_SCHEMA: dict[str, Any] = {"type": "array", "minItems": 1, "items": TEXT_SCHEMA}


def _documents_schema(text: dict[str, Any]) -> dict[str, Any]:
    objects = {"type": "object", "properties": {"text": text}, "required": ["text"]}
    return {"type": "array", "minItems": 1, "items": {"oneOf": [text, objects]}}


FOREIGN = "x-of-another-dialect"  # marks fields that no hint should name


class ClosedRequest(BaseModel):
    """A request body.

    Closed: a misspelt ``input_type`` would otherwise return vectors of the wrong side. A null in a field that has a
    default means the default: several SDKs send every field they know.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    # The field that tells it from another dialect's request to the same path.
    mark: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields
        return {
            name: item
            for name, item in value.items()
            if item is not None or name not in fields or fields[name].is_required()
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema, which says the same of nulls."""
        schema = handler(core_schema)
        stated = handler.resolve_ref_schema(schema)
        for name, form in stated.get("properties", {}).items():
            if name in stated.get("required", ()) or {"type": "null"} in form.get("anyOf", ()):
                continue
            about = ("title", "description", "default", FOREIGN)
            values = {key: form.pop(key) for key in list(form) if key not in about}
            form["anyOf"] = [values, {"type": "null"}]
        return schema

    def said(self, name: str) -> Any:
        """What the request itself says in a field; None where it leaves it to whoever has a default."""
        return getattr(self, name) if name in self.model_fields_set else None


def harmless(dialect: str, **limits: Any) -> Any:
    """A field that clients of another dialect send and that changes nothing here."""
    return Field(
        default=None,
        description=f"{dialect}: taken, and changes nothing.",
        json_schema_extra={FOREIGN: True},
        **limits,
    )


def refuse(message: str, **context: Any) -> PydanticCustomError:
    """A refusal whose message is shown as it stands; ``param`` and ``code`` go into the error."""
    return PydanticCustomError("request", "{reason}", {"reason": message, **context})


def check_input(value: Any, name: str = "input") -> list[str] | list[list[int]]:
    """Bring all four input forms into one list: texts, or token ids of texts.

    A text of nothing but white space is a text; an empty one is refused, as OpenAI and TEI do.

    Raises:
        PydanticCustomError: empty, mixed, or of another type; the message names the item.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise refuse(f"{name} is of type {_json_type(value)}; allowed: {_ALLOWED_INPUT}")
    if not value:
        raise refuse(f"{name} is an empty list; allowed: {_ALLOWED_INPUT}")
    if type(value[0]) in (int, float):
        return [_token_ids(value, name)]
    if isinstance(value[0], list):
        return [_token_ids(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return check_texts(value, name, _ALLOWED_INPUT)


def check_texts(
    value: Any, name: str, allowed: str = "a non-empty list of strings, none of them empty"
) -> list[str]:
    """A non-empty list of texts, none of them empty.

    Raises:
        PydanticCustomError: anything else; the message names the item.
    """
    for index, item in enumerate(texts := check_strings(value, name, allowed)):
        if not item:
            raise refuse(f"{name}[{index}] is an empty string; allowed: {allowed}")
    return texts


def check_strings(value: Any, name: str, allowed: str = "a non-empty list of strings") -> list[str]:
    """A non-empty list of strings.

    Raises:
        PydanticCustomError: anything else; the message names the item.
    """
    if not isinstance(value, list) or not value:
        raise refuse(f"{name} is {_described(value)}; allowed: {allowed}")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise refuse(f"{name}[{index}] is {_described(item)}; allowed: {allowed}")
    return value


def check_documents(value: Any) -> list[str | dict[str, Any]]:
    """A non-empty list of documents: strings, or Cohere's ``{"text": ...}`` with whatever else it has.

    Raises:
        PydanticCustomError: empty list, or of another type; the message names the item.
    """
    if not isinstance(value, list) or not value:
        raise refuse(f"documents is {_described(value)}; allowed: {_ALLOWED_DOCUMENTS}")
    for index, item in enumerate(value):
        where = f"documents[{index}]"
        if isinstance(item, dict):
            if "text" not in item:
                found = (
                    f"has the key {next(iter(item))!r:.80} but no key 'text'" if item else "has no key 'text'"
                )
                raise refuse(f"{where} {found}; allowed: {_ALLOWED_DOCUMENTS}")
            item, where = item["text"], f"{where}.text"
        if not isinstance(item, str):
            raise refuse(f"{where} is of type {_json_type(item)}; allowed: {_ALLOWED_DOCUMENTS}")
    return value


def check_full_documents(value: Any) -> list[str | dict[str, Any]]:
    """The same, none of them empty."""
    documents = check_documents(value)
    for index, text in enumerate(document_texts(documents, None)):
        if not text:
            raise refuse(
                f"documents[{index}] is an empty string; allowed: {_ALLOWED_DOCUMENTS}, none of them empty"
            )
    return documents


def document_texts(documents: list[str | dict[str, Any]], rank_fields: list[str] | None) -> list[str]:
    """The text of each document: a string, an object's ``text``, or those of its ``rank_fields`` that are strings."""
    names = rank_fields or ["text"]
    return [
        item
        if isinstance(item, str)
        else " ".join(value for name in names if isinstance(value := item.get(name), str))
        for item in documents
    ]


def is_blank(text: str) -> bool:
    """Whether there is nothing in a text but white space."""
    return not _NOT_BLANK.search(text)


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
    if value == []:
        return "an empty list"
    return "an empty string" if value == "" else f"of type {_json_type(value)}"


def _json_type(value: Any) -> str:
    names: dict[type, str] = {
        dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), "string")


def _not_blank(name: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if is_blank(value):
            raise refuse(f"{name} is an empty or blank string; allowed: a string that is not blank")
        return value

    return check


def _any_spelling(value: Any) -> Any:
    """Cohere's and NVIDIA's capitals, and Jina's yes or no."""
    if isinstance(value, bool):
        return "end" if value else "none"
    return value.lower() if value in ("NONE", "START", "END") else value


# Jina's names of what we call a side and a task type; those that it shares with us are not among them.
JINA_TASKS: dict[str, tuple[Side | None, str]] = {
    "retrieval.query": ("query", "retrieval"),
    "retrieval.passage": ("document", "retrieval"),
    "text-matching": (None, "sts"),
    "separation": (None, "clustering"),
}


def _known_task(value: str, info: ValidationInfo) -> str:
    """A task type, or the name of one of the model's tasks, which whoever reads the request hands in."""
    allowed = (*TASK_TYPES, *(info.context or {}).get("tasks", ()), *JINA_TASKS)
    if value not in allowed:
        raise refuse(f"task: {value!r:.80} is unknown; allowed: {', '.join(allowed)}")
    return value


Input = Annotated[list[str] | list[list[int]], PlainValidator(check_input), WithJsonSchema(INPUT_SCHEMA)]
Texts = Annotated[
    list[str], PlainValidator(lambda value: check_texts(value, "texts")), WithJsonSchema(TEXTS_SCHEMA)
]
Documents = Annotated[
    list[str | dict[str, Any]],
    PlainValidator(check_documents),
    WithJsonSchema(_documents_schema({"type": "string"})),
]
FullDocuments = Annotated[
    list[str | dict[str, Any]],
    PlainValidator(check_full_documents),
    WithJsonSchema(_documents_schema(TEXT_SCHEMA)),
]
Query = Annotated[str, AfterValidator(_not_blank("query")), WithJsonSchema(_LINE_SCHEMA)]
Instruction = Annotated[
    str,
    Field(max_length=MAX_INSTRUCTION_CHARACTERS),
    AfterValidator(_not_blank("instruction")),
    WithJsonSchema({**_LINE_SCHEMA, "maxLength": MAX_INSTRUCTION_CHARACTERS}),
]
Task = Annotated[
    str,
    AfterValidator(_known_task),
    WithJsonSchema({"type": "string", "enum": [*TASK_TYPES, *JINA_TASKS]}),
]
Integer = Annotated[int, BeforeValidator(whole_number)]
Count = Annotated[int, Field(ge=1), BeforeValidator(whole_number)]
Pin = Annotated[str, Field(pattern=HASH_PATTERN)]
Truncate = Annotated[
    Literal["none", "start", "end"],
    BeforeValidator(_any_spelling),
    WithJsonSchema({"enum": ["none", "start", "end", "NONE", "START", "END", True, False]}),
]
