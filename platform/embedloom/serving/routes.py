"""The handlers of OpenAI's routes, of tokenize, and of what operators ask: models, health, readiness, metrics."""

from typing import Any

from fastapi import Request, Response
from pydantic_core import to_json

from embedloom.serving.calls import CONTRACT_HEADER, Calls, pinned
from embedloom.serving.messages import EncodeJob, ModelInfo, Part
from embedloom.serving.metrics import CONTENT_TYPE
from embedloom.serving.page import page_reply
from embedloom.serving.refusals import ApiError
from embedloom.serving.replies import CorpusCard, ModelCard, reply_body
from embedloom.serving.schemas import EmbeddingsRequest, TokenizeRequest
from embedloom.serving.values import encode_vectors, shorten

READY_TIMEOUT_SECONDS = 5.0


class Routes:
    """The handlers of one endpoint that need nothing but its encoder."""

    def __init__(self, calls: Calls, corpus: CorpusCard | None = None) -> None:
        self._calls = calls
        self._corpus = corpus
        self._page = page_reply()

    async def embeddings(self, http: Request) -> Response:
        """Embed texts or token ids (OpenAI-compatible, plus input_type, task, instruction and truncate)."""
        calls = self._calls
        request = await calls.read(http, EmbeddingsRequest)
        calls.check_model(request.model)
        calls.check_sizes(request.input, "input")
        info = await calls.info()
        _check_dimensions(request, info)
        job = EncodeJob((_part(request),), request.truncate, pinned(http, request.contract_hash))
        result = await calls.encode(http, job)
        vectors = result.vectors
        if request.dimensions is not None:
            vectors = shorten(vectors, request.dimensions, info.normalize)
        body = reply_body(
            encode_vectors(vectors, request.encoding_format), calls.settings.served_name, result.tokens
        )
        return json_reply(body, headers={CONTRACT_HEADER: result.contract_hash})

    async def tokenize(self, http: Request) -> Response:
        """The token ids a text becomes, prompted as ``/v1/embeddings`` would, and the model's limit."""
        calls = self._calls
        request = await calls.read(http, TokenizeRequest)
        calls.check_model(request.model)
        calls.check_sizes(request.input, "input")
        info = await calls.info()
        limit = info.max_query_tokens if request.input_type == "query" else info.max_document_tokens
        job = EncodeJob((_part(request),), request.truncate, pinned(http, request.contract_hash))
        ids = await calls.tokenize(http, job)
        data = [
            {"index": index, "token_ids": item, "count": len(item), "limit": limit}
            for index, item in enumerate(ids)
        ]
        total = sum(map(len, ids))
        return json_reply(
            {"object": "list", "data": data, "model": calls.settings.served_name, "total_tokens": total}
        )

    async def models(self, _: Request) -> Response:
        """The served model: contract hash, fingerprint, lineage, the gate's verdict."""
        return json_reply({"object": "list", "data": [(await self._card()).model_dump()]})

    async def model(self, http: Request) -> Response:
        """One model by name."""
        self._calls.check_model(http.path_params["name"])
        return json_reply((await self._card()).model_dump())

    async def page(self, _: Request) -> Response:
        """The search page."""
        return self._page

    async def health(self, _: Request) -> Response:
        """Live: this process answers."""
        return json_reply({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Ready: an encoder answers."""
        try:
            info = await self._calls.ready(READY_TIMEOUT_SECONDS)
        except Exception as error:  # whatever is wrong with the encoder, the answer is "not ready"
            raise ApiError(503, "no encoder replica answers yet", code="not_ready") from error
        name = self._calls.settings.served_name
        return json_reply({"status": "ready", "model": name, "contract_hash": info.contract_hash})

    async def metrics(self, _: Request) -> Response:
        """Prometheus text."""
        return Response(self._calls.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _card(self) -> ModelCard:
        info, settings = await self._calls.info(), self._calls.settings
        return ModelCard(
            id=settings.served_name,
            created=settings.created,
            fingerprint=settings.fingerprint,
            contract_hash=info.contract_hash,
            dimension=info.dimension,
            matryoshka_dimensions=list(info.matryoshka_dimensions),
            max_query_tokens=info.max_query_tokens,
            max_document_tokens=info.max_document_tokens,
            instructions=info.instructions,
            lineage=settings.lineage,
            gate=settings.gate,
            corpus=self._corpus,
        )


def json_reply(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON reply by pydantic's own writer: several times faster on long lists of numbers than json's."""
    return Response(to_json(content), status, headers, media_type="application/json")


def _part(request: EmbeddingsRequest | TokenizeRequest) -> Part:
    texts: Any = None if request.is_token_ids else request.input
    ids: Any = request.input if request.is_token_ids else None
    return Part(request.input_type, texts, ids, request.task or "retrieval", request.instruction)


def _check_dimensions(request: EmbeddingsRequest, info: ModelInfo) -> None:
    allowed = sorted({*info.matryoshka_dimensions, info.dimension})
    if request.dimensions is not None and request.dimensions not in allowed:
        trained = "" if info.matryoshka_dimensions else " (the model was not trained for shorter ones)"
        raise ApiError(
            400,
            f"dimensions: {request.dimensions!s:.40} is not available; "
            f"allowed: {', '.join(map(str, allowed))}{trained}",
            param="dimensions",
            code="dimensions_not_available",
        )
