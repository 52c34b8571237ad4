"""Requests and replies as types: OpenAI's embeddings, Cohere's rerank, our own similarity, tokenize and search. Apart from
routes and Ray, so every rule can be tested as a function.
"""

import re
from collections.abc import Callable, Sequence
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

from embedloom.config.serving import SearchMode, Truncate
from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import USUAL_TASK, Side
from embedloom.core.schemas import TASK_TYPES

# The type of a vector's numbers, and the forms that they are sent in.
VectorType = Literal["float", "int8", "uint8", "binary", "ubinary"]
Encoding = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]

# Fields that several requests share: texts, token ids, tasks, pins; each with the JSON Schema of what it takes.
#
# The check and the schema say the same, so that a client made from the OpenAPI document never meets a surprise.


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
TruncateField = Annotated[
    Literal["none", "start", "end"],
    BeforeValidator(_any_spelling),
    WithJsonSchema({"enum": ["none", "start", "end", "NONE", "START", "END", True, False]}),
]


_TASK = "Task type, or one of the model's tasks by name; decides the instruction. Jina's names of tasks say the side, too."
_INSTRUCTION = "Replaces the task's instruction."
_PIN = "Hash of the prompt contract the vectors must be of; another model answers 409."
_TRUNCATE = (
    "Too long a text: none refuses it, start cuts its beginning, end (or true) cuts its end. What is cut is told in the "
    "header X-Truncated-Items and in the usage. Not given: the default of the model name, else the operator's, else this."
)
_TRUNCATION = "Voyage's name of truncate; where both are given, truncate holds."
BAD_ITEMS = "White space is embedded, an empty text refused (400, naming the item), half a surrogate pair read as U+FFFD."
_USER = "Taken and not used: who asks is no business of the endpoint."
MAX_TOP_K = 1000


class TextOptions(ClosedRequest):
    """What every request may say of how its texts become model text."""

    usual_truncation: ClassVar[Literal["none", "start", "end"]] = "none"  # of the route

    task: Task | None = Field(default=None, description=_TASK)
    instruction: Instruction | None = Field(default=None, description=_INSTRUCTION)
    contract_hash: Pin | None = Field(default=None, description=_PIN)

    @property
    def prompt_said(self) -> tuple[Side | None, str | None]:
        """Side and task that the request itself names."""
        side, task = JINA_TASKS.get(self.task or "", (None, self.task))
        return self.said("input_type") or side, task

    @property
    def truncation_said(self) -> Literal["none", "start", "end"] | None:
        """What the request itself says of too long texts; None: nothing."""
        said: Literal["none", "start", "end"] | None = self.said("truncate")
        if said is None and (other := getattr(self, "truncation", None)) is not None:
            return "end" if other else "none"
        return said

    @property
    def cuts_start(self) -> bool:
        """Whether the request wants the beginning cut where a text is cut at all, whoever says that it is."""
        return False


class _Input(TextOptions):
    input: Input = Field(
        description=f"Texts, or token ids of this model's own tokenizer; ids are embedded without template. {BAD_ITEMS}"
    )
    input_type: Literal["query", "document"] = "document"

    @property
    def is_token_ids(self) -> bool:
        """Whether the input came as token ids."""
        return not isinstance(self.input[0], str)

    @model_validator(mode="after")
    def _ids_have_no_prompt(self) -> "_Input":
        if self.is_token_ids and (self.task or self.instruction):
            given = "task" if self.task else "instruction"
            raise refuse(
                f"{given}: cannot be applied to token ids; send the text instead",
                param=given,
                code="prompt_for_token_ids",
            )
        return self


