"""What every route does around its own work: read the body, say what holds for it, admit, ask the encoder, notice who left."""

import asyncio
import codecs
import re
import time
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from pydantic import Field
from starlette.requests import ClientDisconnect, Request

from embedloom.config.base import FrozenConfig
from embedloom.config.serving import ModelAlias, Truncate
from embedloom.core.prompting import PromptContract, Side
from embedloom.errors import ConfigError, DataError
from embedloom.serving.front import ApiKey, RequestLog, facts_of
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Part, Refusal, TokenizeResult
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.refusals import ApiError, Body, check_content_type, read_into, read_json
from embedloom.serving.schemas import (
    HASH_PATTERN,
    JINA_TASKS,
    ClosedRequest,
    GateVerdict,
    Lineage,
    TextOptions,
)

Answer = TypeVar("Answer")
Other = TypeVar("Other", bound=ClosedRequest)
CONTRACT_HEADER = "x-contract-hash"
TRUNCATED_HEADER = "x-truncated-items"
_VALUE_KEY = "embedloom.body"
# What an encoder may refuse, and the status it is told with.
_STATUS = {"overloaded": 429, "contract_mismatch": 409, "model_replaced": 503}


class EndpointSettings(FrozenConfig):
    """What the HTTP side needs to know."""

    served_name: str
    models: dict[str, ModelAlias] = Field(default_factory=dict)  # other names of it, with their defaults
    truncate: Truncate | None = None  # the operator's default; None: the route's
    token_ids: Literal["accept", "refuse"] = "accept"  # what cannot be this tokenizer's
    fingerprint: str
    created: int  # Unix seconds, as OpenAI's model list has it
    max_items: int
    min_replicas: int = 1  # 0: none may be up, and a request waits for the first
    max_requests: int  # computed and waiting together; one more is answered 429
    request_timeout_seconds: float
    max_item_characters: int = 262_144
    max_body_bytes: int = 16 * 2**20
    max_batch_tokens: int = 4096
    compute_dtype: str = "float32"
    keys: tuple[ApiKey, ...] = ()  # hashes only; none: every client is served
    allowed_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # names it answers to; none: to any
    request_log: RequestLog = "none"
    lineage: Lineage | None = None
    gate: GateVerdict | None = None
    tasks: tuple[str, ...] = ()  # names of the model's own tasks
    trust_remote_code: bool = False  # whether code that lies beside the weights is run
    reranker: str | None = None  # identity of what orders documents; None: similarity does
    rerank_top: int = 50  # of a search
    allowed_keys: tuple[str, ...] | None = None  # names of those that may use the model; None: all

    @property
    def names(self) -> tuple[str, ...]:
        """All that clients may put into ``model``."""
        return self.served_name, *self.models


