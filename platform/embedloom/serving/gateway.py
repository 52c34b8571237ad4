"""HTTP in front of encoder replicas: the gateway, the handle to its replicas, and what both HTTP deployments share. Imports no
torch, which a gateway without a corpus never needs.
"""

import asyncio
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from embedloom.config.base import validate
from embedloom.config.serving import ApplicationArgs
from embedloom.serving.api import create_api
from embedloom.serving.applications import running_replicas
from embedloom.serving.batches.routes import BatchDesk
from embedloom.serving.calls import Backend, EndpointSettings
from embedloom.serving.front import Drain, KeyRing, log_to_stderr
from embedloom.serving.listener import ReplicaServer
from embedloom.serving.members import Member
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal, TokenizeResult
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.peers import (
    ANSWER_SECONDS,
    Queues,
    Snapshot,
    Usage,
    UsageExchange,
    gathered,
    merged,
    queued_tokens,
    snapshot,
)
from embedloom.serving.refusals import ApiError
from embedloom.serving.rollout.router import TrialOrders, VersionRouter
from embedloom.serving.rollout.trial import Window
from embedloom.serving.routing import board_of
from embedloom.serving.scheduling import LANES
from embedloom.serving.searching import CorpusSource, InThreads, Lookup, RemoteCorpus
from embedloom.serving.tracing import Tracing

