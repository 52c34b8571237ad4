"""What the endpoint answers with, as types for the OpenAPI document."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from embedloom.config.serving import Truncate
from embedloom.instructions import USUAL_TASK, Side
from embedloom.model_folder import ModelFolder


class Reply(BaseModel):
    """Closed, so that the OpenAPI document says all there is."""

    model_config = ConfigDict(extra="forbid")


class Embedding(Reply):
    """One vector of a reply."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


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
    scored_by: Literal["embedding_similarity"] = "embedding_similarity"
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
    score: float
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
    search_seconds: float


class SearchResponse(Reply):
    """Reply of ``POST /v1/search``, best first."""

    object: Literal["list"] = "list"
    model: str
    contract_hash: str
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
    encoded: Sequence[list[float] | str], model: str, tokens: int, truncated: int = 0
) -> dict[str, Any]:
    """An ``EmbeddingsResponse`` as plain values: validating megabytes of our own floats only costs time."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(encoded)
        ],
        "model": model,
        "usage": usage(tokens, truncated),
    }
