"""One encoder for many concurrent requests: tokenise, refuse what is too long, batch by tokens, embed.

Tokenising and encoding run in one thread each, so the event loop stays free to take requests while the model
computes. No Ray here; replica.py puts it on Serve.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from embedloom.config.base import FrozenConfig
from embedloom.config.use import ServingConfig
from embedloom.errors import DataError
from embedloom.instructions import PromptContract, Side
from embedloom.serving.batching import TokenBatcher, Vectors
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal


class ServingEncoder(Protocol):
    """What serving needs of an encoder; ``embedloom.encoder.model.Encoder`` is one."""

    contract: PromptContract
    tokenizer: Any
    backbone: Any

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def tokenize(
        self, texts: Sequence[str], side: Side, task_type: str = "retrieval", instruction: str | None = None
    ) -> list[list[int]]:
        """Token ids, cut to the side's limit."""
        ...

    def embed_tokens(self, token_ids: Sequence[Sequence[int]], max_batch_tokens: int = 4096) -> Vectors:
        """Vectors in order."""
        ...


class BatchSettings(FrozenConfig):
    """Serve's ``user_config``: what can change without restarting a replica."""

    max_batch_tokens: int
    batch_wait_seconds: float

    @classmethod
    def of(cls, config: ServingConfig) -> "BatchSettings":
        """The settings a serving section states."""
        return cls(max_batch_tokens=config.max_batch_tokens, batch_wait_seconds=config.batch_wait_seconds)


class EncoderService:
    """One encoder serving concurrent requests of one event loop."""

    def __init__(self, encoder: ServingEncoder, settings: BatchSettings) -> None:
        self._encoder = encoder
        self._batcher = TokenBatcher(self._embed, settings.max_batch_tokens, settings.batch_wait_seconds)
        # One thread: the fast tokenizers keep their truncation as shared state and refuse a second borrower.
        self._tokenize_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def _embed(self, token_ids: Sequence[Sequence[int]]) -> Vectors:
        return self._encoder.embed_tokens(token_ids, self._batcher.max_batch_tokens)

    def configure(self, settings: BatchSettings) -> None:
        """Use other batch limits from the next batch on."""
        self._batcher.max_batch_tokens = settings.max_batch_tokens
        self._batcher.wait_seconds = settings.batch_wait_seconds

    async def describe(self) -> ModelInfo:
        """What the loaded model is."""
        contract, config = self._encoder.contract, self._encoder.backbone.config
        return ModelInfo(
            dimension=self._encoder.dimension,
            contract_hash=contract.hash,
            max_query_tokens=contract.max_query_tokens,
            max_document_tokens=contract.max_document_tokens,
            normalize=contract.normalize,
            matryoshka_dimensions=tuple(getattr(config, "matryoshka_dimensions", None) or ()),
        )

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Vectors of one request, or why it is refused."""
        started = time.monotonic()
        if job.texts is not None:
            loop = asyncio.get_running_loop()
            try:
                ids = await loop.run_in_executor(self._tokenize_thread, self._tokenize, job)
            except DataError as error:  # a task type this model's contract has no instruction for
                return Refusal(str(error), "invalid_task")
        else:
            ids = self._check_ids(job)
        if isinstance(ids, Refusal):
            return ids
        tokenized = time.monotonic()
        request = await self._batcher.submit(ids)
        return EncodeResult(
            vectors=request.done.result(),
            tokens=sum(map(len, ids)),
            tokenize_seconds=tokenized - started,
            queue_seconds=(request.started or tokenized) - request.arrived,
            batches=request.batches,
        )

    def _tokenize(self, job: EncodeJob) -> list[list[int]] | Refusal:
        texts = job.texts or []
        if job.truncate == "none":
            contract = self._encoder.contract
            formatted = [contract.format(text, job.side, job.task_type, job.instruction) for text in texts]
            whole: list[list[int]] = self._encoder.tokenizer(formatted, truncation=False, padding=False)[
                "input_ids"
            ]
            if refusal := self._too_long(whole, job.side):
                return refusal
            if all(whole):
                return whole
        return self._encoder.tokenize(texts, job.side, job.task_type, job.instruction)

    def _check_ids(self, job: EncodeJob) -> list[list[int]] | Refusal:
        ids = job.token_ids or []
        vocabulary = int(self._encoder.backbone.config.vocab_size)
        for index, item in enumerate(ids):
            if (largest := max(item)) >= vocabulary:
                return Refusal(
                    f"input[{index}] holds token id {largest}, the model's vocabulary ends at "
                    f"{vocabulary - 1}; token ids must come from this model's own tokenizer",
                    "invalid_token_id",
                )
        limit = self._encoder.contract.max_tokens(job.side)
        if job.truncate == "end":
            return [item[:limit] for item in ids]
        return self._too_long(ids, job.side) or ids

    def _too_long(self, token_ids: Sequence[Sequence[int]], side: Side) -> Refusal | None:
        limit = self._encoder.contract.max_tokens(side)
        for index, item in enumerate(token_ids):
            if len(item) > limit:
                return Refusal(
                    f"input[{index}] has {len(item)} tokens, the limit for a {side} is {limit} (instruction "
                    'and special tokens included); shorten it, or send "truncate": "end"',
                    "context_length_exceeded",
                )
        return None

    async def close(self) -> None:
        """Stop the threads."""
        await self._batcher.close()
        self._tokenize_thread.shutdown(wait=False)
