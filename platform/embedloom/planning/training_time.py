"""What a training stage on GPUs takes beside its products: tokenizing before it, reductions in it, checkpoints, its weights."""

from dataclasses import dataclass

from embedloom.config.cluster import Profile
from embedloom.config.rates import Basis, Device, RatesConfig, Sourced
from embedloom.config.run import Run
from embedloom.core.memory import BYTES, Shape, Trainer
from embedloom.planning.memory import shape_of, step_tokens, step_trainer, trainer_of
from embedloom.planning.work import Steps

GB = 1e9
_BACKWARD_SHARE = 2 / 3  # of a step's products; of one with recomputation it is more


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stage's time, and what it rests on."""

    name: str
    seconds: float
    basis: Basis
    source: str


def sourced(name: str, seconds: float, number: Sourced) -> Part:
    """A part that rests on one number of the rates file."""
    return Part(name, seconds, number.basis, number.source)


def parts_beside(run: Run, rates: RatesConfig, device: Device, steps: Steps, computing: float) -> list[Part]:
    """Communication, checkpoints and reading the weights; what the rates file does not say is left out.

    Args:
        run: the run.
        rates: bandwidths and shapes.
        device: what trains.
        steps: of the stage.
        computing: seconds of its products, behind which overlapped reductions hide.
    """
    found, group = rates.models.get(run.config.encoder.base), run.profile.stages.training
    if found is None or not steps.steps:
        return []
    shape, config = shape_of(found, run.config.encoder.depth), run.config.training
    trainer = trainer_of(config, steps.stage, group, run.config.encoder.dtype, shape)
    parts = []
    bus, memory = bus_of(run.profile, device), device.memory_gb
    if bus is not None and memory is not None and group.workers > 1:
        tokens = step_tokens(run, steps.stage, shape, memory.value * GB)
        backward = _BACKWARD_SHARE * computing / steps.steps
        each = step_communication(
            shape, step_trainer(trainer, tokens), tokens.passes, bus.value * GB, backward
        )
        parts.append(sourced("communication", steps.steps * each, bus))
    if rates.storage_gb_per_second is not None:
        storage, speed = rates.storage_gb_per_second, rates.storage_gb_per_second.value * GB
        written = (steps.steps - 1) // config.checkpoint_every_steps
        parts.append(sourced("checkpoints", written * checkpoint_bytes(shape, trainer) / speed, storage))
        read = nodes_of(run.profile) * shape.weights * BYTES[trainer.weight_dtype]
        parts.append(sourced("reading weights", read / speed, storage))
    return parts


def bus_of(profile: Profile, device: Device) -> Sourced | None:
    """The bandwidth of an all-reduce of the training group: inside a node where it fits into one."""
    per_node = max((pool.gpus for pool in profile.pools.values()), default=profile.gpus)
    inside = profile.stages.training.workers <= per_node
    return device.node_bus_gb_per_second or device.bus_gb_per_second if inside else device.bus_gb_per_second


def nodes_of(profile: Profile) -> int:
    """Nodes that a training group is spread over, at least."""
    per_node = max((pool.gpus for pool in profile.pools.values()), default=profile.gpus)
    return -(-profile.stages.training.workers // max(1, per_node))


def step_communication(shape: Shape, trainer: Trainer, passes: int, bus: float, backward: float) -> float:
    """Seconds of a step in which GPUs wait for each other.

    A ring moves 2 (N-1)/N of what is reduced past each of N workers, and (N-1)/N of what is gathered. ZeRO-0 to 2 as
    DeepSpeed 0.19 runs them reduce whole gradients, with every micro-batch or once; ZeRO-1 and 2 gather the weights
    after the step, ZeRO-3 gathers them for every forward and backward.

    Args:
        shape: of the model.
        trainer: workers, ZeRO stage, types.
        passes: micro-batches of a step.
        bus: bytes a second.
        backward: seconds of a step's backward, behind which reductions are hidden if the trainer overlaps.
    """
    ring = (trainer.workers - 1) / trainer.workers
    trained = shape.weights if trainer.trained_weights is None else trainer.trained_weights
    half = trainer.weight_dtype == "bfloat16"
    gradient = BYTES[trainer.gradient_dtype] if half else 4
    reductions = 1 if trainer.reduces_once else passes
    reducing = reductions * (1 if trainer.zero_stage == 3 else 2) * ring * trained * gradient / bus
    if trainer.overlaps and not trainer.reduces_once:
        # The last bucket is ready when the backward is over, so one always stays.
        last = 2 * ring * min(trainer.bucket_elements, trained) * gradient / bus
        reducing = max(reducing - backward, min(reducing, last))
    gathers = {0: 0, 1: 1, 2: 1}.get(trainer.zero_stage, 2 * passes)
    gathered = shape.weights if trainer.zero_stage == 3 else trained
    return reducing + gathers * ring * gathered * BYTES[trainer.weight_dtype] / bus


def checkpoint_bytes(shape: Shape, trainer: Trainer) -> float:
    """Weights, float32 copy and two moments: 14 bytes a bfloat16 weight, 105 GB of an 8B model."""
    trained = shape.weights if trainer.trained_weights is None else trainer.trained_weights
    copies = 12 if trainer.zero_stage else 8
    return float(shape.weights * BYTES[trainer.weight_dtype] + trained * copies)


def preparation_cores(profile: Profile) -> int:
    """Cores that tokenize the training data: those of nodes without GPUs, which are done before GPUs are asked for."""
    plain = sum(pool.cpus * pool.max_nodes for pool in profile.pools.values() if not pool.gpus)
    return plain or profile.logical_cpus or 1
