"""Cohere's embed, versions 1 and 2: its requests, its replies, its handler. Its rerank is rank_routes.py's own shape."""

import uuid
from typing import Any, ClassVar, Literal

from fastapi import Request, Response
from pydantic import Field

from embedloom.instructions import Side
from embedloom.serving.calls import Calls, notes_of
from embedloom.serving.fields import Count, Integer, Texts, Truncate, harmless
from embedloom.serving.replies import CohereMeta, Reply, cohere_meta
from embedloom.serving.routes import embedded, json_reply
from embedloom.serving.schemas import BAD_ITEMS, TextOptions
from embedloom.serving.values import encode_vectors

# What Cohere calls an input, as side and task type.
_INPUT_TYPES: dict[str, tuple[Side, str | None]] = {
    "search_query": ("query", None),
    "search_document": ("document", None),
    "classification": ("document", "classification"),
    "clustering": ("document", "clustering"),
}


class CohereEmbedRequest(TextOptions):
    """``POST /v1/embed`` and ``/v2/embed``, as Cohere has them."""

    usual_truncation: ClassVar[Literal["none", "start", "end"]] = "end"  # as Cohere's
    mark: ClassVar[str] = "texts"

    model: str = Field(min_length=1)
    texts: Texts = Field(description=BAD_ITEMS)
    input_type: Literal["search_query", "search_document", "classification", "clustering"] | None = Field(
        default=None, description="Null: the side and task of the model name, else a document."
    )
    embedding_types: list[Literal["float", "base64"]] | None = Field(
        default=None, min_length=1, description="Null: numbers. Quantised forms are not offered."
    )
    output_dimension: Count | None = Field(
        default=None, description="Only for models trained for it (Matryoshka)."
    )
    truncate: Truncate = Field(default="end", description="Not given: as for /v1/rerank.")
    max_tokens: Count | None = harmless("Cohere; the model's own limit cuts")
    priority: Integer | None = harmless("Cohere")

    @property
    def prompt_said(self) -> tuple[Side | None, str | None]:
        """Side and task that the request itself names."""
        side, task = _INPUT_TYPES.get(self.input_type or "", (None, None))
        other_side, other_task = super().prompt_said
        return side or other_side, other_task or task


class CohereEmbedResponse(Reply):
    """Reply of Cohere's embed: plain lists of numbers in version 1 where no types are asked for, else one list a type."""

    id: str
    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    embeddings: list[list[float]] | dict[Literal["float", "base64"], list[list[float]] | list[str]]
    texts: list[str]
    meta: CohereMeta


class CohereRoutes:
    """Cohere's handlers over one endpoint's encoder."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def cohere_embed(self, http: Request) -> Response:
        """Embed texts (Cohere's shape); input_type search_query is our query side."""
        return await self.answer(http, await self._calls.read(http, CohereEmbedRequest))

    async def answer(self, http: Request, request: CohereEmbedRequest) -> Response:
        """Embed what was read, in the version that the path names."""
        dimension = request.output_dimension
        vectors, result = await embedded(
            self._calls, http, request, "texts", "output_dimension", dimension, None
        )
        version = "2" if http.url.path.endswith("/v2/embed") else "1"
        by_type = request.embedding_types is not None or version == "2"
        kinds: list[Literal["float", "base64"]] = request.embedding_types or ["float"]
        embeddings: Any = {kind: encode_vectors(vectors, kind) for kind in kinds}
        body = {
            "id": uuid.uuid4().hex,
            "response_type": "embeddings_by_type" if by_type else "embeddings_floats",
            "embeddings": embeddings if by_type else embeddings["float"],
            "texts": request.texts,
            "meta": cohere_meta(version, {"input_tokens": result.tokens}, result.truncated),
        }
        return json_reply(body, headers=notes_of(result))
