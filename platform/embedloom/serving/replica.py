"""What holds an encoder on Serve: one of several behind a gateway, or one with the HTTP side in its process; and its weights,
one copy per node.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import DeploymentActorConfig
from ray.serve.handle import DeploymentHandle

from embedloom.config.base import validate
from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ServingEngine
from embedloom.encoder.backbone import DTypeName, SharedWeights
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import NodeModel, local_folder
from embedloom.retrieval.embedder import read_stored
from embedloom.serving.api import create_api
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.front import log_to_stderr
from embedloom.serving.gateway import Ingress
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal, TokenizeResult
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.scheduling import ComputeStreams
from embedloom.serving.searching import CorpusSource
from embedloom.serving.service import BatchSettings, EncoderService, ServingEncoder, limit_compiled_products

# One copy of a model's weights per node for all its replicas: they lie in Ray's object store, and replicas map them.
#
# A deployment actor of Serve owns them, so they outlive every replica, also the first and the last one: a deployment
# scaled to zero wakes up without reading a file. The reading is a task, because Ray runs a task again where the node
# with its result is lost, and because its process takes the loader's memory with it when it ends.


WEIGHTS_ACTOR = "weights"
_BOOKKEEPING_CPUS = 0.1


def shares_weights(scaling: ServeScaling) -> bool:
    """Whether replicas share weights: a single one shares with nobody. On GPUs, which have copies of their own, it is the
    reading that they share."""
    return scaling.max_replicas > 1


def weights_actor(model: Path | NodeModel, dtype: DTypeName, gpus: float = 0.0) -> DeploymentActorConfig:
    """What a deployment states so that its replicas can call ``mapped_weights``."""
    import ray

    return DeploymentActorConfig(
        name=WEIGHTS_ACTOR,
        actor_class=ray.remote(WeightsHolder),
        init_kwargs={"model": model, "dtype": None if gpus else dtype},
        actor_options={"num_cpus": _BOOKKEEPING_CPUS},
    )


def read_weights(model: Path | NodeModel, dtype: DTypeName | None) -> Any:
    """The weights of a model as arrays, laid out for inference in ``dtype``: ``SharedWeights``; dtype None: as
    the files hold them, for GPUs.

    Raises:
        DataError: not a model folder, or a broken one.
    """
    if dtype is None:
        return read_stored(model, None)
    return Encoder.load(local_folder(model), dtype=dtype, device="cpu").share_weights()


class WeightsHolder:
    """Owns the weights; light, as it never looks at them."""

    def __init__(self, model: Path | NodeModel, dtype: DTypeName | None) -> None:
        import ray

        # max_calls: the process that read the model, three times its size at the worst, ends with the task.
        reader = ray.remote(num_cpus=_BOOKKEEPING_CPUS, max_calls=1, max_retries=3)(read_weights)
        self._weights = reader.remote(model, dtype)
        # Serve starts replicas when this constructor is through. A failure is theirs to raise, with its reason.
        ray.wait([self._weights], fetch_local=False)

    def weights(self) -> list[Any]:
        """The reference, in a list, so that Ray passes it on as it is."""
        return [self._weights]


def mapped_weights() -> Any:
    """The weights, mapped read-only from this node's object store; only inside a replica.

    Raises:
        DataError: whatever ``read_weights`` raised.
    """
    import ray
    from ray import serve

    holder = serve.get_deployment_actor(WEIGHTS_ACTOR)
    (reference,) = ray.get(holder.weights.remote())
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


# An encoder loaded for serving: ours over weights of its own or shared ones, or vLLM's.


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model a replica serves, and how it computes."""

    folder: Path | NodeModel
    fingerprint: str
    batching: BatchSettings
    threads: int
    dtype: DTypeName
    engine: ServingEngine = "torch"
    gpus: float = 0.0
    streams: int = 1
    shared: bool = False  # weights from the deployment's holder; only inside a replica


def load_service(spec: ModelSpec) -> EncoderService:
    """Load a model folder for serving, run it, and measure how fast it is: what admission goes by at first.

    Raises:
        DataError: not a model folder, or a broken one.
        ServeError: vLLM gives other vectors than were exported.
        MissingDependency: vLLM is not installed.
    """
    limit_compiled_products()
    weights = mapped_weights() if spec.shared and spec.engine == "torch" else None
    streams = ComputeStreams(spec.streams, spec.threads if spec.streams > 1 else None)
    # Loaded by the thread that will compute with every core: each that does gets OpenMP workers of its own, and libgomp
    # lets none of them wait actively once there are more than cores.
    encoder = streams.threads[0].submit(_load, spec, weights).result()
    service = EncoderService(encoder, spec.batching, spec.fingerprint, streams)
    streams.threads[0].submit(service.measure).result()
    return service


def _load(spec: ModelSpec, weights: SharedWeights | None) -> ServingEncoder:
    folder = local_folder(spec.folder)
    encoder: ServingEncoder
    if spec.engine == "vllm":
        from embedloom.serving.vllm_encoder import VLLMEncoder

        encoder = VLLMEncoder(folder, spec.threads, spec.dtype, spec.gpus)
        encoder.check()
    else:
        encoder = Encoder.load(folder, threads=spec.threads, dtype=spec.dtype, weights=weights)
    return encoder


# What holds an encoder on Serve: one of several behind a gateway, or one with the HTTP side in its process.
#
# Plain classes; app.py makes deployments of them.


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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """See ``EncoderService.load``; Serve asks every ``autoscaling.REPORT_SECONDS``."""
        return self._service.load()

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
        batches: DeploymentHandle | None = None,
        reranker: DeploymentHandle | None = None,
        searchers: DeploymentHandle | None = None,
    ) -> None:
        self._service = load_service(spec)
        super().__init__(
            self._service,
            settings,
            corpus,
            blueprint,
            batches=batches,
            reranker=reranker,
            searchers=searchers,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply ``BatchSettings`` changed in the Serve config, without a restart."""
        self._service.configure(validate(BatchSettings, user_config, "endpoint.user_config"))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve calls this inside the replica."""
        log_to_stderr()
        metrics = EndpointMetrics()
        metrics.watch_queue(self._service.queued_tokens)
        desk, tracing = self.desk(), self.traced()
        api = create_api(
            self.router,
            self.settings,
            metrics,
            self.corpus,
            self.stopping,
            desk=desk,
            tracing=tracing,
            reranker=self.reranker,
        )
        return self.listening(api)
