"""One encoder for many concurrent requests: admit, tokenise, refuse what is too long, batch by tokens, embed."""

import asyncio
import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from embedloom.config.base import FrozenConfig
from embedloom.config.serving import ServingConfig, Truncate
from embedloom.core.prompting import PromptContract, Side
from embedloom.encoder.tokenizer import CHARACTERS_PER_TOKEN, InstructionTooLong
from embedloom.errors import DataError
from embedloom.serving.autoscaling import (
    DEMANDED_REQUESTS,
    DEMANDED_TOKENS,
    QUEUED_TOKENS,
    TOKENS_PER_SECOND,
)
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
from embedloom.serving.scheduling import ComputeStreams, LaneLimits, TokenBatcher, TooLate

# Keeps the memory of a serving process, which sees every mix of lengths there is, from growing with that variety.


# oneDNN compiles every product for its shape and by default keeps the last 1,024 of them. A forward pass of one shape
# needs about ten, the same in every layer. Measured on MiniLM over 1,500 random batches: 738 MiB with the default, 648
# with 64, 601 with 16, speeds within 3 %.
_COMPILED_PRODUCTS = "64"
TRIM_SECONDS = 10.0


def limit_compiled_products() -> None:
    """Bound oneDNN's cache; only before the process's first product, as it is read once."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _COMPILED_PRODUCTS)


class HeapTrimmer:
    """Gives free pages inside the heap back to the system every ten seconds.

    Batches of changing sizes leave holes between what is kept: 90 to 130 MiB of 640 after 1,200 random batches, which
    glibc returns only when asked. Asking took 11 ms, a thousandth of the time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        self._last = clock()

    def after_batch(self) -> bool:
        """Trim if it is time; says whether it was."""
        if self._trim is None or self._clock() - self._last < TRIM_SECONDS:
            return False
        self._trim(0)
        self._last = self._clock()
        return True


# From a part of a request to token ids, or to the reason why not. Functions of an encoder; no queue, no HTTP.


_SEND_TEXTS = (
    "send texts instead (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)), or ids that /tokenize of this "
    "endpoint gave; serving.token_ids: accept takes any"
)


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
        self, texts: Sequence[str], side: Side, task_type: str | None = None, instruction: str | None = None
    ) -> list[list[int]]:
        """Token ids, cut to the side's limit."""
        ...

    def embed_tokens(self, token_ids: Sequence[Sequence[int]], max_batch_tokens: int = 4096) -> Vectors:
        """Vectors in order."""
        ...


def text_ids(
    encoder: ServingEncoder, part: Part, rows: slice, truncate: Truncate, limited: bool = True
) -> list[list[int]] | Refusal:
    """Token ids of some of a part's texts, formatted by the model's contract.

    Args:
        encoder: the model.
        part: with texts.
        rows: which of them.
        truncate: what happens to texts above the side's limit; ``none`` refuses them.
        limited: False takes texts of any length as they are where ``truncate`` is ``none``.
    """
    texts = (part.texts or [])[rows]
    limit = encoder.contract.max_tokens(part.side)
    try:
        if truncate == "end":
            cut = encoder.tokenize(texts, part.side, part.task_type, part.instruction)
            return cut if max(map(len, cut)) < limit else _nothing_left(encoder, part, limit) or cut
        formatted = [
            encoder.contract.format(text, part.side, part.task_type, part.instruction) for text in texts
        ]
    except InstructionTooLong as error:
        return Refusal(f"instruction: {error}", "context_length_exceeded", "instruction")
    except DataError as error:  # a task type this model's contract has no instruction for
        return Refusal(str(error), "invalid_task", "task")
    encoded = encoder.tokenizer(
        formatted, truncation=False, padding=False, return_offsets_mapping=truncate == "start"
    )
    whole: list[list[int]] = encoded["input_ids"]
    for index, ids in enumerate(whole):
        if (
            not ids
        ):  # a tokenizer without BOS may find nothing in a text; the encoder's own way gives one token
            whole[index] = encoder.tokenize(
                texts[index : index + 1], part.side, part.task_type, part.instruction
            )[0]
    if truncate == "start":
        return _cut_starts(encoder.contract, part, whole, encoded["offset_mapping"], rows.start)
    return _too_long(part, whole, limit, rows.start) if limited else whole


