"""The handlers that compare a query with documents: rerank, similarity, and search of the served corpus."""

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from fastapi import Request, Response

from embedloom.serving.aliases import Terms, terms_of
from embedloom.serving.calls import Calls, notes_of, pinned
from embedloom.serving.fields import is_blank
from embedloom.serving.messages import EncodeResult, Vectors
from embedloom.serving.replies import CorpusCard, SearchHit, cohere_meta, usage
from embedloom.serving.routes import json_reply
from embedloom.serving.schemas import RerankRequest, SearchRequest, SimilarityRequest
from embedloom.serving.values import similarities

# The least that a cosine can be.
_BLANK_SCORE = -1.0


class Corpus(Protocol):
    """Embedded documents that can be searched."""

    card: CorpusCard
    contract_hash: str

    def search(self, query: Vectors, count: int, with_texts: bool) -> list[SearchHit]:
        """The nearest documents of a query vector [dimension], best first."""
        ...


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents best first, the score of each in the order of the request, and what it cost."""

    best: list[int]
    scores: Vectors
    result: EncodeResult


class RankRoutes:
    """The handlers of one endpoint that rank documents."""

    def __init__(self, calls: Calls, corpus: Corpus | None = None) -> None:
        self._calls = calls
        self._corpus = corpus
        self._search_thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    async def rerank(self, http: Request) -> Response:
        """Order documents by their similarity to a query (Cohere's, Jina's and Voyage's shape; no cross-encoder)."""
        request = await self._calls.read(http, RerankRequest)
        return await self.ranked(http, request, request.return_documents)

    async def ranked(self, http: Request, request: RerankRequest, with_documents: bool) -> Response:
        """The answer to what was read."""
        terms = terms_of(request, self._calls.settings)
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
            "scored_by": "embedding_similarity",
            "results": results,
            "meta": cohere_meta(version, {"search_units": 1}, ranking.result.truncated),
            "usage": usage(ranking.result.tokens, ranking.result.truncated),
        }
        if request.is_voyages:
            body["data"] = results
        return json_reply(body, headers=notes_of(ranking.result))

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
        """The documents of the served corpus nearest to a query."""
        calls, corpus = self._calls, self._corpus
        if corpus is None:
            raise RuntimeError("/v1/search is routed without a corpus")
        request = await calls.read(http, SearchRequest)
        terms = terms_of(request, calls.settings)
        calls.check_sizes([request.query], "query", is_list=False)
        pin = pinned(http, request.contract_hash) or corpus.contract_hash
        query = terms.texts([request.query], "query", "query", is_list=False)
        # The fingerprint too: in a redeploy, the new model's vectors must not meet the old model's index.
        job = terms.job(query, contract_hash=pin, fingerprint=calls.settings.fingerprint)
        started = time.perf_counter()
        result = await calls.encode(http, job)
        embedded = time.perf_counter()
        loop = asyncio.get_running_loop()
        hits = await loop.run_in_executor(
            self._search_thread, corpus.search, result.vectors[0], request.top_k, request.return_documents
        )
        searched = time.perf_counter()
        calls.metrics.searched(searched - embedded)
        body = {
            "object": "list",
            "model": terms.model,
            "contract_hash": result.contract_hash,
            "results": [hit.model_dump() for hit in hits],
            "timing": {"embed_seconds": embedded - started, "search_seconds": searched - embedded},
            "usage": usage(result.tokens, result.truncated),
        }
        return json_reply(body, headers=notes_of(result))

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
        own, result = await self._scores(
            http, terms, query, [texts[index] for index in places], field, pin, places
        )
        scores = np.full(len(texts), min([_BLANK_SCORE, *own.tolist()]), dtype=np.float32)
        scores[places] = own
        # Stable, so equal scores keep the order of the request; a blank one comes after any that scores as little.
        blank = np.ones(len(texts), dtype=bool)
        blank[places] = False
        return Ranking(np.lexsort((-scores, blank)).tolist(), scores, result)

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
