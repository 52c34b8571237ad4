"""The handlers: embeddings, tokenize, rerank, similarity, search, and what operators ask (models, health, metrics, the page)."""

import base64
import hashlib
import re
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request, Response
from pydantic_core import to_json

from embedloom.config.serving import SearchMode
from embedloom.core.prompting import document_text
from embedloom.retrieval.stored import shorten, unit_length
from embedloom.serving.calls import Calls, Terms, alias_of, notes_of, pinned, terms_of
from embedloom.serving.encodings import check_packable, encoded
from embedloom.serving.front import facts_of
from embedloom.serving.messages import EncodeResult, ModelInfo, Part, Vectors
from embedloom.serving.metrics import CONTENT_TYPE
from embedloom.serving.refusals import ApiError
from embedloom.serving.schemas import (
    CorpusCard,
    EmbeddingsRequest,
    ModelCard,
    ModelDefaults,
    RerankRequest,
    ScoredBy,
    SearchHit,
    SearchRequest,
    SimilarityRequest,
    TaskCard,
    TextOptions,
    TokenizeRequest,
    cohere_meta,
    is_blank,
    reply_body,
    usage,
)
from embedloom.serving.searching import Lookup

# The page at ``/``: one file without outside assets, sent with a policy that lets nothing else run or load.


_PAGE = Path(__file__).with_name("page.html")


def page_reply() -> Response:
    """The page and its headers."""
    text = _PAGE.read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of('script', text)}",
            f"style-src {_hash_of('style', text)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(text, headers=headers, media_type="text/html; charset=utf-8")


def _hash_of(tag: str, text: str) -> str:
    """The CSP source of the page's one inline element of this kind."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    if len(found) != 1:
        raise RuntimeError(f"{_PAGE.name}: {len(found)} inline {tag} elements, the policy knows one")
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()}'"


# Vectors as requests want them: shortened, of unit length, and compared.


def finished(vectors: Vectors, dimension: int | None, normalized: bool | None, normalize: bool) -> Vectors:
    """Vectors [n, d] as a request wants them: shortened, and of unit length where it or the model says so."""
    if dimension is not None and dimension < vectors.shape[1]:
        return shorten(vectors, dimension, normalize or bool(normalized))
    if normalized and not normalize:
        return unit_length(vectors)
    return vectors


def similarities(query: Vectors, documents: Vectors, normalize: bool) -> Vectors:
    """Cosines of models that normalise, inner products of others: float32 [n].

    Summed in float64 without BLAS, so that a pair scores alike in whatever company it is asked about.

    Args:
        query: float32 [dimension].
        documents: float32 [n, dimension].
        normalize: whether the model's vectors have unit length; their scores then stay within [-1, 1].
    """
    products = np.einsum("nd,d->n", documents.astype(np.float64), query.astype(np.float64), optimize=False)
    return np.asarray(np.clip(products, -1, 1) if normalize else products, dtype=np.float32)


def sigmoid(logits: Vectors) -> Vectors:
    """Logits as scores from 0 to 1, float32; the order of any two different ones within 16 of 0 stays."""
    return np.asarray(1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -500, 500))), dtype=np.float32)


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
        encoding, as_base64 = request.encoding
        check_packable(vectors.shape[1], {encoding}, request.encoding_field)
        values, scales = encoded(vectors, encoding, as_base64)
        model = terms_of(request, calls.settings).model
        body = reply_body(values, model, result.tokens, result.truncated, scales)
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
        return json_reply({"object": "list", "data": [card.model_dump() for card in await self.cards()]})

    async def cards(self) -> list[ModelCard]:
        """One of the served model and one of each other name of it."""
        return [await self._card(name) for name in self._calls.settings.names]

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
        return json_reply(await self.readiness(READY_TIMEOUT_SECONDS))

    async def readiness(self, seconds: float) -> dict[str, Any]:
        """A ``Readiness`` as plain values.

        Raises:
            ApiError: 503, no encoder answers within so many seconds.
        """
        try:
            found = await self._calls.ready(seconds)
        except Exception as error:  # whatever is wrong with the encoder, the answer is "not ready"
            raise ApiError(503, "no encoder replica answers yet", code="not_ready") from error
        if found is None:
            raise ApiError(503, "no encoder replica is up", code="not_ready")
        info, replicas = found
        name = self._calls.settings.served_name
        return {"status": "ready", "model": name, "contract_hash": info.contract_hash, "replicas": replicas}

    async def metrics(self, _: Request) -> Response:
        """Prometheus text."""
        return Response(await self._calls.metrics.page(), headers={"content-type": CONTENT_TYPE})

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
            reranker=settings.reranker,
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


# The handlers that compare a query with documents: rerank, similarity, and search of the served corpus.


def searched_by(asked: SearchMode | None, card: CorpusCard) -> SearchMode:
    """The mode that a search is answered in.

    Raises:
        ApiError: 400, one that this corpus was not embedded for.
    """
    mode = asked or card.mode
    if mode not in card.modes:
        raise ApiError(
            400,
            f"mode: {mode!r} needs an index of words, which this corpus was embedded without; allowed here: "
            f"{', '.join(card.modes)}; `embedloom embed ... --lexical` adds the index and keeps the vectors",
            param="mode",
            code="mode_not_available",
        )
    return mode


# The least that a cosine can be.
_BLANK_SCORE = -1.0
# What a hit has only where documents are to be returned.
_TEXTS = ("title", "text", "source", "url", "chunk", "chunks")


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents best first, the score of each in the order of the request, and what it cost."""

    best: list[int]
    scores: Vectors
    result: EncodeResult