# Encoder replicas behind a Serve handle, as a backend of the HTTP side.


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
        self._board = board_of(handle.app_name, handle.deployment_name)
        self._replicas, self._counted = 0, -math.inf  # and when it was so

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Vectors, or why not.

        Raises:
            ApiError: 503, no replica lives long enough to answer.
        """
        result: EncodeResult | Refusal = await self._call("encode", job)
        if isinstance(result, EncodeResult):
            self._queues[result.replica] = time.monotonic(), result.queued
            waiting = float(sum(result.queued.values()))
            self._board.told(result.replica, waiting, result.tokens_per_second)
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
        return queued_tokens([self.queues()], LANES)

    def queues(self) -> Queues:
        """Tokens that wait at each replica, by lane, and how many seconds ago it said so."""
        now = time.monotonic()
        self._queues = {tag: told for tag, told in self._queues.items() if now - told[0] < _SILENT_SECONDS}
        return {tag: (now - when, queued) for tag, (when, queued) in self._queues.items()}

    async def replicas(self) -> int:
        """Encoders that are up, as Serve's controller says: asking one would start it, or keep it up.

        What was last known while the controller does not answer.
        """
        if time.monotonic() - self._counted > _COUNT_SECONDS:
            try:
                async with asyncio.timeout(_CONTROLLER_SECONDS):
                    self._replicas = await asyncio.to_thread(
                        running_replicas, self._handle.app_name, self._handle.deployment_name
                    )
                self._counted = time.monotonic()
            except Exception:  # whatever is wrong with the controller
                if math.isinf(self._counted):
                    raise
        return self._replicas

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await call_replica(self._handle, "encoder", method, *arguments)


async def call_replica(handle: DeploymentHandle, kind: str, method: str, *arguments: Any) -> Any:
    """What a method of one of the replicas answers; another one is asked where one died over it.

    Args:
        handle: of the deployment.
        kind: what they are, for people.
        method: one that changes nothing, so that it may run again.
        arguments: its arguments.

    Raises:
        ApiError: 503, no replica lives long enough to answer.
    """
    cause: Exception | None = None
    for _ in range(_ATTEMPTS):
        answer = getattr(handle, method).remote(*arguments)
        try:
            return await answer
        except asyncio.CancelledError:
            answer.cancel()  # the client left or time is up: the replica need not go on
            raise
        except RayActorError as error:
            cause = error
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise ApiError(503, f"no {kind} replica is available", code="unavailable") from error
    raise ApiError(503, f"{_ATTEMPTS} {kind} replicas died over this request", code="unavailable") from cause


def encoders_of(application: str) -> HandleBackend:
    """The encoders of a running application."""
    return HandleBackend(serve.get_deployment_handle(ENCODERS, application))


def _opened(corpus: CorpusSource, searchers: DeploymentHandle | None, gateways: int) -> Lookup:
    """The corpus as the routes ask it."""
    if searchers is None:
        return InThreads(corpus.open(mapped=gateways > 1))
    call = functools.partial(call_replica, searchers, "search")
    return RemoteCorpus(call, corpus.identity, corpus.card(), corpus.contract_hash)


# What both HTTP deployments share: the router over versions, and the calls by which `embedloom deploy` steers it.


class Ingress:
    """Base of the deployments that answer HTTP; its methods are called by handle, never by HTTP."""

    def __init__(
        self,
        live: Backend,
        settings: EndpointSettings,
        corpus: CorpusSource | None,
        blueprint: dict[str, Any],
        encoders: str | None = None,
        batches: DeploymentHandle | None = None,
        reranker: DeploymentHandle | None = None,
        searchers: DeploymentHandle | None = None,
    ) -> None:
        """Build one.

        Args:
            live: what encodes.
            settings: names and limits.
            corpus: what ``/v1/search`` searches.
            blueprint: the ``ApplicationArgs`` this endpoint was built from.
            encoders: the application that ``live`` runs in, where it is another one.
            batches: the deployment that has batches computed.
            reranker: the deployment that orders documents; None: similarity does.
            searchers: the deployment that searches the corpus; None: this process does.
        """
        self.settings = settings
        self.stopping = Drain()
        self._server: ReplicaServer | None = None
        self._tracing: Tracing | None = None
        self.router = VersionRouter(live, settings.request_timeout_seconds)
        gateways = validate(ApplicationArgs, blueprint, "endpoint").serving.gateways
        self.corpus = None if corpus is None else _opened(corpus, searchers, gateways)
        self._blueprint = blueprint
        # The applications of encoders by the names of their models; none where they are bound into this one.
        self._applications = {settings.served_name: encoders} if encoders is not None else {}
        self._batches = batches
        self.reranker = None if reranker is None else HandleBackend(reranker)
        self._tried: tuple[str, Backend] | None = (
            None  # application and its handle: one a trial, not one a call
        )

    def listening(self, app: FastAPI) -> FastAPI:
        """The application, which also answers by itself where a listening socket is lent; called in the replica's event loop."""
        args = validate(ApplicationArgs, self._blueprint, "endpoint")
        if args.listener is not None:
            self._server = ReplicaServer(app, args.listener, args.serving.route_prefix)
        return app

    def desk(self) -> BatchDesk | None:
        """Where batches are taken; None where the endpoint takes none."""
        handle = self._batches
        limits = validate(ApplicationArgs, self._blueprint, "endpoint").serving.batches
        if handle is None or limits is None:
            return None
        return BatchDesk(limits, self._blueprint, lambda: handle.wake.remote())

    def traced(self) -> Tracing | None:
        """Where traces of requests go; None: there are none. Called in the replica, whose exporter has a thread."""
        config = validate(ApplicationArgs, self._blueprint, "endpoint").serving.traces
        if config is not None:
            process = serve.get_replica_context().replica_tag
            self._tracing = Tracing.of(config, self.settings.served_name, process)
        return self._tracing

    async def __del__(self) -> None:
        """Serve awaits this when it stops the replica, with its grace period as limit."""
        server, self._server = self._server, None
        if server is not None:
            await server.leave()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def drain(self, seconds: float) -> int:
        """Take no more requests, and wait for those in hand; returns how many were not done in time (503)."""
        return await self.stopping.run(seconds)

    async def describe_endpoint(self) -> tuple[dict[str, Any], ModelInfo, dict[str, str]]:
        """The ``ApplicationArgs`` this endpoint was built from, its model, and by name of their models the applications of
        encoders.
        """
        return self._blueprint, await self.router.describe(), self._applications

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


# The gateway: HTTP in front of several encoder replicas.
#
# A hop of its own, so that encoders can be scaled (to zero, too) and replaced behind one address, a request
# whose replica died runs again on another, and one registry sees every request.


