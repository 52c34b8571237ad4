"""An encoder loaded for serving: ours over weights of its own or shared ones, or vLLM's."""

from dataclasses import dataclass
from pathlib import Path

from embedloom.config.serving import ServingEngine
from embedloom.encoder.device import DTypeName
from embedloom.encoder.model import Encoder
from embedloom.encoder.shared import SharedWeights
from embedloom.serving.memory import limit_compiled_products
from embedloom.serving.service import BatchSettings, EncoderService
from embedloom.serving.streams import ComputeStreams
from embedloom.serving.tokenizing import ServingEncoder
from embedloom.serving.weights import mapped_weights


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model a replica serves, and how it computes."""

    folder: str
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
    folder = Path(spec.folder)
    encoder: ServingEncoder
    if spec.engine == "vllm":
        from embedloom.serving.vllm_encoder import VLLMEncoder

        encoder = VLLMEncoder(folder, spec.threads, spec.dtype, spec.gpus)
        encoder.check()
    else:
        encoder = Encoder.load(folder, threads=spec.threads, dtype=spec.dtype, weights=weights)
    return encoder
