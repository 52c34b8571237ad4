"""Computing one batch: its lines through actors in exactly-once shards, each answered by the endpoint's own routes.

An actor holds the model and, in its process, the application that answers HTTP; a line is a request to it. So prompts, names of
models, dimensions, encodings and refusals are the endpoint's, and there is no second rule of them.
"""

import asyncio
import secrets
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
import pyarrow as pa
from fastapi import FastAPI
from pydantic_core import to_json

from embedloom.compute.shards import Handling, Starts, elsewhere, run_sharded
from embedloom.config.base import validate
from embedloom.config.cluster import PoolConfig, ServeScaling
from embedloom.config.serving import ApplicationArgs, BatchesConfig
from embedloom.core.storage import Place
from embedloom.encoder.registry import fetched_by_name
from embedloom.serving.api import create_api
from embedloom.serving.batches.lines import (
    LINES_FOLDER,
    RESULTS_FOLDER,
    answer_line,
    lines_read,
    refusal_line,
    request_name,
    requests_of,
    results_table,
    write_lines,
)
from embedloom.serving.batches.objects import WINDOW_SECONDS
from embedloom.serving.batches.store import Batch, FileStore
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.replica import ModelSpec, load_service

Found = TypeVar("Found")
_AT_ONCE = 32  # lines of a shard that are asked together, so that batches of the model fill up
_TRIES = 3  # of a line that the application had no answer to
_NO_LIMIT = 2**40


@dataclass(frozen=True, slots=True)
class BatchParts:
    """The model that computes a batch, the settings that answer its lines, and what a replica of it reserves."""

    spec: ModelSpec
    settings: EndpointSettings
    scaling: ServeScaling


# Of an endpoint's arguments, the model of that name for that key; app.py hands it in.
Resolve = Callable[[ApplicationArgs, str | None, str], BatchParts]


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What a batch is computed from."""

    batch: Batch
    place: Place  # of all files and batches
    limits: BatchesConfig
    resolve: Resolve

    def run(self) -> None:
        """Read the file, once, and compute what is missing.

        Raises:
            NotFound: the file is no more.
            DataError: it has too many lines, or none; or the model is not there, or not for this key.
            StageError: actors had no place, or died over the same lines again and again.
        """
        batch = self.batch
        files = FileStore(self.place, self.limits)
        content = files.chunks(batch.owner, batch.request["input_file_id"])
        write_lines(requests_of(content, batch.request["endpoint"], self.limits.max_lines), batch.work)
        _, model = lines_read(batch.work) or (0, None)
        parts = self.resolve(validate(ApplicationArgs, batch.blueprint, batch.id), model, batch.owner)
        spec, settings = unhurried(parts.spec, parts.settings)
        run_sharded(
            stage="batch",
            source=batch.work,
            source_folder=LINES_FOLDER,
            output=batch.work,
            done_folder=RESULTS_FOLDER,
            shard_rows=_NO_LIMIT,  # a file is a shard
            worker=BatchWorker,
            worker_arguments={"batch": batch.id, "spec": spec, "settings": settings},
            pool=self.limits.pool or _like_a_replica(parts.scaling),
            unit="requests",
            by_file=True,
            handling=Handling(
                starts=Starts(batch.work.child("starts"), secrets.token_hex(4)),
                weights=elsewhere(fetched_by_name(spec.folder)),
            ),
        )


def _like_a_replica(scaling: ServeScaling) -> PoolConfig:
    """One actor that reserves what a replica does."""
    return PoolConfig(
        cpus=scaling.cpus, gpus=scaling.gpus, threads=scaling.threads, start_seconds=scaling.start_seconds
    )


def unhurried(spec: ModelSpec, settings: EndpointSettings) -> tuple[ModelSpec, EndpointSettings]:
    """The same model and names where nobody waits: no keys, no hosts, no log, and time until the batch expires."""
    batching = spec.batching.model_copy(
        update={"max_queued_tokens": _NO_LIMIT, "request_timeout_seconds": float(WINDOW_SECONDS)}
    )
    calm = settings.model_copy(
        update={
            "keys": (),
            "hosts": (),
            "allowed_origins": (),
            "allowed_keys": None,
            "request_log": "none",
            "max_requests": _AT_ONCE,
            "request_timeout_seconds": float(WINDOW_SECONDS),
        }
    )
    return replace(spec, batching=batching, shared=False), calm


class BatchWorker:
    """Actor that answers the lines of one shard."""

    def __init__(self, batch: str, spec: ModelSpec, settings: EndpointSettings) -> None:
        """Load the model.

        Args:
            batch: id.
            spec: of the model.
            settings: of the application.
        """
        metrics = EndpointMetrics()
        service = load_service(spec)
        self._answers = Answers(batch, create_api(service, settings, metrics), metrics)
        self._thread = _LoopThread()

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """The shard's results."""
        return {RESULTS_FOLDER: self._thread.run(self._answers.of(rows))}


class Answers:
    """Asks an application in this process, many lines at a time."""

    def __init__(self, batch: str, api: FastAPI, metrics: EndpointMetrics) -> None:
        self._batch = batch
        self._api = api
        self._metrics = metrics

    async def of(self, rows: pa.Table) -> pa.Table:
        """Results of a table of lines, see ``LINE_SCHEMA`` and ``RESULT_SCHEMA``."""
        before = self._metrics.embedded_tokens()
        room = asyncio.Semaphore(_AT_ONCE)
        # Errors are answers here; what is raised is a fault of ours, and ends the shard.
        transport = httpx.ASGITransport(self._api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
            found = await asyncio.gather(*(self._result(client, room, row) for row in rows.to_pylist()))
        return results_table(found, self._metrics.embedded_tokens() - before)

    async def _result(
        self, client: httpx.AsyncClient, room: asyncio.Semaphore, row: dict[str, Any]
    ) -> dict[str, Any]:
        name = request_name(self._batch, row["number"])
        if row["body"] is None:
            line = refusal_line(name, row["custom_id"], row["code"], row["message"])
            return {"number": row["number"], "answered": False, "line": line}
        async with room:
            reply = await self._asked(client, row["body"].encode())
        body = (
            reply.content if reply.headers.get("content-type") == "application/json" else to_json(reply.text)
        )
        line = answer_line(
            name, row["custom_id"], reply.status_code, reply.headers.get("x-request-id", name), body
        )
        return {"number": row["number"], "answered": reply.status_code == 200, "line": line}

    async def _asked(self, client: httpx.AsyncClient, body: bytes) -> httpx.Response:
        for left in reversed(range(_TRIES)):
            reply = await client.post(
                "/v1/embeddings", content=body, headers={"content-type": "application/json"}
            )
            if reply.status_code < 500 or not left:
                break
        return reply


class _LoopThread:
    """An event loop of its own: Ray calls an actor from threads that may have one, or none."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="answers", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Found]) -> Found:
        """What a coroutine gives."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
