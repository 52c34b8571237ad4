"""Builds the Serve application of one model, from what its folder says of itself."""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig

from embedloom.config.base import validate
from embedloom.config.cluster import GATEWAY_CPUS, SCALE_DOWN_SECONDS, TARGET_QUEUE_SECONDS, ServeScaling
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.core.model_folder import ModelFolder
from embedloom.core.trained_prompts import check_default
from embedloom.encoder.pairs import check_reranker
from embedloom.encoder.registry import NodeModel, local_folder, open_model
from embedloom.errors import ConfigError, DataError
from embedloom.serving.applications import GATEWAY, SINGLE
from embedloom.serving.autoscaling import REPORT_SECONDS, WINDOW_SECONDS, QueueTimePolicy
from embedloom.serving.batches.job import BatchParts
from embedloom.serving.batches.runner import DEPLOYMENT as BATCHES
from embedloom.serving.batches.runner import BatchRunner
from embedloom.serving.calls import EndpointSettings, check_aliases
from embedloom.serving.front import read_keys
from embedloom.serving.gateway import ENCODERS, Gateway
from embedloom.serving.replica import (
    EncoderEndpoint,
    EncoderReplica,
    ModelSpec,
    shares_weights,
    weights_actor,
)
from embedloom.serving.reranking import RerankerReplica
from embedloom.serving.routing import QueuedTokensRouter
from embedloom.serving.schemas import GateVerdict, Lineage
from embedloom.serving.searching import SEARCHERS, CorpusSource, SearchReplica
from embedloom.serving.service import BatchSettings
from embedloom.serving.tracing import check_installed

RERANKERS = "reranker"  # the deployment
SEARCHES_A_REPLICA = 2.0  # that Serve scales towards: one is searched, one waits for its texts or its turn
RETRY_AFTER_SECONDS = 1  # of Serve's own 429, which is not the usual one


def build(args: dict[str, Any]) -> Application:
    """Application builder for ``serve run`` and ``serve deploy``.

    Raises:
        ConfigError: an unknown or wrong argument.
        DataError: the model folder is not one.
    """
    return build_application(validate(ApplicationArgs, args, "serve arguments"))


def build_application(args: ApplicationArgs, encoders: Mapping[str, str] | None = None) -> Application:
    """Bind one endpoint process for a single replica, else a gateway and its encoders.

    Measured on two cores with a tiny model: the gateway's hop adds 4 ms to a request of 15 ms and costs a
    quarter or more of the throughput; with several replicas it pays for itself by retrying and balancing.

    Args:
        args: model, settings and scaling.
        encoders: by name of each model the running application of ``build_encoders``, so that the gateway can be replaced
            without touching them; None binds them into this one.

    Raises:
        ConfigError: another name of the model is its own, or stands for a task that it does not know.
        DataError: the model folder is not one, or has not passed the gate.
        MissingDependency: traces are wanted, and their extra is not installed.
    """
    if args.serving.traces is not None:
        check_installed()
    blueprint, single = args.model_dump(mode="json"), args.single
    others = {name: _identified(*_checked(own)) for name, own in args.further.items()}
    args, model = _checked(args.first)
    serving = args.serving.model_copy(update=args.scaling.limits)
    settings = _settings(args, serving, model)
    if serving.reranker is not None:
        identity = ModelFolder(local_folder(_reranker(serving.reranker))).fingerprint
        settings = settings.model_copy(update={"reranker": identity, "rerank_top": serving.rerank_top})
    for own, _ in others.values():
        _check_keys(own, settings)
    _check_keys(args, settings)
    corpus = _corpus(serving, model)
    batches, reranker = _batches(serving), _bound_rerankers(args)
    searchers = _bound_searchers(args, corpus)
    ingress = _patience(serving) | _ingress_limits(settings.max_requests)
    if single:
        endpoint = serve.deployment(serve.ingress()(EncoderEndpoint), name=SINGLE, num_replicas=1)
        return endpoint.options(**ingress, **_computing(args)).bind(
            _model(args, model), settings, corpus, blueprint, batches, reranker, searchers
        )
    gateway = serve.deployment(serve.ingress()(Gateway), name=GATEWAY, num_replicas=serving.gateways)
    bound = encoders or {
        args.served_name: _bound_encoders(args, model),
        **{
            name: _bound_encoders(own, found, f"{ENCODERS}-{number}")
            for number, (name, (own, found)) in enumerate(others.items(), start=2)
        },
    }
    further = {
        name: (bound[name], _settings(own, own.serving, found)) for name, (own, found) in others.items()
    }
    return gateway.options(**ingress, ray_actor_options={"num_cpus": GATEWAY_CPUS}).bind(
        bound[args.served_name], settings, corpus, blueprint, batches, further, reranker, searchers
    )


