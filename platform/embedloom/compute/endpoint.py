"""An OpenAI-compatible server as a generator: the worker that asks it for the answers of a shard, each once, within its limits."""

import asyncio
import json
import random
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from uuid import uuid4

import httpx
import pyarrow as pa

from embedloom.compute.chat_template import folded
from embedloom.compute.generation import (
    ANSWERS,
    ENGINE_CUT,
    ENGINE_FINISHED,
    GenerationRequest,
    GenerationResult,
    api_key,
    read_requests,
    with_results,
)
from embedloom.compute.journal import AnswerJournal
from embedloom.compute.pace import Account, Pace, retry_after
from embedloom.compute.reasoning import answer_of
from embedloom.config.synthesis import EndpointConfig, EngineOptions
from embedloom.core.storage import Place
from embedloom.core.text import hash64
from embedloom.errors import ConfigError, EmbedloomError, StageError, one_line

_REPEATED = frozenset({408, 409, 425, 429})  # and every 5xx
_PUSHES_BACK = frozenset({429, 503, 529})
_REFUSED_IN_A_ROW = 8  # with no answer before: it is the request's form that the server refuses
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
_UNBOUNDED = ("minLength", "maxLength")  # what OpenAI's strict schemas do not take
_MARKS = ("<think>", "</think>", "<|channel|>")
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where a generator's answers and money are accounted for.

    Args:
        place: of the artefact.
        answers: folder of a round's answers as they come.
        money: folder of what this generator has cost, a file for each process that asked it.
        where: config key of the endpoint, named in errors.
    """

    place: Place
    answers: str
    money: str
    where: str


class EndpointWorker:
    """Asks a server for the answers of shard after shard; several threads may call it at once."""

    def __init__(
        self, endpoint: EndpointConfig, options: EngineOptions, ledger: Ledger, transport: Any = None
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            endpoint: the server.
            options: parser and chat template options, if the model thinks first; nothing else of it matters.
            ledger: see there.
            transport: httpx's, for tests.

        Raises:
            ConfigError: the key's environment variable is not set here.
        """
        self._key = api_key(endpoint, ledger.where)
        self._ledger = ledger
        self._file = f"{ledger.money}/{uuid4().hex}.json"
        self._account = Account(endpoint.budget, _claimed(ledger.place, ledger.money))
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="endpoint", daemon=True).start()
        self._asker = self._wait(
            _open(endpoint, options, self._key, self._account, self._write_claim, ledger.where, transport)
        )

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Answer the requests of one shard; those that an earlier process had answered are not asked again."""
        requests = read_requests(rows)
        shard = f"{hash64(requests[0].id):016x}" if requests else "none"
        journal = AnswerJournal(self._ledger.place, f"{self._ledger.answers}/{shard}")
        known = journal.read()
        try:
            missing = [request for request in requests if request.id not in known]
            known |= self._wait(self._asker.answers(missing, journal))
        finally:
            journal.close()
            self._settle()
        return {ANSWERS: with_results(rows, [known[request.id] for request in requests])}

    def close(self) -> None:
        """Close the connections."""
        self._wait(self._asker.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _settle(self) -> None:
        """Write what was spent, once nothing is in flight."""

        async def settle() -> None:
            if not self._asker.in_flight:
                self._account.close()
                self._write_claim()

        self._wait(settle())

    def _write_claim(self) -> None:
        self._ledger.place.write_json(self._file, {"claimed": self._account.claimed})


def money_spent(place: Place, folder: str) -> float:
    """What was spent there, in the currency of the prices: requests whose fate nobody knows at their dearest."""
    return _claimed(place, folder)


def _claimed(place: Place, folder: str) -> float:
    return sum(float(place.read_json(name)["claimed"]) for name in place.names(folder, ".json"))


class _Repeat(Exception):
    """The request may pass if it is sent again; ``pushed_back``: the server has too many."""

    def __init__(self, reason: str, pushed_back: bool = False) -> None:
        super().__init__(reason)
        self.pushed_back = pushed_back


@dataclass(slots=True)
class _Asker:
    """Sends requests of all shards at once, in one event loop."""

    endpoint: EndpointConfig
    options: EngineOptions
    key: str | None
    account: Account
    write_claim: Any
    where: str
    client: httpx.AsyncClient
    pace: Pace
    changed: asyncio.Condition
    in_flight: int = 0
    folds: bool = False
    refused: int = 0
    answered: int = 0
    failure: EmbedloomError | None = field(default=None)

    async def answers(
        self, requests: Sequence[GenerationRequest], journal: AnswerJournal
    ) -> dict[str, GenerationResult]:
        """Ask all; where one fails for good, those in flight are waited for and the others are not sent."""
        found = await asyncio.gather(*(self._one(request, journal) for request in requests))
        if self.failure is not None:
            raise self.failure
        return {result.id: result for result in found if result is not None}

    async def close(self) -> None:
        await self.client.aclose()

    async def _one(self, request: GenerationRequest, journal: AnswerJournal) -> GenerationResult | None:
        try:
            result = await self._persisting(request)
        except EmbedloomError as error:
            self.failure = self.failure or error
            return None
        except Exception as error:  # a bug, or what no server should send
            text = self._without_key(f"{self._label}: {type(error).__name__}: {one_line(error, _SHOWN)}")
            self.failure = self.failure or StageError(text)
            return None
        finally:
            async with self.changed:
                self.changed.notify_all()
        if result is not None:
            journal.add(result)
        return result

    async def _persisting(self, request: GenerationRequest) -> GenerationResult | None:
        """Send a request until it is answered; None once another has failed for good."""
        tries, reason = 0, ""
        while tries <= self.endpoint.max_retries:
            if reason:
                await asyncio.sleep(_pause(max(1, tries)))
            before = self.answered
            try:
                return await self._once(request)
            except _Repeat as error:
                reason = str(error)
                # A server that pushes this one back while it answers others is not failing.
                tries += not (error.pushed_back and self.answered > before)
        raise StageError(f"{self._label}: no answer after {tries} tries ({reason})")

    async def _once(self, request: GenerationRequest) -> GenerationResult | None:
        body = request_body(request, self.endpoint, self.options, self.folds)
        most_tokens = _most_tokens(body, self.endpoint)
        most = self.endpoint.cost(*most_tokens) or 0.0
        booked = sum(most_tokens) / 2  # a token is some four bytes, and answers end before their limit
        if not await self._admitted(most):
            return None
        cost: float = most  # of a request whose fate nobody knows
        try:
            await self._until_due(booked)
            body = request_body(
                request, self.endpoint, self.options, self.folds
            )  # others may have learnt meanwhile
            sent = time.monotonic()
            response = await self._post(body, request.id, sent)
            if response.status_code != 200:
                cost = 0.0
                return await self._refused(request, response, sent, body)
            result, (prompt_tokens, output_tokens) = self._read(request, response)
            if prompt_tokens or output_tokens:
                cost = self.endpoint.cost(prompt_tokens, output_tokens) or 0.0
            self.pace.answered(booked, prompt_tokens + output_tokens)
            self.answered += 1
            return result
        finally:
            self.in_flight -= 1
            self.account.settle(most, cost)
            async with self.changed:
                self.changed.notify_all()

    async def _admitted(self, most: float) -> bool:
        """Wait for room among those in flight and in the budget; False once another request has failed for good."""
        async with self.changed:
            await self.changed.wait_for(
                lambda: (
                    self.failure is not None
                    or (
                        self.pace.has_room(self.in_flight)
                        and (self.account.holds(most) or not self.in_flight)
                    )
                )
            )
            if self.failure is not None:
                return False
            if not self.account.holds(most):
                raise self._broke(most)
            self.in_flight += 1
            if self.account.reserve(most) and self.account.budget is not None:
                self.write_claim()
            return True

    async def _until_due(self, tokens: float) -> None:
        await asyncio.sleep(self.pace.take(time.monotonic(), tokens))
        while (left := self.pace.pause_left(time.monotonic())) > 0:
            await asyncio.sleep(left)

    async def _post(self, body: Mapping[str, Any], identity: str, sent: float) -> httpx.Response:
        try:
            return await self.client.post(
                "chat/completions", json=body, headers={"Idempotency-Key": f"embedloom-{identity}"}
            )
        except httpx.TimeoutException as error:
            self.pace.pushed_back(sent, time.monotonic())
            raise _Repeat(f"no answer within {self.endpoint.timeout_seconds:g} s") from error
        except httpx.TransportError as error:
            raise _Repeat(f"{type(error).__name__}: {one_line(error, _SHOWN)}") from error

    async def _refused(
        self, request: GenerationRequest, response: httpx.Response, sent: float, body: Mapping[str, Any]
    ) -> GenerationResult:
        """What to do about another status than 200."""
        status, said = response.status_code, self._without_key(_message(response))
        text = f"{self._label}: HTTP {status}: {said}"
        if status in (401, 403):
            raise ConfigError(f"{text}; the key is taken from api_key_env: {self.endpoint.api_key_env!r}")
        if status == 404:
            raise ConfigError(
                f"{text}; model is {self.endpoint.model!r}, url must end where /chat/completions follows"
            )
        if status == 402 or "insufficient_quota" in said:
            raise StageError(f"{text}; answers that were paid for count in the next run")
        if status in _REPEATED or status >= 500:
            if status in _PUSHES_BACK:
                pause = retry_after(response.headers.get("retry-after"), time.time())
                self.pace.pushed_back(sent, time.monotonic(), pause)
            raise _Repeat(f"HTTP {status}: {said}", status in _PUSHES_BACK)
        told = any(message["role"] == "system" for message in body["messages"])
        if told and "system" in said.lower() and "role" in said.lower():
            self.folds = True  # Gemma's template behind the server; told in the user's turn from now on
            raise _Repeat(said)
        self.refused += 1
        if not self.answered and self.refused >= _REFUSED_IN_A_ROW:
            raise ConfigError(
                f"{text}; it refused all of {self.refused} requests; answer_format, token_limit_key, send_seed, system_role "
                "and extra_body say what is sent"
            )
        return GenerationResult.failed(request, f"HTTP {status}: {said}")

    def _read(
        self, request: GenerationRequest, response: httpx.Response
    ) -> tuple[GenerationResult, tuple[int, int]]:
        try:
            body = response.json()
            choice = body["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            usage = body.get("usage") or {}
            tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Repeat(f"half an answer: {one_line(response.text, 80)!r}") from error
        return _result(request, message, finish, tokens, self.options), tokens

    def _broke(self, most: float) -> StageError:
        account = self.account
        spent = account.earlier + account.spent
        return StageError(
            f"{self.where}.budget: {account.budget:g} does not hold another request: {spent:.4g} is spent, and one may cost "
            f"{most:.2g}; raise it and run again, answers that were paid for count"
        )

    def _without_key(self, text: str) -> str:
        return text if self.key is None else text.replace(self.key, "***")

    @property
    def _label(self) -> str:
        return f"{self.where}: {self.endpoint.model!r} at {self.endpoint.url}"


async def _open(
    endpoint: EndpointConfig, options: EngineOptions, key: str | None, account: Account, write_claim: Any, where: str,
    transport: Any,
) -> _Asker:  # fmt: skip
    most = endpoint.max_concurrency
    client = httpx.AsyncClient(
        base_url=endpoint.url.rstrip("/") + "/",
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
        timeout=endpoint.timeout_seconds,
        limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
        transport=transport,
    )
    pace = Pace(most, endpoint.requests_per_minute, endpoint.tokens_per_minute)
    return _Asker(
        endpoint, options, key, account, write_claim, where, client, pace, asyncio.Condition(),
        folds=not endpoint.system_role,
    )  # fmt: skip


def _pause(attempt: int) -> float:
    """Seconds before a repetition: twice as long each time, not all at once."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