FurtherModel = tuple[DeploymentHandle | str, EndpointSettings]  # its encoders, or the application they run in


class Gateway(Ingress):
    """The HTTP ingress: one process, or several that count together what their keys use and show each other's metrics."""

    def __init__(
        self,
        encoders: DeploymentHandle | str,
        settings: EndpointSettings,
        corpus: CorpusSource | None,
        blueprint: dict[str, Any],
        batches: DeploymentHandle | None = None,
        further: Mapping[str, FurtherModel] | None = None,
        reranker: DeploymentHandle | None = None,
        searchers: DeploymentHandle | None = None,
    ) -> None:
        """Build one.

        Args:
            encoders: a handle, or the name of the application they run in.
            settings: names and limits.
            corpus: what ``/v1/search`` searches.
            blueprint: the ``ApplicationArgs`` this endpoint was built from.
            batches: the deployment that has batches computed.
            further: by name, the encoders and settings of other models.
            reranker: the deployment that orders documents; None: similarity does.
            searchers: the deployment that searches the corpus; None: this process does.
        """
        self.backend = encoders_of(encoders) if isinstance(encoders, str) else HandleBackend(encoders)
        application = encoders if isinstance(encoders, str) else None
        super().__init__(self.backend, settings, corpus, blueprint, application, batches, reranker, searchers)
        given = further or {}
        others = {
            name: encoders_of(found) if isinstance(found, str) else HandleBackend(found)
            for name, (found, _) in given.items()
        }
        self._further = [Member(others[name], own) for name, (_, own) in given.items()]
        self._backends = [self.backend, *others.values()]
        self._applications |= {name: found for name, (found, _) in given.items() if isinstance(found, str)}
        self._keys = KeyRing(settings.keys) if settings.keys else None
        self._exchange: asyncio.Task[None] | None = None
        self._gateways: DeploymentHandle | None = None  # all of them, this one included
        self._name = ""
        self._metrics = EndpointMetrics()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve calls this inside the replica, because its metrics cannot be pickled."""
        log_to_stderr()
        if validate(ApplicationArgs, self._blueprint, "endpoint").serving.gateways > 1:
            self._join()
        else:
            self._metrics.watch_queue(lambda: queued_tokens([self._queues()], LANES))
        api = create_api(
            self.router,
            self.settings,
            self._metrics,
            self.corpus,
            self.stopping,
            self._keys,
            self.desk(),
            self._further,
            self.traced(),
            self.reranker,
        )
        return self.listening(api)

    def _join(self) -> None:
        """Become one of several."""
        context = serve.get_replica_context()
        self._name = context.replica_tag
        self._gateways = serve.get_deployment_handle(context.deployment, context.app_name)
        self._metrics.everywhere = self._everywhere
        if self._keys is not None and self._keys.has_quotas:
            exchange = UsageExchange(self._name, self._keys.collect, self._broadcast)
            self._exchange = asyncio.get_running_loop().create_task(exchange.run())

    async def __del__(self) -> None:
        """See ``Ingress``."""
        if self._exchange is not None:
            self._exchange.cancel()
        await super().__del__()

    def _queues(self) -> Queues:
        """Of all models' replicas, whose names differ."""
        return {tag: told for one in self._backends for tag, told in one.queues().items()}

    async def metrics_snapshot(self) -> Snapshot:
        """This gateway's metrics, for the one that was asked for all."""
        return snapshot(self._name, self._metrics.registry, self._queues())

    async def used_elsewhere(self, gateway: str, usage: Usage) -> None:
        """Another gateway says what its keys used."""
        if self._keys is not None and gateway != self._name:
            self._keys.take_elsewhere(usage)

    async def _everywhere(self) -> CollectorRegistry:
        return merged(await gathered(await self.metrics_snapshot(), self._broadcast), LANES)

    async def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """What each gateway that lives answers to a call."""
        if self._gateways is None:
            raise RuntimeError("one gateway has nobody to ask")
        asked = self._gateways.broadcast(method, *arguments)
        answers = await asked.results_async(timeout_s=ANSWER_SECONDS, return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]
