"""The section of one teacher: which model scores queries and documents, and what runs it."""

import re
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from embedloom.config.base import FrozenConfig

TeacherEngine = Literal["auto", "encoder", "sentence_transformers", "openai"]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_ENDPOINT_ONLY = ("url", "api_key_env", "max_characters", "concurrency", "timeout_seconds", "max_retries")
_LOCAL_ONLY = ("max_query_tokens", "max_document_tokens", "dtype", "trust_remote_code")


class Teacher(FrozenConfig):
    """One teacher; a plain string stands for ``{model: string}``."""

    model: str = Field(
        min_length=1,
        description=(
            "A model folder, a Hugging Face id or a registry name; with engine openai, the name of the "
            "served model."
        ),
    )
    engine: TeacherEngine = Field(
        default="auto",
        description=(
            "What computes: encoder (our own), sentence_transformers, openai (an endpoint), or auto: our "
            "own where it computes exactly what the model's files say, else sentence_transformers."
        ),
    )
    url: str | None = Field(
        default=None,
        description=(
            "engine openai, which needs it: base address up to and with /v1. Null: the model is computed "
            "here."
        ),
    )
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description=(
            "engine openai: environment variable that holds the API key; never the key itself. Null: "
            "requests carry no key."
        ),
    )
    query_template: str | None = Field(
        default=None,
        description=(
            "How a query is written: {text} once and perhaps {instruction}. Null: the model's own query "
            "prompt."
        ),
    )
    document_template: str | None = Field(
        default=None,
        description=(
            "How a document is written: {text} once and perhaps {instruction}. Null: the model's own "
            "document prompt."
        ),
    )
    max_query_tokens: int | None = Field(
        default=None,
        ge=8,
        description="Longest query, in tokens; longer ones are cut. Null: mining.max_query_tokens.",
    )
    max_document_tokens: int | None = Field(
        default=None,
        ge=8,
        description="Longest document, in tokens; longer ones are cut. Null: mining.max_document_tokens.",
    )
    max_characters: int | None = Field(
        default=None,
        ge=1,
        description=(
            "engine openai: characters to which longer texts are cut before they are sent. Null: sent whole."
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description=(
            "Number type of the computation. auto: bfloat16 where the hardware computes it fast, else "
            "float32."
        ),
    )
    batch_size: int = Field(
        default=32, ge=1, le=2048, description="Texts per batch or request; 2,048 is OpenAI's limit."
    )
    concurrency: int = Field(
        default=4, ge=1, le=256, description="engine openai: requests in flight per actor."
    )
    timeout_seconds: float = Field(
        default=60.0, gt=0, description="engine openai: seconds that a request may take."
    )
    max_retries: int = Field(
        default=5,
        ge=0,
        description="engine openai: repetitions after status 408, 409, 429, 5xx or a broken connection.",
    )
    trust_remote_code: bool = Field(
        default=False,
        exclude_if=lambda value: value is False,
        description=(
            "Run code that lies beside the model's weights (auto_map, module classes). Only for models whose "
            "authors you trust."
        ),
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Either a name or a section, as ``_string_is_the_model`` reads it."""
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(schema)]}

    @model_validator(mode="before")
    @classmethod
    def _string_is_the_model(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("query_template", "document_template")
    @classmethod
    def _template_holds_the_text(cls, value: str | None) -> str | None:
        return value if value is None else check_template(value)

    @field_validator("url")
    @classmethod
    def _url_is_a_base(cls, value: str | None) -> str | None:
        if value is None:
            return value
        if not re.match(r"https?://[^/@\s]+(/|$)", value):
            raise ValueError(
                "url must be http(s)://host[:port][/path]; a key goes into api_key_env, not here"
            )
        if value.rstrip("/").endswith("/embeddings"):
            raise ValueError("url is the base address, such as http://host:8000/v1, without /embeddings")
        return value

    @model_validator(mode="after")
    def _keys_fit_the_engine(self) -> "Teacher":
        # Against the defaults rather than by model_fields_set, so that a dumped config can be read back.
        defaults = {key: info.default for key, info in type(self).model_fields.items()}
        given = {key for key, default in defaults.items() if getattr(self, key) != default}
        if self.engine == "openai":
            if self.url is None:
                raise ValueError("engine openai needs url, the base address of the endpoint")
            _refuse(
                given, _LOCAL_ONLY, "engine openai; the endpoint decides, cut long texts by max_characters"
            )
            return self
        _refuse(given, _ENDPOINT_ONLY, f"engine {self.engine}; only engine openai takes it")
        if self.engine == "encoder":
            reason = "engine encoder; its template stands in the model's contract.json"
            _refuse(given, ("query_template", "document_template", "batch_size"), reason)
        return self


def check_template(value: str) -> str:
    """Return a template that holds the text once.

    Raises:
        ValueError: it does not, or holds another name in braces.
    """
    names = _PLACEHOLDER.findall(value)
    if names.count("text") != 1 or set(names) - {"text", "instruction"}:
        raise ValueError("a template holds {text} once and may hold {instruction}; nothing else in braces")
    return value


def _refuse(given: set[str], keys: tuple[str, ...], reason: str) -> None:
    wrong = [key for key in keys if key in given]
    if wrong:
        raise ValueError(f"{wrong[0]} does not fit {reason}")