def _checked(args: ApplicationArgs) -> tuple[ApplicationArgs, ModelFolder]:
    """One model of an endpoint with what identifies it, and its folder.

    Raises:
        ConfigError, DataError: see ``build_application``.
    """
    model = _opened(args)
    if args.serving.require_gate:
        model.check_gated(args.serving.verdict)
        if args.serving.compute_dtype == "int8":
            model.check_int8()
    check_default(model.contract, args.serving.default_task, str(model.path))
    check_aliases(args.serving.models, args.served_name, model.contract)
    return args, model


def _identified(args: ApplicationArgs, model: ModelFolder) -> tuple[ApplicationArgs, ModelFolder]:
    """A further model with what identifies it, which the command looks up of the served one alone."""
    return args.model_copy(update={"model_id": model.id}), model


def _check_keys(args: ApplicationArgs, settings: EndpointSettings) -> None:
    """Refuse a model that no key could use.

    Raises:
        ConfigError: it is for keys that there are not.
    """
    known = [key.name for key in settings.keys]
    unknown = [name for name in args.serving.model_keys or () if name not in known]
    if unknown:
        where = (
            "serving.model_keys"
            if args.served_name == settings.served_name
            else f"serving.models.{args.served_name}.keys"
        )
        raise ConfigError(
            f"{where}: no key is called {unknown[0]!r}; allowed: {', '.join(known) or 'none, as the endpoint has no keys'}"
        )


