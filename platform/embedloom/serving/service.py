"""One encoder for many concurrent requests: admit, tokenise, refuse what is too long, batch by tokens, embed.

Tokenising and encoding run in threads of their own, so the event loop stays free to take requests while the model
computes. No Ray here; replica.py puts it on Serve.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from embedloom.config.base import FrozenConfig
from embedloom.config.serving import ServingConfig
from embedloom.serving.batching import TokenBatcher, TooLate
from embedloom.serving.memory import HeapTrimmer
from embedloom.serving.messages import (
    EncodeJob,
    EncodeResult,
    ModelInfo,
    Part,
    Piece,
    Refusal,
    TokenizeResult,
    Vectors,
)
from embedloom.serving.scheduling import LaneLimits
from embedloom.serving.streams import ComputeStreams
from embedloom.serving.tokenizing import Frame, ServingEncoder, cut_items, given_ids, pieces_of, text_ids

_SLICE_CHARACTERS = 2**16  # tokenised at a time, so that a query need not wait for a bulk request's megabytes
# One text of so many is tokenised by the event loop itself, in some 0.1 ms (0.03 for 40 characters, 0.33 for 1,024); to
# hand it to a thread and back costs 0.07 ms.
_HERE_CHARACTERS = 256
_TOKENS_PER_CHARACTER = 0.3  # first guess; learnt from then on
_SMOOTHING = 0.1
Found = TypeVar("Found")
_MEASURED_TOKENS = 512  # of the batch that measures the rate
_MEASURE_AGAIN_SECONDS = 10.0


class BatchSettings(FrozenConfig):
    """Serve's ``user_config``: what can change without restarting a replica."""

    max_batch_tokens: int
    batch_wait_seconds: float
    max_request_tokens: int = 300_000
    max_queued_tokens: int = 600_000
    query_lane_tokens: int = 512
    query_lane_share: float = 0.5
    request_timeout_seconds: float = 60.0

    @classmethod
    def of(cls, config: ServingConfig) -> "BatchSettings":
        """The settings a serving section states."""
        return cls(**{name: getattr(config, name) for name in cls.model_fields})

    @property
    def lanes(self) -> LaneLimits:
        """The same for the scheduler."""
        return LaneLimits(
            max_batch_tokens=self.max_batch_tokens,
            wait_seconds=self.batch_wait_seconds,
            max_queued_tokens=self.max_queued_tokens,
            query_lane_tokens=self.query_lane_tokens,
            query_lane_share=self.query_lane_share,
            request_seconds=self.request_timeout_seconds,
        )


