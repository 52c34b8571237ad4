"""One copy of an encoder's weights per node: they lie in Ray's object store, and every actor maps them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedloom.config.resources import PoolConfig
from embedloom.encoder.model import Encoder
from embedloom.instructions import PromptContract
from embedloom.retrieval.embedder import EmbedderSource, EncoderEmbedder, EncoderSource


@dataclass(frozen=True, slots=True)
class SharedEncoderSource:
    """An encoder whose weights are in the object store; they stay there as long as this object lives."""

    name: str
    folder: Path
    contract: PromptContract | None
    weights: Any  # ray.ObjectRef of SharedWeights; ray ships no types

    def open(self) -> EncoderEmbedder:
        """Build the encoder over the mapped arrays."""
        import ray

        weights = ray.get(self.weights)
        return EncoderEmbedder(Encoder.load(self.folder, contract=self.contract, weights=weights), self.name)


def share_weights(source: EmbedderSource, pool: PoolConfig) -> EmbedderSource:
    """Put an encoder's weights into the object store, if several actors compute with them on CPU.

    The driver loads the model once for it. ``dtype: auto`` is decided by the driver's CPU for all actors.

    Args:
        source: what the pool's actors would open.
        pool: one with GPUs keeps its source, as weights then live on the device, and so does a single actor.

    Returns:
        What the actors open instead.
    """
    if not isinstance(source, EncoderSource) or pool.gpus or pool.max_actors == 1:
        return source
    import ray

    encoder = Encoder.load(source.folder, dtype=source.dtype, device="cpu", contract=source.contract)
    return SharedEncoderSource(source.name, source.folder, source.contract, ray.put(encoder.share_weights()))