def _settings(args: ApplicationArgs, serving: ServingConfig, model: ModelFolder) -> EndpointSettings:
    scaling = args.scaling
    most = scaling.max_replicas * serving.max_ongoing_requests + serving.max_queued_requests
    return EndpointSettings(
        served_name=args.served_name,
        models={name: one.defaults for name, one in serving.models.items()},
        allowed_keys=serving.model_keys,
        truncate=serving.truncate,
        token_ids=serving.token_ids,
        fingerprint=args.fingerprint,
        created=int(model.weight_files[0].stat().st_mtime),
        max_items=serving.max_items,
        min_replicas=scaling.min_replicas,
        max_requests=-(-most // serving.gateways),
        request_timeout_seconds=serving.request_timeout_seconds,
        max_item_characters=serving.max_item_characters,
        max_body_bytes=int(serving.max_body_mib * 2**20),
        max_batch_tokens=serving.max_batch_tokens,
        compute_dtype=args.compute_dtype,
        keys=read_keys(serving),
        allowed_origins=serving.allowed_origins,
        hosts=_hosts(args),
        request_log=serving.request_log,
        lineage=Lineage.of(model),
        gate=GateVerdict.of(model, serving.verdict),
        tasks=tuple(model.contract.tasks or ()),
        trust_remote_code=model.is_trusted,
    )


def _reranker(name: str) -> Path | NodeModel:
    """What every node opens the reranker by."""
    path = Path(name).expanduser()
    return path.absolute() if path.is_dir() else NodeModel.of(name)


def _bound_rerankers(args: ApplicationArgs) -> Application | None:
    """The rerankers, in replicas of their own with a queue of their own; None where none is served.

    Raises:
        DataError: no reranker in that folder.
    """
    if args.serving.reranker is None:
        return None
    folder = _reranker(args.serving.reranker)
    check_reranker(local_folder(folder))
    # int8 is judged for the embedding model alone.
    exact = args.serving.model_copy(update={"compute_dtype": "auto", "engine": "torch"})
    dtype = args.serving.compute_dtype
    own = args.model_copy(
        update={
            "scaling": args.reranker_scaling or args.scaling,
            "serving": exact if dtype == "int8" else exact.model_copy(update={"compute_dtype": dtype}),
        }
    )
    scaling = own.scaling
    spec = ModelSpec(
        folder=folder,
        fingerprint="",  # a pair is of no vectors that a pinned request could compare
        batching=BatchSettings.of(args.serving),
        threads=scaling.compute_threads,
        dtype=own.compute_dtype,
        gpus=scaling.gpus,
        streams=scaling.compute_streams,
    )
    options = _patience(own.serving) | _computing(own) | _replicas(scaling)
    options["request_router_config"] = RequestRouterConfig(request_router_class=QueuedTokensRouter)
    rerankers = serve.deployment(RerankerReplica, name=RERANKERS)
    return rerankers.options(**options, max_ongoing_requests=args.serving.max_ongoing_requests).bind(spec)


def _bound_searchers(args: ApplicationArgs, corpus: CorpusSource | None) -> Application | None:
    """The replicas that search the corpus; None where there is none, or the processes that answer HTTP search it."""
    scaling = args.search_scaling
    if corpus is None or scaling is None:
        return None
    # Searches have no tokens to be queued by.
    target = scaling.target_ongoing_requests or SEARCHES_A_REPLICA
    scaled = scaling.model_copy(update={"target_ongoing_requests": target})
    options = _patience(args.serving) | _replicas(scaled)
    searchers = serve.deployment(SearchReplica, name=SEARCHERS)
    return searchers.options(
        **options,
        max_ongoing_requests=args.serving.max_ongoing_requests,
        ray_actor_options={"num_cpus": scaling.cpus},
    ).bind(corpus, scaling.compute_threads)


def build_encoders(args: ApplicationArgs) -> Application:
    """Bind the encoders of one model, the first of an endpoint's, without HTTP.

    Raises:
        DataError: the model folder is not one.
    """
    args = args.first
    return _bound_encoders(args, _opened(args))


def _opened(args: ApplicationArgs) -> ModelFolder:
    model = open_model(named(args))
    model.check_servable()
    return model


def named_model(model: Path | NodeModel) -> dict[str, str | None]:
    """The keys of ``ApplicationArgs`` that say which model it is."""
    if isinstance(model, NodeModel):
        return {"model_folder": model.name, "model_release": model.release}
    return {"model_folder": str(model), "model_release": None}


def named(args: ApplicationArgs) -> Path | NodeModel:
    """What every node opens a model by: a folder as it is, anything else by its name."""
    path, trust = Path(args.model_folder), args.serving.trust_remote_code
    if args.model_release is None and not trust and (path.is_dir() or path.is_absolute()):
        return path
    return NodeModel(args.model_folder, trust, args.model_release)


def _bound_encoders(args: ApplicationArgs, model: ModelFolder, name: str = ENCODERS) -> Application:
    # Of int8 every replica has weights of its own, a quarter of float32's.
    plain = args.serving.engine == "torch" and args.serving.compute_dtype != "int8"
    shared = shares_weights(args.scaling) and plain
    options = _patience(args.serving) | _computing(args) | _replicas(args.scaling)
    options["request_router_config"] = RequestRouterConfig(request_router_class=QueuedTokensRouter)
    if shared:
        options["deployment_actors"] = [weights_actor(model.travels, args.compute_dtype, args.scaling.gpus)]
    # One replica more at a time while Serve replaces them: all of them again would be twice the GPUs.
    options["max_surge_percent"] = -(-100 // args.scaling.max_replicas)
    encoders = serve.deployment(EncoderReplica, name=name)
    return encoders.options(**options, max_ongoing_requests=args.serving.max_ongoing_requests).bind(
        _model(args, model, shared)
    )


def _hosts(args: ApplicationArgs) -> tuple[str, ...]:
    """Names that the endpoint answers to; none: to any.

    Without keys, loopback is all that keeps others out, and a page elsewhere gets past it by pointing its own name at
    127.0.0.1 (DNS rebinding): then the browser takes the endpoint for a part of that page's site.
    """
    keyed = args.serving.keys_file is not None or args.serving.keys_variable is not None
    if keyed or not args.on_loopback:
        return ()
    return ("localhost", "127.0.0.1", "::1", args.serving.host, *args.serving.allowed_hosts)


def _model(args: ApplicationArgs, model: ModelFolder, shared: bool = False) -> ModelSpec:
    scaling, serving = args.scaling, args.serving
    if serving.engine != "torch" and scaling.streams not in (None, 1):
        raise ConfigError(
            f"serve.streams: {scaling.streams} with serving.engine {serving.engine!r}, which computes one batch at a "
            "time; allowed: 1, or none stated"
        )
    if serving.compute_dtype == "int8" and scaling.gpus:
        raise ConfigError(
            f"serving.compute_dtype: 'int8' is for CPUs, and serve.gpus is {scaling.gpus:g}; allowed: 'auto', 'float32', "
            "'bfloat16'"
        )
    return ModelSpec(
        folder=model.travels,
        fingerprint=args.fingerprint,
        batching=BatchSettings.of(serving),
        threads=scaling.compute_threads,
        dtype=args.compute_dtype,
        engine=serving.engine,
        gpus=scaling.gpus,
        streams=scaling.compute_streams if serving.engine == "torch" else 1,
        shared=shared,
    )


def _patience(serving: ServingConfig) -> dict[str, Any]:
    return {
        "graceful_shutdown_timeout_s": serving.request_timeout_seconds,
        "max_constructor_retry_count": 1,  # a model that does not load will not load the next time
        "max_surge_percent": 100,  # a replica is stopped when the one that replaces it answers, not before
    }


def _computing(args: ApplicationArgs) -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": args.scaling.cpus, "num_gpus": args.scaling.gpus},
        "user_config": BatchSettings.of(args.serving).model_dump(),
    }


def _corpus(serving: ServingConfig, model: ModelFolder) -> CorpusSource | None:
    """The corpus to search, checked against the model before anything starts."""
    if serving.corpus is None:
        return None
    source = CorpusSource.of(serving.corpus, serving, model)
    source.check()
    return source


def _batches(serving: ServingConfig) -> Application | None:
    """What has batches computed, where the endpoint takes any."""
    if serving.batches is None:
        return None
    runner = serve.deployment(BatchRunner, name=BATCHES, num_replicas=1)
    options = {"num_cpus": GATEWAY_CPUS}
    return runner.options(ray_actor_options=options).bind(serving.batches, batch_parts, time.time)


def batch_parts(args: ApplicationArgs, name: str | None, owner: str) -> BatchParts:
    """What computes a batch, and the settings that answer its lines.

    Args:
        args: of the endpoint that took it.
        name: of the model that its first request asks for; one that is not there is the served model's to refuse, line by line.
        owner: name of the key that sent it.

    Raises:
        DataError: not a model for this key; the folder is no model folder, or holds other weights than when the batch was taken.
    """
    members = [args.first, *args.further.values()]
    args = next((one for one in members if name in (one.served_name, *one.serving.models)), members[0])
    keys = args.serving.model_keys
    if keys is not None and owner not in keys:
        raise DataError(f"The model {name!r:.80} does not exist or you do not have access to it")
    # Who may ask was the business of whoever took the batch; keys may not even be readable here.
    open_to_all = args.serving.model_copy(update={"keys_file": None, "keys_variable": None})
    args = args.model_copy(update={"serving": open_to_all})
    model = _opened(args)
    if model.artefact is not None and args.model_id not in (None, model.id):
        raise DataError(f"{model.path}: holds {model.id}, the batch is of {args.model_id}; send it again")
    return BatchParts(_model(args, model), _settings(args, args.serving, model), args.scaling)


def _ingress_limits(max_requests: int) -> dict[str, Any]:
    """Serve's own limits, beyond what the endpoint admits, so that its well-formed 429 is the usual one."""
    return {
        "max_ongoing_requests": 4 * max_requests,
        "max_queued_requests": 4 * max_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_SECONDS),
    }


