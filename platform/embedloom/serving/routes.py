"""The handlers of OpenAI's routes, of tokenize, and of what operators ask: models, health, readiness, metrics."""

from typing import Any

from fastapi import Request, Response
from pydantic_core import to_json

from embedloom.serving.aliases import Terms, alias_of, terms_of
from embedloom.serving.calls import Calls, notes_of, pinned
from embedloom.serving.messages import EncodeResult, ModelInfo, Part, Vectors
from embedloom.serving.metrics import CONTENT_TYPE
from embedloom.serving.page import page_reply
from embedloom.serving.refusals import ApiError
from embedloom.serving.replies import CorpusCard, ModelCard, ModelDefaults, TaskCard, reply_body
from embedloom.serving.schemas import EmbeddingsRequest, TextOptions, TokenizeRequest
from embedloom.serving.values import encode_vectors, finished

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
        dimensions = request.dimensions or request.output_dimension
        vectors, result = await embedded(
            calls, http, request, "input", "dimensions", dimensions, request.normalized
        )
        encoded = encode_vectors(
            vectors, request.said("encoding_format") or request.embedding_type or "float"
        )
        model = terms_of(request, calls.settings).model
        body = reply_body(encoded, model, result.tokens, result.truncated)
        return json_reply(body, headers=notes_of(result))

    async def tokenize(self, http: Request) -> Response:
        """The token ids a text becomes, prompted as ``/v1/embeddings`` would, and the model's limit."""
        return await self.tokenized(http, await self._calls.read(http, TokenizeRequest))

    async def tokenized(self, http: Request, request: TokenizeRequest) -> Response:
        """The answer to what was read."""
        calls = self._calls
        terms = terms_of(request, calls.settings)
        calls.check_sizes(request.input, "input")
        info = await calls.info()
        limit = info.max_query_tokens if terms.side == "query" else info.max_document_tokens
        job = terms.job(_part(request, terms, "input"), contract_hash=pinned(http, request.contract_hash))
        result = await calls.tokenize(http, job)
        data = [
            {"index": index, "token_ids": item, "count": len(item), "limit": limit}
            for index, item in enumerate(result.ids)
        ]
        body = {
            "object": "list",
            "data": data,
            "model": terms.model,
            "total_tokens": sum(map(len, result.ids)),
        }
        return json_reply(body, headers=notes_of(result))

    async def models(self, _: Request) -> Response:
        """The served model and its other names: contract hash, fingerprint, lineage, the gate's verdict."""
        settings = self._calls.settings
        cards = [await self._card(name) for name in (settings.served_name, *settings.models)]
        return json_reply({"object": "list", "data": [card.model_dump() for card in cards]})

    async def model(self, http: Request) -> Response:
        """One model by name."""
        return json_reply((await self._card(http.path_params["name"])).model_dump())

    async def page(self, _: Request) -> Response:
        """The search page."""
        return self._page

    async def health(self, _: Request) -> Response:
        """Live: this process answers."""
        return json_reply({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Ready: an encoder is up, or will be for the next request (``replicas`` 0)."""
        try:
            found = await self._calls.ready(READY_TIMEOUT_SECONDS)
        except Exception as error:  # whatever is wrong with the encoder, the answer is "not ready"
            raise ApiError(503, "no encoder replica answers yet", code="not_ready") from error
        if found is None:
            raise ApiError(503, "no encoder replica is up", code="not_ready")
        info, replicas = found
        name = self._calls.settings.served_name
        return json_reply(
            {"status": "ready", "model": name, "contract_hash": info.contract_hash, "replicas": replicas}
        )

    async def metrics(self, _: Request) -> Response:
        """Prometheus text."""
        return Response(self._calls.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _card(self, name: str) -> ModelCard:
        settings = self._calls.settings
        alias = alias_of(name, settings)
        info, is_alias = await self._calls.info(), name != settings.served_name
        defaults = ModelDefaults(
            input_type=alias.side, task=alias.task, instruction=alias.instruction, truncate=alias.truncate
        )
        return ModelCard(
            id=name,
            alias_of=settings.served_name if is_alias else None,
            defaults=defaults if is_alias else None,
            created=settings.created,
            fingerprint=settings.fingerprint,
            contract_hash=info.contract_hash,
            dimension=info.dimension,
            matryoshka_dimensions=list(info.matryoshka_dimensions),
            max_query_tokens=info.max_query_tokens,
            max_document_tokens=info.max_document_tokens,
            instructions=info.instructions,
            tasks={name: TaskCard.model_validate(task) for name, task in info.tasks.items()},
            default_task=info.default_task,
            lineage=settings.lineage,
            gate=settings.gate,
            corpus=self._corpus,
            trust_remote_code=settings.trust_remote_code,
        )


def json_reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON reply by pydantic's own writer: several times faster on long lists of numbers than json's."""
    return Response(to_json(content), status, headers, media_type="application/json")


async def embedded(
    calls: Calls,
    http: Request,
    request: TextOptions,
    field: str,
    dimensions_field: str,
    dimensions: int | None,
    normalized: bool | None,
) -> tuple[Vectors, EncodeResult]:
    """Embed the items of a request in any dialect: vectors float32 [items, dimensions], and what they cost.

    Args:
        calls: the encoder.
        http: the request.
        request: what was read of it.
        field: of its items.
        dimensions_field: where it says how long the vectors are to be.
        dimensions: how long; None: as the model has them.
        normalized: whether it wants unit length; None: as the model has them.

    Raises:
        ApiError: too many or too long items, dimensions the model was not trained for, or no answer.
    """
    terms = terms_of(request, calls.settings)
    calls.check_sizes(getattr(request, field), field)
    info = await calls.info()
    check_dimensions(dimensions, info, dimensions_field)
    job = terms.job(_part(request, terms, field), contract_hash=pinned(http, request.contract_hash))
    result = await calls.encode(http, job)
    return finished(result.vectors, dimensions, normalized, info.normalize), result


def _part(request: TextOptions, terms: Terms, field: str) -> Part:
    items: Any = getattr(request, field)
    return terms.texts(items, terms.side, field) if isinstance(items[0], str) else terms.ids(items, field)


def check_dimensions(dimensions: int | None, info: ModelInfo, field: str) -> None:
    """Refuse a length of vectors that the model was not trained for.

    Raises:
        ApiError: 400, naming the field and the lengths there are.
    """
    allowed = sorted({*info.matryoshka_dimensions, info.dimension})
    if dimensions is not None and dimensions not in allowed:
        trained = "" if info.matryoshka_dimensions else " (the model was not trained for shorter ones)"
        raise ApiError(
            400,
            f"{field}: {dimensions!s:.40} is not available; allowed: {', '.join(map(str, allowed))}{trained}",
            param=field,
            code="dimensions_not_available",
        )