def _nothing_left(encoder: ServingEncoder, part: Part, limit: int) -> Refusal | None:
    """Why a text cut at its end would be the client's instruction and nothing else, where it would."""
    if part.instruction is None:  # the contract's own is the model's business
        return None
    prompt = encoder.contract.format("\0", part.side, part.task_type, part.instruction)
    before = prompt[: prompt.rindex("\0")]
    if not before or len(encoder.tokenizer([before], truncation=False)["input_ids"][0]) < limit:
        return None
    return Refusal(
        f"instruction: it alone fills the limit of {limit} tokens for a {part.side}, so nothing of {part.name} would be "
        "left; allowed: a shorter one",
        "context_length_exceeded",
        "instruction",
    )


def _cut_starts(
    contract: PromptContract,
    part: Part,
    ids: list[list[int]],
    offsets: list[list[tuple[int, int]]],
    start: int,
) -> list[list[int]] | Refusal:
    """Drop tokens from the beginning of each text; special tokens and the instruction before it stay."""
    limit = contract.max_tokens(part.side)
    # NUL marks where the text goes; an instruction may hold one too, but it stands before the text.
    before = contract.format("\0", part.side, part.task_type, part.instruction).rindex("\0")
    cut = []
    for index, (tokens, places) in enumerate(zip(ids, offsets, strict=True)):
        excess = len(tokens) - limit
        if excess <= 0:
            cut.append(tokens)
            continue
        # Special tokens have the empty span (0, 0).
        own = [number for number, (left, right) in enumerate(places) if right > left and right > before]
        if len(own) <= excess:
            return Refusal(
                f"{part.where(start + index)}: instruction and special tokens alone fill the limit of {limit} "
                f"tokens for a {part.side}",
                "context_length_exceeded",
                part.name,
            )
        dropped = set(own[:excess])
        cut.append([token for number, token in enumerate(tokens) if number not in dropped])
    return cut


