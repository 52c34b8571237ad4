"""The requests as types: OpenAI's embeddings, Cohere's rerank, and our own similarity, tokenize and search.

Kept apart from routes and Ray, so every rule can be tested as a function.
"""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.serving.fields import (
    ClosedRequest,
    Count,
    Documents,
    Input,
    Instruction,
    Pin,
    Query,
    Task,
    Truncate,
    refuse,
)

_TASK = "Task type; decides the default instruction."
_INSTRUCTION = "Replaces the task type's instruction."
_PIN = "Hash of the prompt contract the vectors must be of; another model answers 409."
_TRUNCATE = "Too long a text: none refuses it, start cuts its beginning, end cuts its end."
_USER = "Taken and not used: who asks is no business of the endpoint."
MAX_TOP_K = 1000


class TextOptions(ClosedRequest):
    """What every request may say of how its texts become model text."""

    task: Task | None = Field(default=None, description=_TASK)
    instruction: Instruction | None = Field(default=None, description=_INSTRUCTION)
    contract_hash: Pin | None = Field(default=None, description=_PIN)


class _Input(TextOptions):
    input: Input = Field(
        description="Texts, or token ids of this model's own tokenizer; ids are embedded without template."
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
    user: str | None = Field(default=None, description=_USER)
    truncate: Truncate = Field(default="none", description=_TRUNCATE)


class RerankRequest(TextOptions):
    """``POST /v1/rerank``, as Cohere has it; scored by the embedding model's similarity, no cross-encoder."""

    model: str = Field(min_length=1)
    query: Query
    documents: Documents
    top_n: Count | None = Field(default=None, description="How many of the best come back; null: all.")
    return_documents: bool = False
    truncate: Truncate = Field(default="end", description=f"{_TRUNCATE} Cohere's default cuts the end.")
    user: str | None = Field(default=None, description=_USER)


class SimilarityRequest(TextOptions):
    """``POST /v1/similarity``: how similar each document is to the query, in the order given."""

    model: str = Field(min_length=1)
    query: Query
    documents: Documents
    truncate: Truncate = Field(default="none", description=_TRUNCATE)
    user: str | None = Field(default=None, description=_USER)


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