class EmbeddingsRequest(_Input):
    """``POST /v1/embeddings``, as OpenAI has it, plus input_type, task, instruction, truncate, contract_hash."""

    model: str = Field(min_length=1)
    encoding_format: Encoding = Field(
        default="float",
        description=(
            "float: a list of numbers; base64: of float32 in little-endian order, or of output_dtype; the others: as output_dtype."
        ),
    )
    output_dtype: VectorType | None = Field(
        default=None,
        description=(
            "Voyage's and Mistral's; null: as encoding_format. Where both name a type of numbers, this one holds. int8 and uint8 fill each vector's own range, its scale comes along. ubinary packs "
            "eight dimensions into a byte from the highest bit down, set where above 0; binary is that less 128."
        ),
    )
    dimensions: Count | None = Field(default=None, description="Only for models trained for it (Matryoshka).")
    output_dimension: Count | None = Field(
        default=None, description="Voyage's name of dimensions; where both are given, dimensions holds."
    )
    user: str | None = Field(default=None, description=_USER)
    truncate: TruncateField = Field(default="none", description=_TRUNCATE)
    truncation: bool | None = Field(default=None, description=_TRUNCATION)
    normalized: Literal[True] | None = Field(
        default=None,
        description="Jina's: unit length, also of a model whose vectors have not.",
        json_schema_extra={FOREIGN: True},
    )
    # Jina's, Voyage's, Infinity's and vLLM's, where they ask for what there is.
    late_chunking: Literal[False] | None = harmless("Jina")
    return_multivector: Literal[False] | None = harmless("Jina")
    embedding_type: Encoding | None = Field(
        default=None,
        description="Jina's name of encoding_format; where both are given, encoding_format holds.",
        json_schema_extra={FOREIGN: True},
    )
    encoding_type: Literal["float"] | None = harmless("LlamaIndex, to Jina")
    modality: Literal["text"] | None = harmless("Infinity")
    add_special_tokens: Literal[True] | None = harmless("vLLM")
    drop_params: bool | None = harmless("LiteLLM, sent by RAGFlow")
    priority: Integer | None = harmless("vLLM")

    @property
    def encoding(self) -> tuple[Encoding, bool]:
        """The type of the numbers, and whether they are sent as base64."""
        asked: Encoding = self.said("encoding_format") or self.embedding_type or "float"
        if self._names_the_type:
            return self.output_dtype or "float", asked == "base64"
        return asked, asked == "base64"

    @property
    def encoding_field(self) -> str:
        """The field that the type of the numbers came in."""
        if self._names_the_type:
            return "output_dtype"
        return "encoding_format" if self.said("encoding_format") else "embedding_type"

    @property
    def _names_the_type(self) -> bool:
        """Whether output_dtype decides; beside float, base64 is how float32 is sent."""
        asked = self.said("encoding_format") or self.embedding_type
        return self.output_dtype is not None and not (self.output_dtype == "float" and asked == "base64")


class RerankRequest(TextOptions):
    """``POST /v1/rerank``, as Cohere, Jina and Voyage have it; scored by the endpoint's reranker where one is served (0 to 1, its
    logit's sigmoid), else by the embedding model's similarity. The reranker reads bare texts: an instruction is refused.

    A document of nothing but white space ranks last, with the score -1, or the lowest of the others where that is lower.
    """

    usual_truncation: ClassVar[Literal["none", "start", "end"]] = "end"  # as Cohere's

    model: str = Field(min_length=1)
    query: Query
    documents: Documents = Field(
        description="A blank one ranks last. Half a surrogate pair is read as U+FFFD."
    )
    top_n: Count | None = Field(default=None, description="How many of the best come back; null: all.")
    top_k: Count | None = Field(
        default=None,
        description="Voyage's name of top_n; where both are given, top_n holds.",
    )
    rank_fields: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Which strings of a document that is an object are ranked, joined by a blank; null: its text.",
    )
    return_documents: bool = Field(
        default=False,
        description="Not at /rerank: Infinity wants a string there and vLLM an object, in answer to the same request.",
    )
    truncate: TruncateField = Field(default="end", description=f"{_TRUNCATE} Cohere's default cuts the end.")
    truncation: bool | None = Field(default=None, description=_TRUNCATION)
    user: str | None = Field(default=None, description=_USER)
    max_tokens_per_doc: Count | None = harmless("Cohere; the model's own limit cuts")
    max_chunks_per_doc: Count | None = harmless("Cohere")
    overlap_tokens: Integer | None = harmless("SiliconFlow")
    raw_scores: bool | None = harmless("Infinity, TEI; scores are similarities")
    priority: Integer | None = harmless("Cohere, vLLM")

    @property
    def texts(self) -> list[str]:
        """What is ranked of each document."""
        return document_texts(self.documents, self.rank_fields)

    @property
    def is_voyages(self) -> bool:
        """Whether only Voyage's client asks like this."""
        return self.top_k is not None or self.truncation is not None


class SimilarityRequest(TextOptions):
    """``POST /v1/similarity``: how similar each document is to the query, in the order given."""

    model: str = Field(min_length=1)
    query: Query
    documents: FullDocuments
    truncate: TruncateField = Field(default="none", description=_TRUNCATE)
    user: str | None = Field(default=None, description=_USER)

    @property
    def texts(self) -> list[str]:
        """The text of each document."""
        return document_texts(self.documents, None)


class TokenizeRequest(_Input):
    """``POST /tokenize``: the tokens that the same request to ``/v1/embeddings`` would be charged for."""

    model: str | None = Field(default=None, min_length=1)
    truncate: TruncateField = Field(
        default="none", description="none: nothing is cut here, and nothing refused."
    )