def cut_items(encoder: ServingEncoder, part: Part, rows: slice, ids: Sequence[Sequence[int]]) -> int:
    """How many of these texts have more tokens than ``ids`` has of them, which were cut to the side's limit.

    Only a text that fills the limit is tokenised again, and of it no more than decides the matter: what fills the limit
    in its first ``CHARACTERS_PER_TOKEN`` characters a token has been cut if there is more of it.
    """
    limit = encoder.contract.max_tokens(part.side)
    full = [text for text, own in zip((part.texts or [])[rows], ids, strict=True) if len(own) >= limit]
    prompted = [encoder.contract.format(text, part.side, part.task_type, part.instruction) for text in full]
    short = [text for text in prompted if len(text) <= limit * CHARACTERS_PER_TOKEN]
    if not short:
        return len(prompted)
    whole: list[list[int]] = encoder.tokenizer(short, truncation=False, padding=False)["input_ids"]
    return len(prompted) - sum(len(own) <= limit for own in whole)


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens that a tokenizer puts before and after every text."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """What is there of no text is before or after any."""
        alone, text = tokenizer(["", "a"], truncation=False, padding=False)["input_ids"]
        count = next(
            (n for n, (own, other) in enumerate(zip(alone, text, strict=False)) if own != other), len(alone)
        )
        before, after = alone[:count], alone[count:]
        return cls(before, after if after and text[-len(after) :] == after else [])

    def holds(self, ids: list[int]) -> bool:
        """Whether ids begin and end as those of a text do."""
        return (
            len(ids) >= len(self.before) + len(self.after)
            and ids[: len(self.before)] == self.before
            and ids[len(ids) - len(self.after) :] == self.after
        )

    def cut(self, ids: list[int], limit: int, truncate: Truncate) -> list[int]:
        """Ids within a limit, cut as the text itself would have been: special tokens around it stay."""
        if len(ids) <= limit or truncate == "none":
            return ids
        if not self.holds(ids) or len(self.before) + len(self.after) >= limit:
            return ids[:limit] if truncate == "end" else ids[-limit:]
        room = limit - len(self.before) - len(self.after)
        inner = ids[len(self.before) : len(ids) - len(self.after)]
        return [*self.before, *(inner[:room] if truncate == "end" else inner[-room:]), *self.after]


def given_ids(
    encoder: ServingEncoder,
    part: Part,
    truncate: Truncate,
    limited: bool = True,
    frame: Frame | None = None,
    own_only: bool = False,
) -> list[list[int]] | Refusal:
    """The token ids that a client sent, checked against the vocabulary and the side's limit.

    Args:
        encoder: the model.
        part: with token ids.
        truncate: what happens to ids above the side's limit.
        limited: False takes any number where ``truncate`` is ``none``.
        frame: of the model's tokenizer; None: ids are cut without regard to special tokens.
        own_only: refuse ids that the tokenizer cannot have made, as they lack its special tokens: another
            tokenizer's, which would be read as other words.
    """
    ids = part.token_ids or []
    vocabulary = int(encoder.backbone.config.vocab_size)
    for index, item in enumerate(ids):
        reason = None
        if (largest := max(item)) >= vocabulary:
            reason = (
                f"holds token id {largest}, the model's vocabulary ends at {vocabulary - 1}; token ids must come from "
                "this model's own tokenizer"
            )
        elif frame is not None and own_only and not frame.holds(item):
            reason = (
                f"does not begin with {frame.before} and end with {frame.after}, the special tokens of this model, so "
                "its token ids are another tokenizer's and mean other words here"
            )
        if reason is not None:
            return Refusal(f"{part.where(index)} {reason}; {_SEND_TEXTS}", "invalid_token_id", part.name)
    limit = encoder.contract.max_tokens(part.side)
    if truncate != "none":
        frame = frame or Frame([], [])
        return [frame.cut(item, limit, truncate) for item in ids]
    return _too_long(part, ids, limit, 0) if limited else ids


def pieces_of(encoder: ServingEncoder, part: Part, ids: Sequence[Sequence[int]]) -> list[list[Piece]]:
    """The tokens of a part's texts: the characters that each stands for, or its name where it stands for none.

    Of a text that was cut, every token has its name.
    """
    tokenizer = encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    texts = [
        encoder.contract.format(text, part.side, part.task_type, part.instruction)
        for text in part.texts or ()
    ]
    found = tokenizer(texts, truncation=False, padding=False, return_offsets_mapping=True)
    pieces = []
    for own, whole, text, offsets in zip(
        ids, found["input_ids"], texts, found["offset_mapping"], strict=True
    ):
        places = offsets if list(own) == whole else [(0, 0)] * len(own)
        names = tokenizer.convert_ids_to_tokens(list(own))
        pieces.append(
            [
                Piece(token, text[start:stop], token in special, start, stop)
                if stop > start
                else Piece(token, str(name), token in special)
                for token, name, (start, stop) in zip(own, names, places, strict=True)
            ]
        )
    return pieces


def _too_long(part: Part, token_ids: list[list[int]], limit: int, start: int) -> list[list[int]] | Refusal:
    for index, item in enumerate(token_ids):
        if len(item) > limit:
            return Refusal(
                f"{part.where(start + index)} has {len(item)} tokens, the limit for a {part.side} is {limit} "
                '(instruction and special tokens included); shorten it, or send "truncate": "end"',
                "context_length_exceeded",
                part.name,
            )
    return token_ids


# One encoder for many concurrent requests: admit, tokenise, refuse what is too long, batch by tokens, embed.
#
# Tokenising and encoding run in threads of their own, so the event loop stays free to take requests while the model
# computes. No Ray here; replica.py puts it on Serve.


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
        self._demanded_tokens = self._demanded_requests = 0

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

    def load(self) -> dict[str, float]:
        """What ``autoscaling`` needs to know of this encoder, by its names; counters begin with the encoder."""
        scheduler = self._batcher.scheduler
        return {
            DEMANDED_TOKENS: float(self._demanded_tokens),
            DEMANDED_REQUESTS: float(self._demanded_requests),
            QUEUED_TOKENS: float(scheduler.queued_tokens() + scheduler.running_tokens),
            TOKENS_PER_SECOND: scheduler.speed.tokens_per_second or 0.0,
        }

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
        self._demanded_requests += 1
        self._demanded_tokens += estimate
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
            side_tokens=self._side_tokens(job, ids),
            lane=place.lane,
            contract_hash=self._contract_hash,
            tokenize_seconds=tokenized - started,
            queue_seconds=(request.started or tokenized) - request.arrived,
            batches=request.batches,
            queued=self.queued_tokens(),
            tokens_per_second=scheduler.speed.tokens_per_second or 0.0,
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

    def _side_tokens(self, job: EncodeJob, ids: Sequence[Sequence[int]]) -> dict[str, int]:
        """Tokens of queries and of documents."""
        counts: dict[str, int] = {}
        first = 0
        for part in job.parts:
            own = sum(map(len, ids[first : first + len(part)]))
            counts[part.side] = counts.get(part.side, 0) + own
            first += len(part)
        return counts

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