# Requests and answers as the API has them.


def request_body(
    request: GenerationRequest, endpoint: EndpointConfig, options: EngineOptions, folds: bool = False
) -> dict[str, Any]:
    """The body of a request to ``/chat/completions``.

    Args:
        request: what is asked.
        endpoint: the server.
        options: of a model that thinks first.
        folds: whether system messages are said by the user.
    """
    messages = [dict(one) for one in request.messages]
    messages = folded(messages) if folds else messages
    thought = options.reasoning_tokens if options.reasoning else 0
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": messages,
        "temperature": request.temperature,
        "top_p": request.top_p,
        endpoint.token_limit_key: request.max_tokens + thought,
    }
    if endpoint.send_seed:
        body["seed"] = request.seed
    if options.chat_template_kwargs:
        body["chat_template_kwargs"] = dict(options.chat_template_kwargs)
    if request.json_schema is not None:
        _ask_for_json(body, request.json_schema, endpoint)
    return body | endpoint.extra_body


def _ask_for_json(body: dict[str, Any], schema: Mapping[str, Any], endpoint: EndpointConfig) -> None:
    form = endpoint.answer_format
    if form in ("json_schema", "json_schema_strict"):
        stated: dict[str, Any] = {"name": "answer", "schema": dict(schema)}
        if form == "json_schema_strict":
            stated = {"name": "answer", "strict": True, "schema": _unbounded(schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": stated}
        return
    if form == "json_object":
        body["response_format"] = {"type": "json_object"}
    asked = "Answer with one JSON object of this JSON Schema and nothing else: "
    last = body["messages"][-1]
    last["content"] = f"{last['content']}\n\n{asked}{json.dumps(schema, ensure_ascii=False)}"


def _unbounded(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {key: _unbounded(value) for key, value in schema.items() if key not in _UNBOUNDED}
    return [_unbounded(one) for one in schema] if isinstance(schema, list | tuple) else schema


def _most_tokens(body: Mapping[str, Any], endpoint: EndpointConfig) -> tuple[int, int]:
    """Tokens of prompt and answer at most: no tokenizer makes more of a text than it has bytes; some mark each message."""
    size = len(json.dumps(body["messages"], ensure_ascii=False).encode("utf-8", "surrogatepass"))
    size += len(json.dumps(body.get("response_format", {})))
    return size + 16 * len(body["messages"]), int(body[endpoint.token_limit_key])


def _result(
    request: GenerationRequest,
    message: Mapping[str, Any],
    finish: str | None,
    tokens: tuple[int, int],
    options: EngineOptions,
) -> GenerationResult:
    content = message.get("content")
    if finish == "content_filter" or message.get("refusal"):
        said = one_line(message.get("refusal") or content or "", _SHOWN)
        return GenerationResult.failed(request, f"the server refused to answer: {said}", tokens[0])
    if finish != ENGINE_CUT and not content:
        return GenerationResult.failed(request, "the model ended before it answered", tokens[0])
    text = str(content or "")
    if options.reasoning is not None and any(
        mark in text for mark in _MARKS
    ):  # most servers take it out themselves
        text = answer_of(text, options.reasoning) or ""
    return GenerationResult(
        request.id, _bare(text), ENGINE_CUT if finish == ENGINE_CUT else ENGINE_FINISHED, *tokens
    )


def _bare(text: str) -> str:
    """JSON without the fence that chat models set around code."""
    inner = text.strip()
    if inner.startswith("```") and inner.endswith("```") and "\n" in inner:
        return inner.split("\n", 1)[1].removesuffix("```").strip()
    return text


def _message(response: httpx.Response) -> str:
    """What a server says about a refusal, in one line."""
    try:
        body = response.json()
        error = body.get("error", body)
        if isinstance(error, dict):
            said = " ".join(str(error[key]) for key in ("code", "message", "detail") if error.get(key))
            return one_line(said or error, _SHOWN)
        return one_line(error, _SHOWN)
    except (ValueError, AttributeError):
        return one_line(response.text, _SHOWN)
