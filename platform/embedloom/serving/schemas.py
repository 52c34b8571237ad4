"""The requests as types: OpenAI's embeddings, Cohere's rerank, and our own similarity, tokenize and search.

Kept apart from routes and Ray, so every rule can be tested as a function.
"""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from embedloom.instructions import Side
from embedloom.serving.fields import (
    FOREIGN,
    JINA_TASKS,
    ClosedRequest,
    Count,
    Documents,
    FullDocuments,
    Input,
    Instruction,
    Integer,
    Pin,
    Query,
    Task,
    Truncate,
    document_texts,
    harmless,
    refuse,
)

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
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = Field(default=None, description="Only for models trained for it (Matryoshka).")
    output_dimension: Count | None = Field(
        default=None, description="Voyage's name of dimensions; where both are given, dimensions holds."
    )
    user: str | None = Field(default=None, description=_USER)
    truncate: Truncate = Field(default="none", description=_TRUNCATE)
    truncation: bool | None = Field(default=None, description=_TRUNCATION)
    normalized: Literal[True] | None = Field(
        default=None,
        description="Jina's: unit length, also of a model whose vectors have not.",
        json_schema_extra={FOREIGN: True},
    )
    # Jina's, Voyage's, Infinity's and vLLM's, where they ask for what there is.
    late_chunking: Literal[False] | None = harmless("Jina")
    return_multivector: Literal[False] | None = harmless("Jina")
    embedding_type: Literal["float", "base64"] | None = Field(
        default=None,
        description="Jina's name of encoding_format; where both are given, encoding_format holds.",
        json_schema_extra={FOREIGN: True},
    )
    encoding_type: Literal["float"] | None = harmless("LlamaIndex, to Jina")
    output_dtype: Literal["float"] | None = harmless("Voyage, Mistral")
    modality: Literal["text"] | None = harmless("Infinity")
    add_special_tokens: Literal[True] | None = harmless("vLLM")
    drop_params: bool | None = harmless("LiteLLM, sent by RAGFlow")
    priority: Integer | None = harmless("vLLM")


class RerankRequest(TextOptions):
    """``POST /v1/rerank``, as Cohere, Jina and Voyage have it; scored by the embedding model's similarity.

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
    truncate: Truncate = Field(default="end", description=f"{_TRUNCATE} Cohere's default cuts the end.")
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
    truncate: Truncate = Field(default="none", description=_TRUNCATE)
    user: str | None = Field(default=None, description=_USER)

    @property
    def texts(self) -> list[str]:
        """The text of each document."""
        return document_texts(self.documents, None)


class TokenizeRequest(_Input):
    """``POST /tokenize``: the tokens that the same request to ``/v1/embeddings`` would be charged for."""

    model: str | None = Field(default=None, min_length=1)
    truncate: Truncate = Field(default="none", description="none: nothing is cut here, and nothing refused.")


class SearchRequest(TextOptions):
    """``POST /v1/search``: the nearest documents of the served corpus."""

    model: str | None = Field(default=None, min_length=1)
    query: Query
    top_k: Count = Field(default=10, le=MAX_TOP_K)
    truncate: Truncate = Field(default="none", description=_TRUNCATE)
    return_documents: bool = Field(
        default=True, description="Whether titles, texts and where they come from come along."
    )
    user: str | None = Field(default=None, description=_USER)
