"""The actor that writes texts: a table of requests in, the same table with the answers beside them out.

It knows nothing of what the texts are for. Requests are made and answers are read in tasks on free CPUs, so an
actor with a GPU does nothing but decode.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.config.synthesis import EngineOptions
from embedloom.engines.protocol import EngineFactory, GenerationRequest, GenerationResult

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

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Answer the requests of one shard."""
        results = self._engine.generate(read_requests(rows))
        for field in ANSWER_SCHEMA:
            name = "text" if field.name == "answer" else field.name
            rows = rows.append_column(field, pa.array([getattr(one, name) for one in results], field.type))
        return {ANSWERS: rows}


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
