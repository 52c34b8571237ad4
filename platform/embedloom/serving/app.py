"""Builds the Serve application of one model."""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from embedloom.config.application import ApplicationArgs
from embedloom.config.base import validate
from embedloom.config.resources import ServeScaling
from embedloom.config.serving import ServingConfig
from embedloom.encoder.sidecars import derive_contract
from embedloom.errors import DataError
from embedloom.instructions import CONTRACT_FILE, PromptContract
from embedloom.retrieval.model_id import model_id
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.corpus_source import CorpusSource
from embedloom.serving.gateway import Gateway
from embedloom.serving.keys import read_keys
from embedloom.serving.model_facts import read_gate, read_lineage
from embedloom.serving.replica import EncoderEndpoint, EncoderReplica
from embedloom.serving.service import BatchSettings
from embedloom.verdict import check_gated

RETRY_AFTER_SECONDS = 1  # of Serve's own 429, which is not the usual one
GATEWAY_CPUS = 0.1  # bookkeeping only: it parses and waits


def build(args: dict[str, Any]) -> Application:
    """Application builder for ``serve run`` and ``serve deploy``.

    Raises:
        ConfigError: an unknown or wrong argument.
        DataError: the model folder is not one.
    """
    return build_application(validate(ApplicationArgs, args, "serve arguments"))


def build_application(args: ApplicationArgs) -> Application:
    """Bind one endpoint process for a single replica, else a gateway and its encoders.

    Measured on two cores with a tiny model: the gateway's hop adds 4 ms to a request of 15 ms and costs a
    quarter or more of the throughput; with several replicas it pays for itself by retrying and balancing.

    Raises:
        DataError: the model folder is not one, or has not passed the gate.
    """
    folder = check_model_folder(Path(args.model_folder))
    if args.serving.require_gate:
        check_gated(folder)
    scaling = args.scaling
    serving = args.serving.model_copy(update=scaling.limits)
    settings = EndpointSettings(
        served_name=args.served_name,
        fingerprint=args.model_id or args.served_name,
        created=int((folder / "config.json").stat().st_mtime),
        max_items=serving.max_items,
        max_requests=scaling.max_replicas * serving.max_ongoing_requests + serving.max_queued_requests,
        request_timeout_seconds=serving.request_timeout_seconds,
        max_item_characters=serving.max_item_characters,
        max_body_bytes=int(serving.max_body_mib * 2**20),
        keys=read_keys(serving),
        allowed_origins=serving.allowed_origins,
        request_log=serving.request_log,
        lineage=read_lineage(folder),
        gate=read_gate(folder),
    )
    corpus = _corpus(serving, folder)
    batching = BatchSettings.of(serving)
    model = (str(folder), scaling.compute_threads, serving.compute_dtype, batching, settings.fingerprint)
    common = {
        "graceful_shutdown_timeout_s": serving.request_timeout_seconds,
        "max_constructor_retry_count": 1,  # a model that does not load will not load the next time
    }
    ingress = common | _ingress_limits(settings.max_requests)
    computing = {
        "ray_actor_options": {"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
        "user_config": batching.model_dump(),
    }
    if scaling.min_replicas == scaling.max_replicas == 1:
        endpoint = serve.deployment(serve.ingress()(EncoderEndpoint), name="endpoint", num_replicas=1)
        return endpoint.options(**ingress, **computing).bind(*model, settings, corpus)
    encoders = serve.deployment(EncoderReplica, name="encoder")
    encoder = encoders.options(
        **common, **computing, **_replicas(scaling), max_ongoing_requests=serving.max_ongoing_requests
    ).bind(*model)
    gateway = serve.deployment(serve.ingress()(Gateway), name="gateway", num_replicas=1)
    return gateway.options(**ingress, ray_actor_options={"num_cpus": GATEWAY_CPUS}).bind(
        encoder, settings, corpus
    )


def _corpus(serving: ServingConfig, folder: Path) -> CorpusSource | None:
    """The corpus to search, checked against the model before anything starts."""
    if serving.corpus is None:
        return None
    contract = PromptContract.load(folder) if (folder / CONTRACT_FILE).exists() else derive_contract(folder)
    source = CorpusSource.of(
        serving.corpus, serving.documents, contract.hash, model_id(folder), contract.normalize
    )
    source.check()
    return source


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
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_ongoing_requests,
            downscale_to_zero_delay_s=scaling.idle_to_zero_seconds,
        )
    }


def check_model_folder(folder: Path) -> Path:
    """The absolute path of a model folder.

    Raises:
        DataError: it is none, has no weights, or a broken prompt contract.
    """
    folder = folder.expanduser().absolute()
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json, so this is not a model folder")
    if not any(folder.glob("*.safetensors")):
        raise DataError(f"{folder}: no weights (*.safetensors) in this model folder")
    if (folder / CONTRACT_FILE).exists():
        PromptContract.load(folder)
    return folder