class SearchRequest(TextOptions):
    """``POST /v1/search``: the nearest documents of the served corpus."""

    model: str | None = Field(default=None, min_length=1)
    query: Query
    mode: SearchMode | None = Field(
        default=None,
        description=(
            "dense: by vectors. lexical: by words (BM25). hybrid: by both. Null: the endpoint's default; /v1/models lists what "
            "this corpus can."
        ),
    )
    top_k: Count = Field(default=10, le=MAX_TOP_K)
    truncate: TruncateField = Field(default="none", description=_TRUNCATE)
    return_documents: bool = Field(
        default=True, description="Whether titles, texts and where they come from come along."
    )
    rerank: bool = Field(
        default=False,
        description=(
            "Whether the endpoint's reranker orders the best documents anew; refused where none is served, or the corpus has no "
            "texts. Scores are then its own."
        ),
    )
    user: str | None = Field(default=None, description=_USER)


# What the endpoint answers with, as types for the OpenAPI document.


class Reply(BaseModel):
    """Closed, so that the OpenAPI document says all there is."""

    model_config = ConfigDict(extra="forbid")


class Embedding(Reply):
    """One vector of a reply."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[int] | str
    scale: float | None = Field(
        default=None,
        description="Of int8 and uint8: the vector is about scale times the numbers, of uint8 less 128. Absent otherwise.",
    )


class Usage(Reply):
    """Tokens the model computed, template and special tokens included."""

    prompt_tokens: int
    total_tokens: int
    truncated_items: int | None = Field(default=None, description="Inputs that were cut; only where any was.")


class EmbeddingsResponse(Reply):
    """Reply of ``POST /v1/embeddings``."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


ScoredBy = Literal["reranker", "embedding_similarity"]


class RerankDocument(BaseModel):
    """A document as the request has it, where ``return_documents`` asks for it; a string is its ``text``."""

    model_config = ConfigDict(extra="allow")

    text: str


class CohereVersion(Reply):
    """Cohere's: which of its interfaces this is."""

    version: str


class CohereMeta(Reply):
    """Cohere's: what it would bill, and warnings."""

    api_version: CohereVersion
    billed_units: dict[str, int]
    warnings: list[str] | None = Field(default=None, description="Only where something was cut.")


class RerankResult(Reply):
    """One document: its place in the request and its score."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankResponse(Reply):
    """Reply of ``POST /v1/rerank``, best first; equal scores keep the order of the request."""

    id: str
    object: Literal["list"] = "list"
    model: str
    scored_by: ScoredBy = Field(description="Who answered: a reranker, where one is served, or the vectors.")
    results: list[RerankResult]
    data: list[RerankResult] | None = Field(
        default=None, description="The results under Voyage's name, where top_k or truncation is given."
    )
    meta: CohereMeta
    usage: Usage


class SimilarityResponse(Reply):
    """Reply of ``POST /v1/similarity``: a score per document, in the order of the request."""

    object: Literal["list"] = "list"
    model: str
    similarities: list[float]
    usage: Usage


class TokenizedText(Reply):
    """Token ids of one input, and the most that the model takes."""

    index: int
    token_ids: list[int]
    count: int
    limit: int


class TokenizeResponse(Reply):
    """Reply of ``POST /tokenize``."""

    object: Literal["list"] = "list"
    data: list[TokenizedText]
    model: str
    total_tokens: int


class SearchHit(Reply):
    """One document of the corpus; null is what the endpoint does not know of it, or was not asked for."""

    id: str
    score: float = Field(
        description="dense: as /v1/similarity. lexical: BM25. hybrid: of the fusion; comparable within one answer only."
    )
    title: str | None = None
    text: str | None = None
    source: str | None = Field(
        default=None, description="Where it comes from: as the corpus states it, else file and row."
    )
    url: str | None = Field(default=None, description="The same as a link: http or https, or null.")
    chunk: int | None = Field(default=None, ge=1, description="Which piece of a document that was cut.")
    chunks: int | None = Field(default=None, ge=2, description="Pieces of that document.")


class SearchTiming(Reply):
    """Where the time of a search went."""

    embed_seconds: float
    search_seconds: float = Field(
        description="After the query was embedded; its words are looked up meanwhile."
    )
    rerank_seconds: float | None = Field(
        default=None, description="Only of a search that asks for the reranker."
    )


class SearchResponse(Reply):
    """Reply of ``POST /v1/search``, best first."""

    object: Literal["list"] = "list"
    model: str
    contract_hash: str
    mode: SearchMode = Field(description="Which mode answered.")
    scored_by: ScoredBy | None = Field(
        default=None, description="Only of a search that asks for the reranker."
    )
    results: list[SearchHit]
    timing: SearchTiming
    usage: Usage


class ErrorDetail(Reply):
    """What went wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Reply):
    """Every answer with a status of 400 or above."""

    error: ErrorDetail


