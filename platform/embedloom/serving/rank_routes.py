"""The handlers that compare a query with documents: rerank, similarity, and search of the served corpus."""

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from fastapi import Request, Response

from embedloom.serving.calls import CONTRACT_HEADER, Calls, pinned
from embedloom.serving.messages import EncodeJob, EncodeResult, Part, Vectors
from embedloom.serving.replies import CorpusCard, SearchHit, usage
from embedloom.serving.routes import json_reply
from embedloom.serving.schemas import RerankRequest, SearchRequest, SimilarityRequest
from embedloom.serving.values import similarities


class Corpus(Protocol):
    """Embedded documents that can be searched."""

    card: CorpusCard
    contract_hash: str

    def search(self, query: Vectors, count: int, with_texts: bool) -> list[SearchHit]:
        """The nearest documents of a query vector [dimension], best first."""
        ...


class RankRoutes:
    """The handlers of one endpoint that rank documents."""

    def __init__(self, calls: Calls, corpus: Corpus | None = None) -> None:
        self._calls = calls
        self._corpus = corpus
        self._search_thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    async def rerank(self, http: Request) -> Response:
        """Order documents by their similarity to a query (Cohere's shape; no cross-encoder)."""
        request = await self._calls.read(http, RerankRequest)
        scores, result = await self._scores(http, request, request.task or "retrieval")
        # Stable: equal scores keep the order of the request.
        best = np.argsort(-scores, kind="stable")[: request.top_n]
        results: list[dict[str, Any]] = []
        for index in best.tolist():
            entry: dict[str, Any] = {"index": index, "relevance_score": float(scores[index])}
            if request.return_documents:
                entry["document"] = {"text": request.documents[index]}
            results.append(entry)
        body = {
            "id": uuid.uuid4().hex,
            "object": "list",
            "model": self._calls.settings.served_name,
            "scored_by": "embedding_similarity",
            "results": results,
            "usage": usage(result.tokens),
        }
        return json_reply(body, headers={CONTRACT_HEADER: result.contract_hash})

    async def similarity(self, http: Request) -> Response:
        """How similar each document is to a query; send task "sts" for texts that play the same part."""
        request = await self._calls.read(http, SimilarityRequest)
        scores, result = await self._scores(http, request, request.task or "retrieval")
        body = {
            "object": "list",
            "model": self._calls.settings.served_name,
            "similarities": scores.tolist(),
            "usage": usage(result.tokens),
        }
        return json_reply(body, headers={CONTRACT_HEADER: result.contract_hash})

    async def search(self, http: Request) -> Response:
        """The documents of the served corpus nearest to a query."""
        calls, corpus = self._calls, self._corpus
        if corpus is None:
            raise RuntimeError("/v1/search is routed without a corpus")
        request = await calls.read(http, SearchRequest)
        calls.check_model(request.model)
        calls.check_sizes([request.query], "query", is_list=False)
        pin = pinned(http, request.contract_hash) or corpus.contract_hash
        query = _query(request.query, request.task or "retrieval", request.instruction)
        # The fingerprint too: in a redeploy, the new model's vectors must not meet the old model's index.
        job = EncodeJob((query,), request.truncate, pin, calls.settings.fingerprint)
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
            "model": calls.settings.served_name,
            "contract_hash": result.contract_hash,
            "results": [hit.model_dump() for hit in hits],
            "timing": {"embed_seconds": embedded - started, "search_seconds": searched - embedded},
            "usage": usage(result.tokens),
        }
        return json_reply(body, headers={CONTRACT_HEADER: result.contract_hash})

    async def _scores(
        self, http: Request, request: RerankRequest | SimilarityRequest, task: str
    ) -> tuple[Vectors, EncodeResult]:
        """Similarity of each document to the query, float32 [documents], and what it cost."""
        calls = self._calls
        calls.check_model(request.model)
        calls.check_sizes([request.query], "query", is_list=False)
        calls.check_sizes(request.documents, "documents")
        info = await calls.info()
        parts = (
            _query(request.query, task, request.instruction),
            Part(
                "document",
                request.documents,
                task_type=task,
                instruction=request.instruction,
                name="documents",
            ),
        )
        job = EncodeJob(parts, request.truncate, pinned(http, request.contract_hash))
        result = await calls.encode(http, job)
        return similarities(result.vectors[0], result.vectors[1:], info.normalize), result


def _query(text: str, task: str, instruction: str | None) -> Part:
    return Part("query", [text], task_type=task, instruction=instruction, name="query", is_list=False)
