"""Encoder replicas behind a Serve handle, as a backend of the HTTP side."""

import asyncio
import math
import time
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from embedloom.serving.applications import running_replicas
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal, TokenizeResult
from embedloom.serving.refusals import ApiError
from embedloom.serving.scheduling import LANES

ENCODERS = "encoder"  # the deployment
_SILENT_SECONDS = 60.0
_COUNT_SECONDS = 1.0  # how long a count of replicas is believed
_CONTROLLER_SECONDS = 2.0  # that it may take to say so
_ATTEMPTS = 3  # encoding changes nothing, so a request whose replica died may run again


class HandleBackend:
    """Encoder replicas behind a Serve handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._queues: dict[str, tuple[float, dict[str, int]]] = {}  # by replica: when told, tokens by lane
        self._replicas, self._counted = 0, -math.inf  # and when it was so

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Vectors, or why not.

        Raises:
            ApiError: 503, no replica lives long enough to answer.
        """
        result: EncodeResult | Refusal = await self._call("encode", job)
        if isinstance(result, EncodeResult):
            self._queues[result.replica] = time.monotonic(), result.queued
        return result

    async def tokenize(self, job: EncodeJob) -> TokenizeResult | Refusal:
        """Token ids, or why not.

        Raises:
            ApiError: as ``encode``.
        """
        result: TokenizeResult | Refusal = await self._call("tokenize", job)
        return result

    async def describe(self) -> ModelInfo:
        """The loaded model."""
        info: ModelInfo = await self._call("describe")
        return info

    def queued_tokens(self) -> dict[str, int]:
        """Tokens that wait at all replicas, by lane, as each said with its newest answer.

        The answer after which nothing waits says so; a replica silent for long is gone.
        """
        now = time.monotonic()
        self._queues = {tag: told for tag, told in self._queues.items() if now - told[0] < _SILENT_SECONDS}
        return {lane: sum(queued.get(lane, 0) for _, queued in self._queues.values()) for lane in LANES}

    async def replicas(self) -> int:
        """Encoders that are up, as Serve's controller says: asking one would start it, or keep it up.

        What was last known while the controller does not answer.
        """
        if time.monotonic() - self._counted > _COUNT_SECONDS:
            try:
                async with asyncio.timeout(_CONTROLLER_SECONDS):
                    self._replicas = await asyncio.to_thread(
                        running_replicas, self._handle.app_name, ENCODERS
                    )
                self._counted = time.monotonic()
            except Exception:  # whatever is wrong with the controller
                if math.isinf(self._counted):
                    raise
        return self._replicas

    async def _call(self, method: str, *arguments: Any) -> Any:
        cause: Exception | None = None
        for _ in range(_ATTEMPTS):
            answer = getattr(self._handle, method).remote(*arguments)
            try:
                return await answer
            except asyncio.CancelledError:
                answer.cancel()  # the client left or time is up: the replica need not go on
                raise
            except RayActorError as error:
                cause = error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise ApiError(503, "no encoder replica is available", code="unavailable") from error
        raise ApiError(
            503, f"{_ATTEMPTS} encoder replicas died over this request", code="unavailable"
        ) from cause


def encoders_of(application: str) -> HandleBackend:
    """The encoders of a running application."""
    return HandleBackend(serve.get_deployment_handle(ENCODERS, application))