class Backend(Protocol):
    """Whatever turns jobs into vectors: an ``EncoderService`` here, or replicas elsewhere."""

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Vectors, or why not.

        Raises:
            ApiError: no replica (503).
        """
        ...

    async def tokenize(self, job: EncodeJob) -> TokenizeResult | Refusal:
        """Token ids, or why not."""
        ...

    async def describe(self) -> ModelInfo:
        """The loaded model; answers only when an encoder is up."""
        ...

    async def replicas(self) -> int:
        """Encoders that are up; starts none."""
        ...


class Calls:
    """The encoder as routes see it; refusals come as ``ApiError``."""

    def __init__(
        self,
        backend: Backend,
        settings: EndpointSettings,
        metrics: EndpointMetrics,
        reranker: Backend | None = None,
    ) -> None:
        self._reranker = reranker
        self.settings = settings
        self.metrics = metrics
        self._backend = backend
        self._known: ModelInfo | None = None
        self._running = 0

    async def read(self, http: Request, model: type[Body], other: type[Other] | None = None) -> Body | Other:
        """The body of a request as its type, or as another dialect's, where its mark is there.

        Raises:
            ApiError: not JSON, not of that type, or too slow.
        """
        value = await self.value(http)
        if other is not None and isinstance(value, dict) and other.mark in value:
            if value[other.mark] is not None:
                return read_into(other, value, self.settings.tasks)
            value = {
                name: item for name, item in value.items() if name != other.mark
            }  # a null is as if it were absent
        return read_into(model, value, self.settings.tasks)

    async def value(self, http: Request) -> Any:
        """The JSON of a request's body, read once.

        Raises:
            ApiError: not JSON, or too slow.
        """
        if _VALUE_KEY in http.scope:
            return http.scope[_VALUE_KEY]
        check_content_type(http.headers)
        limit = self.settings.request_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                body = await http.body()
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not arrive within {limit:g} seconds", code="timeout"
            ) from error
        value = http.scope[_VALUE_KEY] = read_json(body.removeprefix(codecs.BOM_UTF8))
        return value

    @property
    def reranks(self) -> bool:
        """Whether a reranker orders documents, and not the similarity of their vectors."""
        return self._reranker is not None

    async def rerank(self, http: Request, job: EncodeJob) -> EncodeResult:
        """Logits [documents, 1] of a query with each document, the job's two parts, under the conditions of ``encode``."""
        if self._reranker is None:
            raise RuntimeError("no reranker is served")
        return await self._computed(http, job, self._reranker)

    async def encode(self, http: Request, job: EncodeJob) -> EncodeResult:
        """Vectors, unless the endpoint is full, the encoder refuses, time runs out or the client leaves."""
        return await self._computed(http, job, self._backend)

    async def _computed(self, http: Request, job: EncodeJob, backend: Backend) -> EncodeResult:
        facts = facts_of(http.scope)
        if self.settings.request_log == "texts":
            facts.texts = [text for part in job.parts for text in part.texts or ()]
        asked = time.time_ns()
        job = replace(job, deadline=asked / 1e9 + self.settings.request_timeout_seconds)
        result = await self._admitted(http, backend.encode(job))
        if isinstance(result, Refusal):
            raise refused(result)
        if facts.client is not None:
            facts.client.charge(result.tokens)
        facts.values |= {"items": len(result.vectors), "tokens": result.tokens, "lane": result.lane}
        if facts.trace is not None:
            facts.trace.encoded(result, asked)
        self.metrics.embedded(result, self.settings.served_name)
        return result

    async def tokenize(self, http: Request, job: EncodeJob) -> TokenizeResult:
        """Token ids, under the same conditions."""
        result = await self._admitted(http, self._backend.tokenize(job))
        if isinstance(result, Refusal):
            raise refused(result)
        return result

    async def look_up(self, http: Request, texts: list[str], work: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer of work that needs no encoder, under the same conditions."""
        if self.settings.request_log == "texts":
            facts_of(http.scope).texts = texts
        return await self._admitted(http, work)

    async def info(self) -> ModelInfo:
        """The loaded model, asked for once."""
        if self._known is None:
            self._known = await self.within_time(self._backend.describe())
        return self._known

    async def ready(self, seconds: float) -> tuple[ModelInfo, int] | None:
        """The loaded model and how many encoders are up; None while requests would find none.

        An endpoint that may have none is ready without: asking an encoder would start one, and keep it up.
        """
        async with asyncio.timeout(seconds):
            info, replicas = await self.info(), await self._backend.replicas()
        return (info, replicas) if replicas or not self.settings.min_replicas else None

    def check_sizes(self, items: list[Any], name: str, is_list: bool = True) -> None:
        """Refuse more items, or longer texts, than the endpoint takes (400)."""
        if len(items) > self.settings.max_items:
            raise ApiError(
                400,
                f"{name} has {len(items)} items; allowed: at most {self.settings.max_items}",
                param=name,
                code="too_many_items",
            )
        longest = self.settings.max_item_characters
        for index, item in enumerate(items):
            if isinstance(item, str) and len(item) > longest:
                where = f"{name}[{index}]" if is_list else name
                raise ApiError(
                    400,
                    f"{where} has {len(item)} characters; allowed: at most {longest}",
                    param=name,
                    code="string_above_max_length",
                )

    async def _admitted(self, http: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run the work unless the endpoint is full.

        Counted here and not by Serve's queue limit, which counts a request as queued until a replica accepts
        it, so that a burst is refused while replicas idle, and whose refusals are not in OpenAI's shape.
        """
        if self._running >= self.settings.max_requests:
            work.close()
            raise ApiError(
                429,
                f"this endpoint is full with {self._running} requests running or waiting; try again shortly",
                code="overloaded",
            )
        self._running += 1
        try:
            return await self.within_time(_while_connected(http, work))
        finally:
            self._running -= 1

    async def within_time(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer, or 504 where it takes longer than a request may."""
        limit = self.settings.request_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                return await work
        except TimeoutError as error:
            raise ApiError(504, f"no answer within {limit:g} seconds", code="timeout") from error


async def _while_connected(http: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer of the work, which is cancelled when the client leaves: nobody would read it.

    Raises:
        ClientDisconnect: it left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_departure(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _departure(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def notes_of(result: EncodeResult | TokenizeResult) -> dict[str, str]:
    """The headers that say what was computed by whom, and how many items were cut, where any was."""
    notes = {CONTRACT_HEADER: result.contract_hash}
    if result.truncated:
        notes[TRUNCATED_HEADER] = str(result.truncated)
    return notes


def pinned(http: Request, field: str | None) -> str | None:
    """The contract hash a request is pinned to, by header or field.

    Raises:
        ApiError: 400, not a hash, or two different ones.
    """
    header: str | None = http.headers.get(CONTRACT_HEADER)
    if header is None:
        return field
    if not _is_hash(header):
        raise ApiError(
            400,
            f"{CONTRACT_HEADER}: {header!r:.40} is not a contract hash; allowed: sixteen hex digits",
            param=CONTRACT_HEADER,
        )
    if field not in (None, header):
        raise ApiError(
            400,
            f"contract_hash is {field!r}, the header {CONTRACT_HEADER} says {header!r}; give one of them",
            param="contract_hash",
            code="contract_hash_twice",
        )
    return header


def refused(refusal: Refusal) -> ApiError:
    """An encoder's refusal as the client is told."""
    return ApiError(
        _STATUS.get(refusal.code, 400),
        refusal.message,
        param=refusal.param,
        code=refusal.code,
        retry_after_seconds=refusal.retry_after_seconds,
    )


def _is_hash(text: str) -> bool:
    return re.fullmatch(HASH_PATTERN, text) is not None


# What holds for a request: its own words, then those of the model name it asks for, then the operator's, then the route's.
#
# Many clients can send nothing but a model's name and texts (Open WebUI, AnythingLLM, Haystack's OpenAI classes, LiteLLM).
# For them the one served model has other names, each with a side, a task, an instruction, a way to cut.


_NOTHING = ModelAlias()


@dataclass(frozen=True, slots=True)
class Terms:
    """How one request wants its texts; nothing is left open."""

    model: str  # as the client named it
    side: Side
    task: str | None  # None: the model's default task
    instruction: str | None
    truncate: Truncate
    own_ids_only: bool

    def texts(self, texts: list[str], side: Side, name: str, is_list: bool = True) -> Part:
        """Texts of one side of the request, from the field ``name``."""
        return Part(side, texts, None, self.task, self.instruction, name, is_list)

    def ids(self, token_ids: list[list[int]], name: str) -> Part:
        """Token ids of the request, which carry no prompt."""
        return Part(self.side, None, token_ids, name=name)

    def job(
        self, *parts: Part, contract_hash: str | None = None, fingerprint: str | None = None
    ) -> EncodeJob:
        """The request for the encoder."""
        return EncodeJob(parts, self.truncate, contract_hash, fingerprint, self.own_ids_only)


def terms_of(request: TextOptions, settings: EndpointSettings) -> Terms:
    """The terms of a request.

    A request's own ``task`` also sets aside the instruction of its model name, which belongs to another task.

    Raises:
        ApiError: 404, a model that is not served.
    """
    name = getattr(request, "model", None) or settings.served_name
    alias = alias_of(name, settings)
    own_side, own_task = request.prompt_said
    side, task = JINA_TASKS.get(alias.task or "", (None, alias.task))
    truncate = (
        request.truncation_said or alias.truncate or settings.truncate or type(request).usual_truncation
    )
    return Terms(
        model=name,
        side=own_side or alias.side or side or "document",
        task=own_task or task,
        instruction=request.instruction or (None if own_task else alias.instruction),
        truncate="start" if truncate == "end" and request.cuts_start else truncate,
        own_ids_only=settings.token_ids == "refuse",
    )


def alias_of(name: str, settings: EndpointSettings) -> ModelAlias:
    """What a model name stands for; nothing where it is the served name itself.

    Raises:
        ApiError: 404, neither of them.
    """
    if name == settings.served_name:
        return _NOTHING
    if (alias := settings.models.get(name)) is not None:
        return alias
    raise not_served(name, settings.names)


def not_served(name: str, allowed: Iterable[str]) -> ApiError:
    """What is said of a model that is not there, or not for this key; the first half as OpenAI says it."""
    names = ", ".join(map(repr, allowed)) or "none with this key"
    return ApiError(
        404,
        f"The model {name!r:.80} does not exist or you do not have access to it; allowed: {names:.400}",
        param="model",
        code="model_not_found",
    )


def check_aliases(models: Mapping[str, ModelAlias], served_name: str, contract: PromptContract) -> None:
    """Refuse names that cannot be told apart or stand for a task that the model does not know, before anything starts.

    Raises:
        ConfigError: names the alias and what is allowed.
    """
    for name, alias in models.items():
        if name == served_name:
            raise ConfigError(f"serving.models.{name}: is the served name itself; allowed: any other name")
        if alias.instruction is not None and not alias.instruction.strip():
            raise ConfigError(f"serving.models.{name}.instruction: blank; allowed: a text, or none stated")
        try:
            contract.instruction_for(JINA_TASKS.get(alias.task or "", (None, alias.task))[1])
        except DataError as error:
            raise ConfigError(f"serving.models.{name}.task: {error}") from error