def _replicas(scaling: ServeScaling) -> dict[str, Any]:
    if scaling.min_replicas == scaling.max_replicas:
        return {"num_replicas": scaling.max_replicas}
    if scaling.target_ongoing_requests is None:
        return {
            "autoscaling_config": scaling_on_queue(
                scaling.min_replicas,
                scaling.max_replicas,
                scaling.target_queue_seconds,
                scaling.scale_down_seconds,
                scaling.idle_to_zero_seconds,
            )
        }
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            initial_replicas=max(1, scaling.min_replicas),  # a start shows that the model loads
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_ongoing_requests,
            downscale_to_zero_delay_s=scaling.idle_to_zero_seconds,
        )
    }


def scaling_on_queue(
    min_replicas: int,
    max_replicas: int,
    target_seconds: float = TARGET_QUEUE_SECONDS,
    down_seconds: float = SCALE_DOWN_SECONDS,
    zero_seconds: float | None = None,
) -> AutoscalingConfig:
    """Serve's settings for ``QueueTimePolicy``, which does the waiting before replicas are taken away itself.

    Args:
        min_replicas: that stay up.
        max_replicas: at most.
        target_seconds: that a text may wait.
        down_seconds: that fewer replicas must have been enough before any is taken away.
        zero_seconds: without a request, after which the last one ends; None: ``down_seconds``.
    """
    policy = AutoscalingPolicy(
        policy_function=QueueTimePolicy,
        policy_kwargs={
            "target_seconds": target_seconds,
            "down_seconds": down_seconds,
            "zero_seconds": down_seconds if zero_seconds is None else zero_seconds,
        },
    )
    with warnings.catch_warnings():
        # Serve 2.60 calls the interval deprecated in favour of environment variables that it does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=min_replicas,
            initial_replicas=max(1, min_replicas),  # a start shows that the model loads
            max_replicas=max_replicas,
            metrics_interval_s=REPORT_SECONDS,
            look_back_period_s=2 * WINDOW_SECONDS,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=policy,
        )
