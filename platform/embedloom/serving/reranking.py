"""A reranker for many concurrent requests: a query with each of its documents becomes a pair, and pairs are batched by tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ray import serve

from embedloom.config.serving import Truncate
from embedloom.encoder.pairs import PairEncoder
from embedloom.encoder.tokenizer import CutTexts
from embedloom.serving.messages import EncodeJob, Part, Refusal
from embedloom.serving.replica import EncoderReplica, ModelSpec
from embedloom.serving.scheduling import ComputeStreams
from embedloom.serving.service import EncoderService, limit_compiled_products

# A job for a reranker has a query as its first part and documents as its second; the "vectors" of its answer are logits
# [documents, 1].


def pair_ids(
    encoder: PairEncoder, query: str, part: Part, truncate: Truncate
) -> tuple[list[list[int]], int] | Refusal:
    """Tokens of the query with every document, and how many pairs were cut.

    Args:
        encoder: the reranker.
        query: read with each document.
        part: the documents.
        truncate: ``end`` cuts the longer text of a pair that is too long, ``none`` refuses it; ``start`` is refused.
    """
    if truncate == "start":
        return Refusal(
            'truncate: "start" is not what a reranker was trained with; allowed: "end" and "none"', "invalid_truncate",
            "truncate",
        )  # fmt: skip
    texts = part.texts or []
    ids, cut = encoder.tokenize_pairs([query] * len(texts), texts, CutTexts())
    if truncate == "none" and any(cut):
        return Refusal(
            f"{part.where(cut.index(True))} with the query is longer than the {encoder.pairs.max_tokens} tokens of a pair "
            '(special tokens included); shorten it, or send "truncate": "end"',
            "context_length_exceeded",
            part.name,
        )
    return ids, sum(cut)


class RerankerService(EncoderService):
    """One reranker serving concurrent requests of one event loop."""

    _encoder: Any

    async def _ids_of(self, job: EncodeJob, limited: bool) -> tuple[list[list[int]], int] | Refusal:
        query, documents = _sides(job)
        work = partial(pair_ids, self._encoder, query, documents, job.truncate)
        found = await self._in_thread(work)
        if not isinstance(found, Refusal):
            characters = sum(len(text) + len(query) for text in documents.texts or [])
            self._learn(characters, sum(map(len, found[0])))
        return found

    def _estimate(self, job: EncodeJob) -> int:
        query, documents = _sides(job)
        most, each = self._encoder.pairs.max_tokens, self._tokens_per_character
        total = sum(min(most, 3 + int((len(query) + len(text)) * each)) for text in documents.texts or [])
        return int(min(total, self._settings.max_request_tokens))

    def _side_tokens(self, job: EncodeJob, ids: Sequence[Sequence[int]]) -> dict[str, int]:
        return {"document": sum(map(len, ids))}


def _sides(job: EncodeJob) -> tuple[str, Part]:
    query, documents = job.parts
    return (query.texts or [""])[0], documents


def load_reranker(spec: ModelSpec) -> RerankerService:
    """Load a reranker for serving, run it, and measure how fast it is.

    Raises:
        DataError: not a reranker, or a broken one.
    """
    limit_compiled_products()
    streams = ComputeStreams(spec.streams, spec.threads if spec.streams > 1 else None)
    loading = streams.threads[0].submit(PairEncoder.open, spec.folder, threads=spec.threads, dtype=spec.dtype)
    service = RerankerService(loading.result(), spec.batching, spec.fingerprint, streams)
    streams.threads[0].submit(service.measure).result()
    return service


class RerankerReplica(EncoderReplica):
    """One of the rerankers of an endpoint."""

    def __init__(self, spec: ModelSpec) -> None:
        self._tag = serve.get_replica_context().replica_tag
        self._service = load_reranker(spec)