class EncoderService:
    """One encoder serving concurrent requests of one event loop."""

    def __init__(
        self,
        encoder: ServingEncoder,
        settings: BatchSettings,
        fingerprint: str = "",
        streams: ComputeStreams | None = None,
    ) -> None:
        """Build one.

        Args:
            encoder: the model.
            settings: sizes of batches and queues.
            fingerprint: of the model.
            streams: the threads to compute in; None: a new one.
        """
        self._encoder = encoder
        self._settings = settings
        self._fingerprint = fingerprint
        self._contract_hash = encoder.contract.hash  # computed anew whenever it is asked for
        self._frame = Frame.of(encoder.tokenizer)
        self._streams = streams or ComputeStreams(1)
        self._batcher = TokenBatcher(self._embed, settings.lanes, self._streams.threads)
        self._trimmer = HeapTrimmer()
        self._tokens_per_character = _TOKENS_PER_CHARACTER
        # One thread at a time: fast tokenizers keep their truncation as shared state and refuse a second borrower.
        self._tokenize_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._tokenizing = 0  # calls that the thread has or will have
        self._measured = -math.inf

    def _embed(self, token_ids: Sequence[Sequence[int]], alone: bool) -> Vectors:
        self._streams.use_cores(alone)
        vectors = self._encoder.embed_tokens(token_ids, self._settings.max_batch_tokens)
        self._trimmer.after_batch()
        return vectors

    def configure(self, settings: BatchSettings) -> None:
        """Use other limits from the next batch on."""
        self._settings = settings
        self._batcher.scheduler.limits = settings.lanes

    def queued_tokens(self) -> dict[str, int]:
        """Tokens that wait, by lane."""
        scheduler = self._batcher.scheduler
        return {"query": scheduler.queued_tokens("query"), "bulk": scheduler.queued_tokens("bulk")}

    async def describe(self) -> ModelInfo:
        """What the loaded model is."""
        contract, config = self._encoder.contract, self._encoder.backbone.config
        return ModelInfo(
            dimension=self._encoder.dimension,
            contract_hash=self._contract_hash,
            max_query_tokens=contract.max_query_tokens,
            max_document_tokens=contract.max_document_tokens,
            normalize=contract.normalize,
            pooling=contract.pooling,
            instructions=dict(contract.instructions),
            tasks={
                name: {**task.model_dump(), "default": contract.is_default(name)}
                for name, task in (contract.tasks or {}).items()
            },
            default_task=contract.task_type_of(),
            matryoshka_dimensions=tuple(getattr(config, "matryoshka_dimensions", None) or ()),
        )

    async def replicas(self) -> int:
        """One: this."""
        return 1

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Vectors of one request, or why it is refused."""
        started = time.monotonic()
        if refusal := self._pinned_elsewhere(job):
            return refusal
        scheduler, left = self._batcher.scheduler, self._seconds_left(job)
        place = scheduler.reserve(estimate := self._estimate(job), left)
        if place is None:
            return self._full(estimate, left)
        try:
            found = await self._ids_of(job, limited=True)
            if isinstance(found, Refusal):
                return found
            ids, truncated = found
            tokens = sum(map(len, ids))
            if tokens > self._settings.max_request_tokens:
                return Refusal(
                    f"{job.parts[-1].name}: the request has {tokens} tokens; allowed: at most "
                    f"{self._settings.max_request_tokens}",
                    "request_too_large",
                    job.parts[-1].name,
                )
            if not scheduler.resize(place, tokens):
                return self._full(tokens, left)
            tokenized = time.monotonic()
            vectors, request = await self._batcher.submit(ids, place)
        except TooLate:
            return Refusal(
                "this endpoint computes more slowly than when it took the request; try again later",
                "overloaded",
                retry_after_seconds=scheduler.retry_after_seconds(tokens),
            )
        finally:
            scheduler.release(place)
        return EncodeResult(
            vectors=vectors,
            side_tokens=_side_tokens(job, ids),
            lane=place.lane,
            contract_hash=self._contract_hash,
            tokenize_seconds=tokenized - started,
            queue_seconds=(request.started or tokenized) - request.arrived,
            batches=request.batches,
            queued=self.queued_tokens(),
            truncated=truncated,
        )

    async def tokenize(self, job: EncodeJob) -> TokenizeResult | Refusal:
        """Token ids of every input in order; with ``truncate`` none they may be above the side's limit."""
        if refusal := self._pinned_elsewhere(job):
            return refusal
        found = await self._ids_of(job, limited=False)
        if isinstance(found, Refusal):
            return found
        ids, truncated = found
        pieces: list[list[Piece]] | None = None
        if job.pieces:
            pieces, first = [], 0
            for part in job.parts:
                own = ids[first : first + len(part)]
                pieces += await self._in_thread(partial(pieces_of, self._encoder, part, own))
                first += len(part)
        return TokenizeResult(ids, self._contract_hash, truncated, pieces)

    async def _ids_of(self, job: EncodeJob, limited: bool) -> tuple[list[list[int]], int] | Refusal:
        """Token ids of every input in order, and how many inputs were cut."""
        found: list[list[int]] = []
        truncated = 0
        for part in job.parts:
            if part.texts is None:
                ids = given_ids(self._encoder, part, job.truncate, limited, self._frame, job.own_ids_only)
                if isinstance(ids, Refusal):
                    return ids
                found += ids
                truncated += sum(
                    len(own) < len(item) for own, item in zip(ids, part.token_ids or (), strict=True)
                )
                continue
            for rows in _slices(part):
                work = partial(text_ids, self._encoder, part, rows, job.truncate, limited)
                here = _is_short(part, rows) and not self._tokenizing
                ids = work() if here else await self._in_thread(work)
                if isinstance(ids, Refusal):
                    return ids
                found += ids
                if job.truncate == "none":
                    self._learn(sum(len(text) for text in (part.texts or [])[rows]), sum(map(len, ids)))
                elif max(map(len, ids)) >= self._encoder.contract.max_tokens(part.side):
                    truncated += await self._in_thread(partial(cut_items, self._encoder, part, rows, ids))
        return found, truncated

    async def _in_thread(self, work: Callable[[], Found]) -> Found:
        loop = asyncio.get_running_loop()

        def left() -> None:
            self._tokenizing -= 1

        self._tokenizing += 1
        future = self._tokenize_thread.submit(work)
        # Not when the caller is cancelled: the thread is busy until the call itself is over.
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(left))
        return await asyncio.wrap_future(future)

    def _estimate(self, job: EncodeJob) -> int:
        """About how many tokens a request has, before it is tokenised; an input counts at most its limit."""
        total = 0
        for part in job.parts:
            limit = self._encoder.contract.max_tokens(part.side)
            lengths = [len(ids) for ids in part.token_ids or []]
            lengths += [1 + int(len(text) * self._tokens_per_character) for text in part.texts or []]
            total += sum(min(length, limit) for length in lengths)
        return min(total, self._settings.max_request_tokens)

    def _learn(self, characters: int, tokens: int) -> None:
        self._tokens_per_character += _SMOOTHING * (tokens / max(1, characters) - self._tokens_per_character)

    def _seconds_left(self, job: EncodeJob) -> float:
        """Until the client is told that it took too long; clocks of several machines may differ by a little."""
        most = self._settings.request_timeout_seconds
        return most if job.deadline is None else max(0.0, min(most, job.deadline - time.time()))

    def _full(self, tokens: int, seconds_left: float) -> Refusal:
        scheduler = self._batcher.scheduler
        needed = scheduler.seconds_needed(tokens)
        if scheduler.idle and needed is not None:
            self._measure_again()
            message = (
                f"its {tokens} tokens take about {needed:.3g} s here, too long for the {seconds_left:.3g} s that a request "
                "has; send fewer at a time"
            )
        else:
            message = f"{scheduler.queued_tokens()} tokens are waiting here already; try again later"
        return Refusal(
            message, "overloaded", retry_after_seconds=scheduler.retry_after_seconds(tokens, seconds_left)
        )

    def measure(self) -> None:
        """Learn the encoder's rate from a small batch of its own, before there was any or where it may be outdated.

        Blocks. Its first run allocates and picks kernels, for which no client should pay; the second one counts.
        """
        length = min(_MEASURED_TOKENS, self._encoder.contract.max_document_tokens)
        texts = [[0] * length] * max(1, _MEASURED_TOKENS // length)
        for _ in range(2):
            started = time.monotonic()
            self._embed(texts, True)
            seconds = time.monotonic() - started
        self._batcher.scheduler.speed.state(length * len(texts), seconds)
        self._measured = time.monotonic()

    def _measure_again(self) -> None:
        """An endpoint that refuses everything computes nothing that could show it to be faster than it was."""
        if time.monotonic() - self._measured > _MEASURE_AGAIN_SECONDS:
            self._measured = time.monotonic()
            self._streams.threads[0].submit(self.measure)

    def _pinned_elsewhere(self, job: EncodeJob) -> Refusal | None:
        own = self._contract_hash
        if job.contract_hash not in (None, own):
            return Refusal(
                f"contract_hash: the request is pinned to {job.contract_hash!r}, this model's is {own!r}; vectors of "
                "different contracts cannot be compared",
                "contract_mismatch",
                "contract_hash",
            )
        if job.fingerprint not in (None, self._fingerprint):
            return Refusal("the served model is being replaced; try again", "model_replaced")
        return None

    async def close(self) -> None:
        """Stop the threads."""
        await self._batcher.close()
        self._tokenize_thread.shutdown(wait=False)


def _slices(part: Part) -> Iterator[slice]:
    """Runs of texts of about ``_SLICE_CHARACTERS``."""
    start = characters = 0
    for index, text in enumerate(part.texts or []):
        characters += len(text) + len(part.instruction or "")
        if characters >= _SLICE_CHARACTERS:
            yield slice(start, index + 1)
            start, characters = index + 1, 0
    if start < len(part):
        yield slice(start, len(part))


def _is_short(part: Part, rows: slice) -> bool:
    """Whether these rows are one text that costs next to nothing to tokenise."""
    texts = (part.texts or [])[rows]
    return len(texts) == 1 and len(texts[0]) + len(part.instruction or "") <= _HERE_CHARACTERS


def _side_tokens(job: EncodeJob, ids: list[list[int]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    first = 0
    for part in job.parts:
        own = sum(map(len, ids[first : first + len(part)]))
        counts[part.side] = counts.get(part.side, 0) + own
        first += len(part)
    return counts
