"""What both HTTP deployments share: the router over versions, and the calls by which `embedloom deploy` steers it."""

from typing import Any

from fastapi import FastAPI

from embedloom.config.application import ApplicationArgs
from embedloom.config.base import validate
from embedloom.serving.calls import Backend, EndpointSettings
from embedloom.serving.corpus_source import CorpusSource
from embedloom.serving.front import Drain
from embedloom.serving.handles import encoders_of
from embedloom.serving.listener_handoff import ReplicaServer
from embedloom.serving.messages import ModelInfo
from embedloom.serving.trial import Window
from embedloom.serving.versions import TrialOrders, VersionRouter


class Ingress:
    """Base of the deployments that answer HTTP; its methods are called by handle, never by HTTP."""

    def __init__(
        self,
        live: Backend,
        settings: EndpointSettings,
        corpus: CorpusSource | None,
        blueprint: dict[str, Any],
        encoders: str | None = None,
    ) -> None:
        """Build one.

        Args:
            live: what encodes.
            settings: names and limits.
            corpus: what ``/v1/search`` searches.
            blueprint: the ``ApplicationArgs`` this endpoint was built from.
            encoders: the application that ``live`` runs in, where it is another one.
        """
        self.settings = settings
        self.stopping = Drain()
        self._server: ReplicaServer | None = None
        self.router = VersionRouter(live, settings.request_timeout_seconds)
        self.corpus = corpus.open() if corpus is not None else None
        self._blueprint = blueprint
        self._encoders = encoders
        self._tried: tuple[str, Backend] | None = (
            None  # application and its handle: one a trial, not one a call
        )

    def listening(self, app: FastAPI) -> FastAPI:
        """The application, which also answers by itself where a listening socket is lent; called in the replica's event loop."""
        args = validate(ApplicationArgs, self._blueprint, "endpoint")
        if args.listener is not None:
            self._server = ReplicaServer(app, args.listener, args.serving.route_prefix)
        return app

    async def __del__(self) -> None:
        """Serve awaits this when it stops the replica, with its grace period as limit."""
        server, self._server = self._server, None
        if server is not None:
            await server.leave()

    async def drain(self, seconds: float) -> int:
        """Take no more requests, and wait for those in hand; returns how many were not done in time (503)."""
        return await self.stopping.run(seconds)

    async def describe_endpoint(self) -> tuple[dict[str, Any], ModelInfo, str | None]:
        """The ``ApplicationArgs`` this endpoint was built from, its model, and the application of its encoders."""
        return self._blueprint, await self.router.describe(), self._encoders

    async def order_trial(self, orders: dict[str, Any]) -> Window:
        """Begin or renew the trial of a new version (``TrialOrders``); returns what was seen so far."""
        checked = validate(TrialOrders, orders, "trial")
        if self._tried is None or self._tried[0] != checked.application:
            self._tried = checked.application, encoders_of(checked.application)
        self.router.order(checked, self._tried[1])
        return self.router.window()

    async def end_trial(self) -> Window:
        """End the trial; returns what was seen."""
        window = self.router.window()
        self.router.end()
        return window