class Lineage(Reply):
    """Where the model comes from: its artefact's identity and those of what it was made from."""

    kind: str
    fingerprint: str
    inputs: dict[str, str]
    created: str

    @classmethod
    def of(cls, model: ModelFolder) -> "Lineage | None":
        """Out of the model's manifest; None for a foreign model."""
        if model.artefact is None:
            return None
        found = model.artefact.manifest
        inputs = {name: str(value) for name, value in found["inputs"].items()}
        return cls(
            kind=found["kind"], fingerprint=found["fingerprint"], inputs=inputs, created=found["created"]
        )


class GateVerdict(Reply):
    """What the promotion gate said of this model."""

    verdict: str
    reasons: list[str] = []

    @classmethod
    def of(cls, model: ModelFolder, stated: str | None = None) -> "GateVerdict | None":
        """Out of the model's folder or the stated file; None where the gate did not run."""
        found = model.verdict(stated)
        if found is None:
            return None
        return cls(verdict=found["verdict"], reasons=[str(reason) for reason in found.get("reasons", ())])


class CorpusCard(Reply):
    """The corpus that ``/v1/search`` searches."""

    documents: int
    dimension: int
    index: str
    texts: bool
    modes: list[SearchMode] = ["dense"]
    mode: SearchMode = "dense"  # of requests that do not state one


class ModelDefaults(Reply):
    """What holds for requests to this name that do not say otherwise; null: as without the name."""

    input_type: Side | None
    task: str | None
    instruction: str | None
    truncate: Truncate | None


class TaskCard(Reply):
    """A prompt that the model was trained with; a request gets it by the task's name."""

    task_type: str
    instruction: str
    # Before the task's documents; null: the instruction where the task type is symmetric (STS), else nothing; "": nothing.
    document_instruction: str | None = None
    share: float | None = None  # of the queries trained
    default: bool  # whether naming the task type gives the same


class ModelCard(Reply):
    """One served model: what its vectors are, and what they may be compared with."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "embedloom"
    fingerprint: str
    contract_hash: str
    dimension: int
    matryoshka_dimensions: list[int]
    max_query_tokens: int
    max_document_tokens: int
    instructions: dict[str, str]
    tasks: dict[str, TaskCard] = {}
    default_task: str = USUAL_TASK  # what a text is taken for that comes without a task
    lineage: Lineage | None
    gate: GateVerdict | None
    corpus: CorpusCard | None
    reranker: str | None = Field(
        default=None, description="Identity of what answers /v1/rerank; null: similarity does."
    )
    alias_of: str | None = Field(
        default=None, description="The served name, where this is another name of it."
    )
    defaults: ModelDefaults | None = Field(default=None, description="Of such a name.")
    trust_remote_code: bool = Field(
        default=False,
        exclude_if=lambda value: value is False,
        description="Whether code that lies beside the weights computes the vectors; only where it does.",
    )


class ModelList(Reply):
    """Reply of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Reply):
    """Reply of ``GET /health``."""

    status: Literal["ok"] = "ok"


class Readiness(Reply):
    """Reply of ``GET /ready``."""

    status: Literal["ready"] = "ready"
    model: str
    contract_hash: str
    replicas: int  # encoders that are up; 0: the next request starts one


def cohere_meta(version: str, billed: dict[str, int], truncated: int) -> dict[str, Any]:
    """A ``CohereMeta`` as plain values."""
    meta: dict[str, Any] = {"api_version": {"version": version}, "billed_units": billed}
    return (
        meta | {"warnings": [f"{truncated} of the texts were cut to the model's limit"]}
        if truncated
        else meta
    )


def usage(tokens: int, truncated: int = 0) -> dict[str, int]:
    """A ``Usage`` as plain values."""
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return counts | {"truncated_items": truncated} if truncated else counts


def reply_body(
    encoded: Sequence[list[float] | list[int] | str],
    model: str,
    tokens: int,
    truncated: int = 0,
    scales: Sequence[float] | None = None,
) -> dict[str, Any]:
    """An ``EmbeddingsResponse`` as plain values: validating megabytes of our own floats only costs time."""
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(encoded)
    ]
    if scales is not None:
        data = [{**item, "scale": scale} for item, scale in zip(data, scales, strict=True)]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": usage(tokens, truncated),
    }
