"""The gateway: HTTP in front of several encoder replicas.

A hop of its own, so that encoders can be scaled (to zero, too) and replaced behind one address, a request
whose replica died runs again on another, and one registry sees every request.
"""

import asyncio
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from embedloom.serving.api import create_api
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.corpus_source import CorpusSource
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal
from embedloom.serving.refusals import ApiError
from embedloom.serving.request_log import log_to_stderr

_ATTEMPTS = 3  # encoding changes nothing, so a request whose replica died may run again


class HandleBackend:
    """Encoder replicas behind a Serve handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Vectors, or why not.

        Raises:
            ApiError: 503, no replica lives long enough to answer.
        """
        result: EncodeResult | Refusal = await self._call("encode", job)
        return result

    async def tokenize(self, job: EncodeJob) -> list[list[int]] | Refusal:
        """Token ids, or why not.

        Raises:
            ApiError: as ``encode``.
        """
        result: list[list[int]] | Refusal = await self._call("tokenize", job)
        return result

    async def describe(self) -> ModelInfo:
        """The loaded model."""
        info: ModelInfo = await self._call("describe")
        return info

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


class Gateway:
    """The HTTP ingress; one replica, so its metrics are all of them."""

    def __init__(
        self, encoder: DeploymentHandle, settings: EndpointSettings, corpus: CorpusSource | None = None
    ) -> None:
        self._backend = HandleBackend(encoder)
        self._settings = settings
        self._corpus = corpus.open() if corpus is not None else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve calls this inside the replica, because its metrics cannot be pickled."""
        log_to_stderr()
        return create_api(self._backend, self._settings, corpus=self._corpus)