class RankRoutes:
    """The handlers of one endpoint that rank documents."""

    def __init__(self, calls: Calls, corpus: Lookup | None = None) -> None:
        self._calls = calls
        self._corpus = corpus

    async def rerank(self, http: Request) -> Response:
        """Order documents by the reranker, or else by their similarity to a query (Cohere's, Jina's and Voyage's shape)."""
        request = await self._calls.read(http, RerankRequest)
        return await self.ranked(http, request, request.return_documents)

    async def ranked(self, http: Request, request: RerankRequest, with_documents: bool) -> Response:
        """The answer to what was read."""
        terms = self.rank_terms(request)
        ranking = await self.ranking(
            http, terms, request.query, request.texts, "documents", request.contract_hash
        )
        results: list[dict[str, Any]] = []
        for index in ranking.best[: request.top_n or request.top_k]:
            entry: dict[str, Any] = {"index": index, "relevance_score": float(ranking.scores[index])}
            if with_documents:
                document = request.documents[index]
                entry["document"] = {"text": document} if isinstance(document, str) else document
            results.append(entry)
        version = "2" if http.url.path.endswith("/v2/rerank") else "1"
        body = {
            "id": uuid.uuid4().hex,
            "object": "list",
            "model": terms.model,
            "scored_by": self._scored_by,
            "results": results,
            "meta": cohere_meta(version, {"search_units": 1}, ranking.result.truncated),
            "usage": usage(ranking.result.tokens, ranking.result.truncated),
        }
        if request.is_voyages:
            body["data"] = results
        return json_reply(body, headers=notes_of(ranking.result))

    @property
    def _scored_by(self) -> ScoredBy:
        return "reranker" if self._calls.reranks else "embedding_similarity"

    def rank_terms(self, request: TextOptions) -> Terms:
        """The terms of a request to rank.

        Raises:
            ApiError: 400, an instruction for a reranker, which reads none.
        """
        if self._calls.reranks and getattr(request, "instruction", None) is not None:
            raise ApiError(
                400,
                "instruction: the reranker of this endpoint reads query and documents bare; leave it out",
                param="instruction",
                code="instruction_not_read",
            )
        return terms_of(request, self._calls.settings)

    async def similarity(self, http: Request) -> Response:
        """How similar each document is to a query; send task "sts" for texts that play the same part."""
        request = await self._calls.read(http, SimilarityRequest)
        terms = terms_of(request, self._calls.settings)
        scores, result = await self._scores(
            http, terms, request.query, request.texts, "documents", request.contract_hash
        )
        body = {
            "object": "list",
            "model": terms.model,
            "similarities": scores.tolist(),
            "usage": usage(result.tokens, result.truncated),
        }
        return json_reply(body, headers=notes_of(result))

    async def search(self, http: Request) -> Response:
        """The documents of the served corpus that fit a query best: by vectors, by words, or by both."""
        calls, corpus = self._calls, self._corpus
        if corpus is None:
            raise RuntimeError("/v1/search is routed without a corpus")
        request = await calls.read(http, SearchRequest)
        terms = terms_of(request, calls.settings)
        calls.check_sizes([request.query], "query", is_list=False)
        mode = searched_by(request.mode, corpus.card)
        count, with_texts = self._wanted(corpus, request)
        result: EncodeResult | None = None
        started = embedded = time.perf_counter()
        if mode == "lexical":
            found = corpus.search(None, count, with_texts, corpus.words(request.query))
            hits = await calls.look_up(http, [request.query], found)
        else:
            pin = pinned(http, request.contract_hash) or corpus.contract_hash
            query = terms.texts([request.query], "query", "query", is_list=False)
            # The fingerprint too: in a redeploy, the new model's vectors must not meet the old model's index.
            job = terms.job(query, contract_hash=pin, fingerprint=calls.settings.fingerprint)
            words = corpus.words(request.query) if mode == "hybrid" else None
            result = await calls.encode(http, job)
            embedded = time.perf_counter()
            hits = await calls.within_time(corpus.search(result.vectors[0], count, with_texts, words))
        searched = time.perf_counter()
        calls.metrics.searched(searched - embedded)
        if (trace := facts_of(http.scope).trace) is not None:
            trace.step("search", searched - embedded)
        timing = {"embed_seconds": embedded - started, "search_seconds": searched - embedded}
        costs = [] if result is None else [result]
        extra: dict[str, Any] = {}
        if request.rerank:
            hits, reranked = await self._reordered(http, terms, request, hits)
            timing["rerank_seconds"] = time.perf_counter() - searched
            costs += [] if reranked is None else [reranked]
            extra = {"scored_by": self._scored_by}
        body = {
            "object": "list",
            "model": terms.model,
            "contract_hash": corpus.contract_hash if result is None else result.contract_hash,
            "mode": mode,
            **extra,
            "results": [hit.model_dump() for hit in hits],
            "timing": timing,
            "usage": usage(sum(one.tokens for one in costs), sum(one.truncated for one in costs)),
        }
        return json_reply(body, headers=None if result is None else notes_of(result))

    def _wanted(self, corpus: Lookup, request: SearchRequest) -> tuple[int, bool]:
        """How many documents a search looks for, and whether their texts are needed.

        Raises:
            ApiError: 400, it asks for a reranker that is not there, or that has no texts to read.
        """
        if not request.rerank:
            return request.top_k, request.return_documents
        problem = None
        if not self._calls.reranks:
            problem = "this endpoint serves no reranker (serving.reranker)"
        elif not corpus.card.texts:
            problem = "the texts of this corpus are not at hand (serving.documents)"
        if problem is not None:
            raise ApiError(
                400, f"rerank: {problem}; allowed: false", param="rerank", code="rerank_not_available"
            )
        return max(request.top_k, self._calls.settings.rerank_top), True

    async def _reordered(
        self, http: Request, terms: Terms, request: SearchRequest, hits: list[SearchHit]
    ) -> tuple[list[SearchHit], EncodeResult | None]:
        """The best of the hits by the reranker, with its scores, and what it cost; one whose text is gone comes last."""
        read = [hit for hit in hits if not is_blank(hit.text or "")]
        result, scores = None, np.zeros(0, dtype=np.float32)
        if read:
            texts = [document_text(hit.title, hit.text or "") for hit in read]
            parts = (Part("query", [request.query], name="query", is_list=False), Part("document", texts))
            # Documents of the corpus were cut when they were embedded, too: no client can shorten them.
            result = await self._calls.rerank(http, replace(terms.job(*parts), truncate="end"))
            scores = sigmoid(result.vectors[:, 0])
        order = np.argsort(-scores, kind="stable").tolist()
        best = [(read[at], float(scores[at])) for at in order]
        best += [(hit, 0.0) for hit in hits if is_blank(hit.text or "")]
        hidden = {} if request.return_documents else dict.fromkeys(_TEXTS)
        return [
            hit.model_copy(update={"score": score, **hidden}) for hit, score in best[: request.top_k]
        ], result

    async def ranking(
        self, http: Request, terms: Terms, query: str, texts: list[str], field: str, pin: str | None = None
    ) -> Ranking:
        """Documents by their similarity to a query; those of nothing but white space are not embedded and come last.

        Args:
            http: the request.
            terms: its terms.
            query: its query.
            texts: its documents.
            field: where they came in.
            pin: the contract hash it is pinned to.
        """
        self._calls.check_sizes(texts, field)
        places = [index for index, text in enumerate(texts) if not is_blank(text)]
        score = self._relevances if self._calls.reranks and places else self._scores
        own, result = await score(http, terms, query, [texts[index] for index in places], field, pin, places)
        least = 0.0 if self._calls.reranks else _BLANK_SCORE
        scores = np.full(len(texts), min([least, *own.tolist()]), dtype=np.float32)
        scores[places] = own
        # Stable, so equal scores keep the order of the request; a blank one comes after any that scores as little.
        blank = np.ones(len(texts), dtype=bool)
        blank[places] = False
        return Ranking(np.lexsort((-scores, blank)).tolist(), scores, result)

    async def _relevances(
        self,
        http: Request,
        terms: Terms,
        query: str,
        texts: list[str],
        field: str,
        pin: str | None,
        places: list[int] | None = None,
    ) -> tuple[Vectors, EncodeResult]:
        """What the reranker says of each text, float32 [texts] from 0 to 1, and what it cost."""
        calls = self._calls
        calls.check_sizes([query], "query", is_list=False)
        calls.check_sizes(texts, field)
        asked = Part("query", [query], name="query", is_list=False)
        # Once each, so that equal documents have equal scores, whatever company their pairs are computed in.
        first = {text: at for at, text in reversed(list(enumerate(texts)))}
        distinct = sorted(first.values())
        standing = [at if places is None else places[at] for at in distinct]
        documents = Part("document", [texts[at] for at in distinct], name=field, places=standing)
        result = await calls.rerank(http, terms.job(asked, documents, contract_hash=pinned(http, pin)))
        scores = dict(zip(documents.texts or (), sigmoid(result.vectors[:, 0]), strict=True))
        return np.array([scores[text] for text in texts], dtype=np.float32), result

    async def _scores(
        self,
        http: Request,
        terms: Terms,
        query: str,
        texts: list[str],
        field: str,
        pin: str | None,
        places: list[int] | None = None,
    ) -> tuple[Vectors, EncodeResult]:
        """Similarity of each text to the query, float32 [texts], and what it cost."""
        calls = self._calls
        calls.check_sizes([query], "query", is_list=False)
        calls.check_sizes(texts, field)
        info = await calls.info()
        parts = [terms.texts([query], "query", "query", is_list=False)]
        if texts:
            parts.append(replace(terms.texts(texts, "document", field), places=places))
        result = await calls.encode(http, terms.job(*parts, contract_hash=pinned(http, pin)))
        return similarities(result.vectors[0], result.vectors[1:], info.normalize), result
