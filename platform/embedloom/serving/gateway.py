"""The gateway: HTTP in front of several encoder replicas.

A hop of its own, so that encoders can be scaled (to zero, too) and replaced behind one address, a request
whose replica died runs again on another, and one registry sees every request.
"""

from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from embedloom.serving.api import create_api
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.corpus_source import CorpusSource
from embedloom.serving.handles import HandleBackend, encoders_of
from embedloom.serving.ingress import Ingress
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.request_log import log_to_stderr


class Gateway(Ingress):
    """The HTTP ingress; one replica, so its metrics are all of them."""

    def __init__(
        self,
        encoders: DeploymentHandle | str,
        settings: EndpointSettings,
        corpus: CorpusSource | None,
        blueprint: dict[str, Any],
    ) -> None:
        """Build one.

        Args:
            encoders: a handle, or the name of the application they run in.
            settings: names and limits.
            corpus: what ``/v1/search`` searches.
            blueprint: the ``ApplicationArgs`` this endpoint was built from.
        """
        self.backend = encoders_of(encoders) if isinstance(encoders, str) else HandleBackend(encoders)
        application = encoders if isinstance(encoders, str) else None
        super().__init__(self.backend, settings, corpus, blueprint, application)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve calls this inside the replica, because its metrics cannot be pickled."""
        log_to_stderr()
        metrics = EndpointMetrics()
        metrics.watch_queue(self.backend.queued_tokens)
        return self.listening(create_api(self.router, self.settings, metrics, self.corpus, self.stopping))
