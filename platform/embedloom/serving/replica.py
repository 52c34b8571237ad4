"""What holds an encoder on Serve: one of several behind a gateway, or one with the HTTP side in its process.

Plain classes; app.py makes deployments of them.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve

from embedloom.config.base import validate
from embedloom.serving.api import create_api
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.corpus_source import CorpusSource
from embedloom.serving.ingress import Ingress
from embedloom.serving.loading import ModelSpec, load_service
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal, TokenizeResult
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.request_log import log_to_stderr
from embedloom.serving.service import BatchSettings


class EncoderReplica:
    """One of several encoders behind a gateway."""

    def __init__(self, spec: ModelSpec) -> None:
        self._tag = serve.get_replica_context().replica_tag
        self._service = load_service(spec)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply ``BatchSettings`` changed in the Serve config, without a restart."""
        self._service.configure(validate(BatchSettings, user_config, "encoder.user_config"))

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """See ``EncoderService.encode``."""
        result = await self._service.encode(job)
        if isinstance(result, EncodeResult):
            result.replica = self._tag
        return result

    async def tokenize(self, job: EncodeJob) -> TokenizeResult | Refusal:
        """See ``EncoderService.tokenize``."""
        return await self._service.tokenize(job)

    async def describe(self) -> ModelInfo:
        """See ``EncoderService.describe``."""
        return await self._service.describe()


class EncoderEndpoint(Ingress):
    """The only encoder of an endpoint, answering HTTP itself: one process and one hop less."""

    def __init__(
        self,
        spec: ModelSpec,
        settings: EndpointSettings,
        corpus: CorpusSource | None,
        blueprint: dict[str, Any],
    ) -> None:
        self._service = load_service(spec)
        super().__init__(self._service, settings, corpus, blueprint)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply ``BatchSettings`` changed in the Serve config, without a restart."""
        self._service.configure(validate(BatchSettings, user_config, "endpoint.user_config"))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve calls this inside the replica."""
        log_to_stderr()
        metrics = EndpointMetrics()
        metrics.watch_queue(self._service.queued_tokens)
        return self.listening(create_api(self.router, self.settings, metrics, self.corpus, self.stopping))
