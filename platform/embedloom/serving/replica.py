"""What holds an encoder on Serve: one of several behind a gateway, or one with the HTTP side in its process.

Plain classes; app.py makes deployments of them.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve

from embedloom.config.base import validate
from embedloom.encoder.device import DTypeName
from embedloom.encoder.model import Encoder
from embedloom.encoder.shared import SharedWeights
from embedloom.serving.api import create_api
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.corpus_source import CorpusSource
from embedloom.serving.ingress import Ingress
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.request_log import log_to_stderr
from embedloom.serving.service import BatchSettings, EncoderService
from embedloom.serving.weights import mapped_weights


def load_service(
    model_folder: str,
    threads: int,
    dtype: DTypeName,
    settings: BatchSettings,
    fingerprint: str,
    weights: SharedWeights | None = None,
) -> EncoderService:
    """Load a model folder for serving and run it once; ``weights`` are used in place of the folder's.

    Raises:
        DataError: not a model folder, or a broken one.
    """
    encoder = Encoder.load(Path(model_folder), threads=threads, dtype=dtype, weights=weights)
    # The first forward pass allocates and picks kernels; no client should pay for it.
    encoder.embed_tokens([[0] * 8])
    return EncoderService(encoder, settings, fingerprint)


class EncoderReplica:
    """One of several encoders behind a gateway."""

    def __init__(
        self,
        model_folder: str,
        threads: int,
        dtype: DTypeName,
        settings: BatchSettings,
        fingerprint: str,
        shared: bool = False,
    ) -> None:
        self._tag = serve.get_replica_context().replica_tag
        weights = mapped_weights() if shared else None
        self._service = load_service(model_folder, threads, dtype, settings, fingerprint, weights)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply ``BatchSettings`` changed in the Serve config, without a restart."""
        self._service.configure(validate(BatchSettings, user_config, "encoder.user_config"))

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """See ``EncoderService.encode``."""
        result = await self._service.encode(job)
        if isinstance(result, EncodeResult):
            result.replica = self._tag
        return result

    async def tokenize(self, job: EncodeJob) -> list[list[int]] | Refusal:
        """See ``EncoderService.tokenize``."""
        return await self._service.tokenize(job)

    async def describe(self) -> ModelInfo:
        """See ``EncoderService.describe``."""
        return await self._service.describe()


class EncoderEndpoint(Ingress):
    """The only encoder of an endpoint, answering HTTP itself: one process and one hop less."""

    def __init__(
        self,
        model_folder: str,
        threads: int,
        dtype: DTypeName,
        batching: BatchSettings,
        fingerprint: str,
        settings: EndpointSettings,
        corpus: CorpusSource | None,
        blueprint: dict[str, Any],
    ) -> None:
        self._service = load_service(model_folder, threads, dtype, batching, fingerprint)
        super().__init__(self._service, settings, corpus, blueprint)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply ``BatchSettings`` changed in the Serve config, without a restart."""
        self._service.configure(validate(BatchSettings, user_config, "endpoint.user_config"))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve calls this inside the replica."""
        log_to_stderr()
        metrics = EndpointMetrics()
        metrics.watch_queue(self._service.queued_tokens)
        return create_api(self.router, self.settings, metrics, self.corpus)
