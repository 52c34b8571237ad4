"""One copy of a model's weights per node for all its replicas: they lie in Ray's object store, and replicas map them.

A deployment actor of Serve owns them, so they outlive every replica, also the first and the last one: a deployment
scaled to zero wakes up without reading a file. The reading is a task, because Ray runs a task again where the node
with its result is lost, and because its process takes the loader's memory with it when it ends.
"""

from pathlib import Path
from typing import Any

from ray.serve.config import DeploymentActorConfig

from embedloom.config.resources import ServeScaling
from embedloom.encoder.device import DTypeName

WEIGHTS_ACTOR = "weights"
_BOOKKEEPING_CPUS = 0.1


def shares_weights(scaling: ServeScaling) -> bool:
    """Whether replicas share weights: there may be several, and they compute on CPU.

    A GPU has weights of its own in any case, and a single replica shares with nobody.
    """
    return scaling.max_replicas > 1 and scaling.gpus == 0


def weights_actor(model_folder: str, dtype: DTypeName) -> DeploymentActorConfig:
    """What a deployment states so that its replicas can call ``mapped_weights``."""
    import ray

    return DeploymentActorConfig(
        name=WEIGHTS_ACTOR,
        actor_class=ray.remote(WeightsHolder),
        init_kwargs={"model_folder": model_folder, "dtype": dtype},
        actor_options={"num_cpus": _BOOKKEEPING_CPUS},
    )


def read_weights(model_folder: str, dtype: DTypeName) -> Any:
    """The weights of a folder as arrays, laid out for inference in ``dtype``: ``encoder.shared.SharedWeights``.

    Raises:
        DataError: not a model folder, or a broken one.
    """
    from embedloom.encoder.model import Encoder

    return Encoder.load(Path(model_folder), dtype=dtype, device="cpu").share_weights()


class WeightsHolder:
    """Owns the weights; light, as it never looks at them."""

    def __init__(self, model_folder: str, dtype: DTypeName) -> None:
        import ray

        # max_calls: the process that read the model, three times its size at the worst, ends with the task.
        reader = ray.remote(num_cpus=_BOOKKEEPING_CPUS, max_calls=1, max_retries=3)(read_weights)
        self._weights = reader.remote(model_folder, dtype)
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
