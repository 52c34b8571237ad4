"""``cluster/cluster.yaml``: the machines of each profile, what each stage may take of them, and whether that fits.
No Ray, so ``plan`` and ``--dry-run`` answer without it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig, read_yaml, validate
from embedloom.errors import ConfigError

# What one stage may take of the machines; ``cluster/cluster.yaml`` holds one set per profile.


# A p4de node takes some 10 minutes to be bought and to pull an image of 20 GB, and reads weights of 280 GB in as many again;
# where nodes are up, importing torch on a busy one takes a minute.
COLD_START_SECONDS = 3600
WARM_START_SECONDS = 600
_START_SECONDS = Field(
    default=None,
    ge=1,
    exclude_if=lambda value: value is None,
    description=(
        "Seconds that the first actors or replicas may take from being asked for until they are loaded: buying nodes, pulling "
        "the image, loading weights, to which 1 s is added per 100 MB of a generator's. Null: the profile's start_seconds; "
        "without one 3600 where the profile has nodes with min_nodes 0, else 600."
    ),
)


class PoolConfig(FrozenConfig):
    """An actor pool of one stage: how many actors, and what each reserves."""

    min_actors: int = Field(default=1, ge=1, description="Actors that the stage needs at least.")
    max_actors: int = Field(
        default=1, ge=1, description="Actors that the stage starts at most, as resources allow."
    )
    cpus: float = Field(
        default=1.0, ge=0, description="Logical CPUs that one actor reserves; Ray only counts them."
    )
    gpus: float = Field(
        default=0.0, ge=0, description="GPUs that one actor reserves; below 1, several share one."
    )
    memory_gib: float = Field(
        default=0.0, ge=0, description="Memory that one actor reserves, in GiB; 0: none is reserved."
    )
    threads: int | None = Field(
        default=None, ge=1, description="Compute threads per actor. Null: one per reserved CPU."
    )
    tensor_parallel: int = Field(
        default=1, ge=1, description="GPUs that one LLM engine spans; gpus must be the same number."
    )
    start_seconds: int | None = _START_SECONDS

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "PoolConfig":
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors is {self.max_actors}, below min_actors {self.min_actors}")
        if self.tensor_parallel > 1 and self.gpus != self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} needs gpus: {self.tensor_parallel}, found {self.gpus:g}"
            )
        return self

    @property
    def start_budget(self) -> int:
        """Seconds until the first actors must be there."""
        return self.start_seconds or WARM_START_SECONDS

    @property
    def compute_threads(self) -> int:
        """Threads an actor computes with."""
        return self.threads or max(1, int(self.cpus))


class TrainingGroup(FrozenConfig):
    """The Ray Train worker group."""

    groups: int = Field(
        default=1, ge=1, description="Training runs that are trained side by side, a worker group each."
    )
    workers: int = Field(
        default=1, ge=1, description="Workers of one group; the global batch is split over them."
    )
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Fewest workers that a group goes on with when machines are lost, from its last checkpoint and with the same "
            "batches, split over those that are left. A group also starts with as few, and grows later. Null: it waits until "
            "there are as many as workers."
        ),
    )
    grow_seconds: float = Field(
        default=1800.0,
        gt=0,
        description=(
            "How often a group with fewer than its workers looks whether machines have come back. It then starts again "
            "from the last checkpoint with all of them, so what was trained since is trained twice."
        ),
    )
    cpus: float = Field(default=1.0, ge=0, description="Logical CPUs that one worker reserves.")
    gpus: int = Field(
        default=0,
        ge=0,
        le=1,
        description="GPUs that one worker reserves, 0 or 1: NCCL refuses two workers that share a GPU.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="Compute threads per worker. Null: one per reserved CPU."
    )
    bf16_weights: bool | None = Field(
        default=None,
        description=(
            "Whether weights and activations are bfloat16, with a float32 copy of the weights in the optimizer. Null: on "
            "GPUs, where the compute type is bfloat16; on CPU weights stay float32 and products are cast."
        ),
    )
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description=(
            "Type that gradients of bfloat16 weights are summed and reduced over workers in. bfloat16 halves the traffic "
            "(15 GB a reduction for 7.5 billion weights) and the buffers, and loses small gradients where many are summed."
        ),
    )
    gradient_reduction: Literal["step", "micro_batch"] | None = Field(
        default=None,
        description=(
            "When gradients are reduced over workers where a step takes several micro-batches. step: once, after each "
            "worker has summed its own, which takes a whole gradient on each, 2 or 4 bytes a weight by gradient_dtype. "
            "micro_batch: after every one, for as many times the traffic. "
            "Null: step up to ZeRO-2, micro_batch with ZeRO-3, where weights do not fit whole and nor does a gradient."
        ),
    )

    @model_validator(mode="after")
    def _fewest_are_no_more(self) -> "TrainingGroup":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, above workers {self.workers}; allowed: 1 to workers"
            )
        return self

    def reduces_each_step(self, zero_stage: int) -> bool:
        """Whether gradients of several micro-batches are summed on each worker and reduced once."""
        return zero_stage < 3 if self.gradient_reduction is None else self.gradient_reduction == "step"

    @property
    def compute_threads(self) -> int:
        """Threads one worker computes with."""
        return self.threads or max(1, int(self.cpus))


LISTENER_VARIABLE = "EMBEDLOOM_LISTENER"  # holds a node's ListenerConfig as JSON


class ListenerConfig(FrozenConfig):
    """What a connection may cost before it is a request; of every process of a node that listens for HTTP."""

    max_header_kib: int = Field(
        default=32,
        ge=1,
        description="Largest request line and headers together, in KiB; beyond it the answer is 431.",
    )
    max_headers: int = Field(
        default=100, ge=1, description="Most headers of a request; beyond it the answer is 431."
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        description=(
            "Seconds from the first byte of a request to the end of its headers; beyond it the answer is 408."
        ),
    )
    max_client_connections: int | None = Field(
        default=512,
        ge=1,
        description=(
            "Most open connections by address; beyond it the answer is 429. A load balancer in front is "
            "one address. Null: not bounded."
        ),
    )

    @property
    def max_header_bytes(self) -> int:
        """The size in bytes."""
        return self.max_header_kib * 1024


# That Serve and Ray may take to end behind a drained endpoint: 4.3 on two free cores, up to 10 on busy ones.
_SHUTDOWN_SECONDS = 12


TARGET_QUEUE_SECONDS = 1.0
SCALE_DOWN_SECONDS = 180.0


class ServeScaling(FrozenConfig):
    """Replicas of the endpoint."""

    min_replicas: int = Field(
        default=1,
        ge=0,
        description="Fewest replicas that stay up; 0 lets the endpoint sleep without traffic.",
    )
    max_replicas: int = Field(default=1, ge=1, description="Most replicas that the endpoint scales up to.")
    target_queue_seconds: float = Field(
        default=TARGET_QUEUE_SECONDS,
        gt=0,
        exclude_if=lambda value: value == TARGET_QUEUE_SECONDS,
        description=(
            "Seconds that a text may wait for its computation, at the measured rate; where more would wait longer, replicas "
            "are added at once."
        ),
    )
    scale_down_seconds: float = Field(
        default=SCALE_DOWN_SECONDS,
        gt=0,
        exclude_if=lambda value: value == SCALE_DOWN_SECONDS,
        description="Seconds for which fewer replicas must have been enough before any is taken away.",
    )
    target_ongoing_requests: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Requests per replica that Ray Serve's own policy scales towards, in place of target_queue_seconds, however many "
            "tokens they have. Null: by queueing time."
        ),
    )
    cpus: float = Field(default=1.0, ge=0, description="Logical CPUs that one replica reserves.")
    gpus: float = Field(
        default=0.0,
        ge=0,
        description=(
            "GPUs that one replica reserves; below 1, replicas share one and must fit its memory together."
        ),
    )
    threads: int | None = Field(
        default=None, ge=1, description="Compute threads per replica. Null: one per reserved CPU."
    )
    streams: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Batches computed at once, each by its share of the threads, in a replica without GPU whose "
            "engine is torch. Null: two, or one where there is but one thread."
        ),
    )
    max_ongoing_requests: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Most requests in one replica at a time. Null, with max_queued_requests: as the run config's "
            "`serving` has them, whose defaults suit up to four replicas."
        ),
    )
    max_queued_requests: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Most requests that wait for a replica, over the whole endpoint; at least max_replicas x "
            "max_ongoing_requests, because Ray counts a request as queued until a replica accepts it. "
            "Null, with max_ongoing_requests: as the run config's `serving` has them."
        ),
    )
    idle_to_zero_seconds: float | None = Field(
        default=None,
        gt=0,
        description=(
            "With min_replicas 0: seconds without traffic after which the last replica ends. Null: as any "
            "scaling down (scale_down_seconds)."
        ),
    )
    start_seconds: int | None = _START_SECONDS
    haproxy: bool = Field(
        default=False, description="HAProxy in place of Serve's Python proxy, on every node."
    )
    listener: ListenerConfig = Field(
        default=ListenerConfig(), description="Bounds of a connection before it is a request."
    )
    termination_grace_seconds: int = Field(
        default=30,
        ge=20,
        description=(
            "Seconds that Kubernetes, or whoever stops the endpoint, gives it to end (the pods' "
            "terminationGracePeriodSeconds); 12 of them are kept for shutting down, the rest lets "
            "requests end."
        ),
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "ServeScaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below min_replicas {self.min_replicas}")
        if self.idle_to_zero_seconds is not None and self.min_replicas > 0:
            raise ValueError(
                f"idle_to_zero_seconds is set, but min_replicas is {self.min_replicas}; only 0 can scale to zero"
            )
        if self.streams is not None and self.streams > self.compute_threads:
            raise ValueError(
                f"streams is {self.streams}, above {self.compute_threads} threads; each stream needs one"
            )
        if self.streams not in (None, 1) and self.gpus > 0:
            raise ValueError(
                f"streams is {self.streams}, but a replica with GPUs computes one batch at a time"
            )
        if (self.max_ongoing_requests is None) != (self.max_queued_requests is None):
            raise ValueError("max_ongoing_requests and max_queued_requests are set together, or neither is")
        ongoing, queued = self.max_ongoing_requests, self.max_queued_requests
        # Ray counts a request as queued until a replica accepts it, so a shorter queue rejects in a burst.
        if ongoing is not None and queued is not None and queued < self.max_replicas * ongoing:
            raise ValueError(
                f"max_queued_requests is {queued}, below {self.max_replicas} max_replicas x {ongoing} max_ongoing_requests"
            )
        target = self.target_ongoing_requests
        if ongoing is not None and target is not None and target > ongoing:
            raise ValueError(
                f"target_ongoing_requests is {target:g}, above max_ongoing_requests {ongoing}, "
                "so it would never scale up"
            )
        return self

    @property
    def start_budget(self) -> int:
        """Seconds until the first replicas must answer."""
        return self.start_seconds or WARM_START_SECONDS

    @property
    def drain_seconds(self) -> float:
        """How long requests in hand may go on when the endpoint is stopped; the rest of the grace is Serve's and Ray's."""
        return self.termination_grace_seconds - _SHUTDOWN_SECONDS

    def cut_off(self, request_seconds: float) -> str | None:
        """What a stop may do to a request that has so long; None where each can end."""
        if request_seconds <= self.drain_seconds:
            return None
        return (
            f"a stop waits {self.drain_seconds:g} s for requests (serve.termination_grace_seconds {self.termination_grace_seconds}"
            f" less {_SHUTDOWN_SECONDS} to shut down), and one may take {request_seconds:g} s: what is not done is answered 503"
        )

    @property
    def limits(self) -> dict[str, int]:
        """What this scaling states of the limits that ``serving`` has, by their names there."""
        values = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
        }
        return {key: value for key, value in values.items() if value is not None}

    @property
    def compute_threads(self) -> int:
        """Threads one replica computes with."""
        return self.threads or max(1, int(self.cpus))

    @property
    def compute_streams(self) -> int:
        """Batches one replica computes at once."""
        if self.gpus > 0:
            return 1
        return self.streams or min(2, self.compute_threads)


class StageResources(FrozenConfig):
    """What each stage may take; stages run one after another, so each may take everything."""

    synthesis: PoolConfig = Field(
        default=PoolConfig(),
        description="Actors of the LLM engines, for generators without a pool of their own.",
    )
    mining: PoolConfig = Field(default=PoolConfig(), description="Actors that embed and search for mining.")
    embedding: PoolConfig = Field(default=PoolConfig(), description="Actors that embed a corpus.")
    merging: PoolConfig = Field(
        default=PoolConfig(), description="Tasks that merge; each writes one weight file at a time."
    )
    evaluation: PoolConfig = Field(
        default=PoolConfig(), description="Actors that embed the texts of evaluation tasks."
    )
    training: TrainingGroup = Field(default=TrainingGroup(), description="The worker group of Ray Train.")


# What the stages of a profile ask of its machines, and what fits: pure arithmetic, no Ray.
#
# Stages run one after another, so each is placed on empty machines; what is served is placed beside nothing too.


POOL_STAGES = ("synthesis", "mining", "embedding", "merging", "evaluation")
GATEWAY_CPUS = 0.1  # of the endpoint's front process, which parses and waits
_TOLERANCE = 1e-9

Bundle = dict[str, float]  # resource -> amount, in Ray's names; memory in bytes as Ray counts it


@dataclass(frozen=True, slots=True)
class Machine:
    """One node at full size; infinite where the profile does not say."""

    name: str
    cpus: float
    gpus: float
    memory_gib: float = math.inf

    @property
    def resources(self) -> Bundle:
        """The same in Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_gib * 2**30}


@dataclass(frozen=True, slots=True)
class Ask:
    """What one stage asks Ray for.

    Attributes:
        stage: its key below ``stages`` in cluster.yaml, or ``serve``.
        what: actor, engine, task, worker, replica or gateway.
        bundle: resources of one; one bundle never spans two nodes.
        minimum: how many must be placed before the stage works.
        maximum: how many it takes where there is room.
        strategy: gang: one placement group, all or nothing (Ray Train); single: each for itself.
    """

    stage: str
    what: str
    bundle: Bundle
    minimum: int
    maximum: int
    strategy: Literal["PACK", "STRICT_PACK", "single"] = "single"

    @property
    def needs(self) -> str:
        """One of it, in words."""
        return describe(self.bundle)


@dataclass(frozen=True, slots=True)
class Placement:
    """How many of an ask fit, where, and what is missing for the rest."""

    ask: Ask
    placed: int
    by_machine: dict[str, int]
    message: str = ""


def machines(profile: "Profile") -> list[Machine]:
    """All nodes of a profile at full size."""
    if not profile.pools:
        cpus = math.inf if profile.logical_cpus is None else float(profile.logical_cpus)
        return [Machine("this-machine", cpus, float(profile.gpus))]
    return [
        Machine(f"{name}-{number}", float(pool.cpus), float(pool.gpus), pool.memory_gib)
        for name, pool in profile.pools.items()
        for number in range(pool.max_nodes)
    ]


def asks(profile: "Profile") -> list[Ask]:
    """What every stage of a profile asks for, in pipeline order."""
    stages, serve = profile.stages, profile.serve
    found = [_pool(name, getattr(stages, name)) for name in POOL_STAGES]
    group = stages.training
    together = group.groups * group.workers
    workers = Ask("training", "worker", _bundle(group.cpus, group.gpus), together, together, "PACK")
    found.insert(POOL_STAGES.index("merging"), workers)
    replica = _bundle(serve.cpus, serve.gpus)
    found.append(Ask("serve", "replica", replica, serve.min_replicas, serve.max_replicas))
    if not serve.min_replicas == serve.max_replicas == 1:
        found.append(Ask("serve", "gateway", {"CPU": GATEWAY_CPUS}, 1, 1))
    return found


def _pool(stage: str, pool: PoolConfig) -> Ask:
    bundle = _bundle(pool.cpus, pool.gpus, pool.memory_gib)
    if stage == "merging":
        return Ask(stage, "task", bundle, pool.min_actors, pool.max_actors)
    # An engine's GPUs talk over NVLink: its one bundle holds them all, so Ray places it on one node or not at all.
    engine = stage == "synthesis" and pool.tensor_parallel > 1
    what, strategy = ("engine", "STRICT_PACK") if engine else ("actor", "single")
    return Ask(stage, what, bundle, pool.min_actors, pool.max_actors, strategy)  # type: ignore[arg-type]


def _bundle(cpus: float, gpus: float, memory_gib: float = 0.0) -> Bundle:
    amounts = {"CPU": cpus, "GPU": gpus, "memory": memory_gib * 2**30}
    return {name: amount for name, amount in amounts.items() if amount}


def copies(bundle: Bundle, machine: Machine) -> float:
    """How many of a bundle fit on an empty machine; infinite for a bundle that reserves nothing."""
    have = machine.resources
    shares = [have[name] / amount for name, amount in bundle.items()]
    most = min(shares, default=math.inf)
    return most if math.isinf(most) else math.floor(most + _TOLERANCE)


def capacity(bundle: Bundle, nodes: Sequence[Machine]) -> float:
    """How many of a bundle fit on all machines together, each whole on one."""
    return sum(copies(bundle, node) for node in nodes)


def describe(bundle: Bundle) -> str:
    """``4 CPUs + 1 GPU + 16 GiB``."""
    units = {"CPU": "CPU", "GPU": "GPU"}
    parts = [
        f"{amount:g} {units[name]}{'' if amount == 1 else 's'}"
        for name, amount in bundle.items()
        if name in units
    ]
    if "memory" in bundle:
        parts.append(f"{bundle['memory'] / 2**30:g} GiB")
    return " + ".join(parts) or "nothing reserved"


def place(ask: Ask, nodes: Sequence[Machine], taken: dict[str, Bundle] | None = None) -> Placement:
    """Place one ask at its maximum, node after node, and say what is missing for what stays pending.

    Args:
        ask: what is placed; a gang of ``PACK`` is placed whole or not at all.
        nodes: machines, filled in order.
        taken: resources already held, by machine.
    """
    held = {} if taken is None else taken
    left = [_rest(node, held.get(node.name, {})) for node in nodes]
    wanted = ask.maximum
    by_machine: dict[str, int] = {}
    for node in left:
        here = int(min(copies(ask.bundle, node), wanted - sum(by_machine.values())))
        if here:
            by_machine[node.name] = here
    placed = sum(by_machine.values())
    if placed >= wanted:
        return Placement(ask, placed, by_machine)
    if ask.strategy == "PACK":
        return Placement(ask, 0, {}, _missing(ask, placed, nodes, left))
    return Placement(ask, placed, by_machine, _missing(ask, placed, nodes, left))


def _rest(node: Machine, held: Bundle) -> Machine:
    return Machine(
        node.name,
        node.cpus - held.get("CPU", 0.0),
        node.gpus - held.get("GPU", 0.0),
        node.memory_gib - held.get("memory", 0.0) / 2**30,
    )


def _missing(ask: Ask, placed: int, nodes: Sequence[Machine], left: Sequence[Machine]) -> str:
    """Which resource the next one lacks, on the machine that comes nearest."""
    pending = ask.maximum - (0 if ask.strategy == "PACK" else placed)
    head = f"{ask.stage}: {pending} of {ask.maximum} {ask.what}s x {ask.needs} pending"
    if all(copies(ask.bundle, node) < 1 for node in nodes):
        name = _scarcest(ask.bundle, nodes)
        most = max(nodes, key=lambda node: node.resources[name])
        return (
            f"{head}: no node has {describe({name: ask.bundle[name]})}, the largest has {_amount(name, most)}"
        )
    name = _scarcest(ask.bundle, left)
    needed = ask.bundle[name] * ask.maximum
    total = sum(node.resources[name] for node in nodes)
    free = sum(node.resources[name] for node in left)
    return f"{head}: {describe({name: needed})} wanted, {describe({name: free})} free of {describe({name: total})}"


def _scarcest(bundle: Bundle, nodes: Sequence[Machine]) -> str:
    """The resource of which all machines together hold the fewest copies."""

    def share(name: str) -> float:
        return sum(math.floor(node.resources[name] / bundle[name] + _TOLERANCE) for node in nodes)

    finite = [name for name in bundle if not any(math.isinf(node.resources[name]) for node in nodes)]
    return min(finite or list(bundle), key=share)


def _amount(name: str, machine: Machine) -> str:
    return describe({name: machine.resources[name]})


def placement_table(profile: "Profile") -> tuple[str, list[Placement]]:
    """What each stage asks for and where it goes, a line each, and the placements themselves."""
    nodes = machines(profile)
    found = [place(ask, nodes) for ask in asks(profile)]
    return format_table([_line(one) for one in found], [one.message for one in found]), found


def _line(one: Placement) -> tuple[str, ...]:
    ask = one.ask
    count = f"{ask.minimum}" if ask.minimum == ask.maximum else f"{ask.minimum}..{ask.maximum}"
    each = sorted(set(one.by_machine.values()))
    spread = (
        f"{each[0]} a node" if len(each) == 1 else f"{each[0]} to {each[-1]} a node" if each else "nowhere"
    )
    gang = "one group" if ask.strategy == "PACK" else "each for itself"
    return (
        ask.stage,
        f"{count} {ask.what}s",
        ask.needs,
        gang,
        f"{one.placed} on {len(one.by_machine)} nodes",
        spread,
    )


def format_table(rows: Sequence[tuple[str, ...]], messages: Sequence[str]) -> str:
    """Aligned lines under a head, then what stays pending."""
    from embedloom.core.tables import text_table  # rich, which reading a config does not need

    header = ("stage", "wants", "each", "placed as", "fits", "spread")
    table = text_table(header, rows, range(6), style=None)
    return "\n".join([*table, *(message for message in messages if message)])


# Cross-checks of one profile: what its stages want against what its machines have. Pure, no Ray.
#
# Each raises ValueError with one plain sentence, which becomes a ConfigError naming file and profile.


HEAD_POOL = "head"
# Of an actor pool, in the object store at once: the block an actor computes, the next one, and a result that waits.
BLOCKS_PER_ACTOR = 3


def check_profile(profile: "Profile") -> None:
    """All checks, the most telling first.

    Raises:
        ValueError: naming the key, the value and what the machines have.
    """
    check_head(profile)
    nodes = machines(profile)
    for stage in POOL_STAGES:
        check_actor_gpus(getattr(profile.stages, stage), nodes, f"stages.{stage}")
    check_serve_gpus(profile.serve.gpus, nodes)
    for ask in asks(profile):
        check_minimum(ask, nodes)
    check_streaming(profile, nodes)
    check_object_store(profile, nodes)
    check_environment(profile)


def check_head(profile: "Profile") -> None:
    """Raise ValueError if the head is not one machine that stays."""
    head = profile.pools.get(HEAD_POOL)
    if head is None:
        return
    if (head.min_nodes, head.max_nodes) not in {(0, 1), (1, 1)}:
        raise ValueError(f"pools.head: max_nodes is {head.max_nodes}; a cluster has one head")
    if head.spot:
        raise ValueError(
            "pools.head.spot is true; the cluster's state dies with its head, so it cannot be spot"
        )


def check_actor_gpus(pool: PoolConfig, nodes: list[Machine], where: str) -> None:
    """Raise ValueError if an actor's GPUs span nodes or leave GPUs of every node unused.

    Also for the pools of ``synthesis.generators`` in a run config.
    """
    sizes = sorted({int(node.gpus) for node in nodes if node.gpus})
    if not pool.gpus or not sizes:
        return
    if pool.tensor_parallel > sizes[-1]:
        raise ValueError(
            f"{where}: tensor_parallel is {pool.tensor_parallel}, but a node has at most {sizes[-1]} GPUs; an engine "
            "must fit in one node"
        )
    if pool.gpus > sizes[-1]:
        raise ValueError(f"{where}: an actor takes {pool.gpus:g} GPUs, but a node has at most {sizes[-1]}")
    if pool.gpus > 1 and pool.gpus != int(pool.gpus):
        raise ValueError(f"{where}: gpus is {pool.gpus:g}; above 1 only whole GPUs can be reserved")
    if not any(_divides(pool.gpus, size) for size in sizes):
        raise ValueError(
            f"{where}: gpus is {pool.gpus:g}, which does not divide a node's GPUs ({_listed(sizes)}), so some would idle"
        )


def check_serve_gpus(gpus: float, nodes: list[Machine]) -> None:
    """Raise ValueError if replicas cannot share a node's GPUs evenly."""
    sizes = sorted({int(node.gpus) for node in nodes if node.gpus})
    if gpus and sizes and not any(_divides(gpus, size) for size in sizes):
        raise ValueError(f"serve: gpus is {gpus:g}, which does not divide a node's GPUs ({_listed(sizes)})")


def _divides(part: float, whole: int) -> bool:
    return part <= whole and math.isclose(whole / part, round(whole / part), abs_tol=1e-6)


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


def check_minimum(ask: Ask, nodes: list[Machine]) -> None:
    """Raise ValueError if the fewest that a stage works with do not fit, in sum or node by node."""
    where = "serve" if ask.stage == "serve" else f"stages.{ask.stage}"
    reading = ask.what in {"actor", "engine"}
    for name in ("CPU", "GPU", "memory"):
        total = sum(node.resources[name] for node in nodes)
        each = ask.bundle.get(name, 0.0)
        # One CPU stays free: a pool that holds every CPU starves the tasks that read for it, silently.
        spare = 1 if name == "CPU" and reading else 0
        if ask.minimum * each + spare > total + 1e-9:
            more = " + 1 for reading" if spare else ""
            raise ValueError(
                f"{where}: {ask.minimum} {ask.what}s x {_plural(name, each)}{more} exceed {_plural(name, total)}"
            )
    if capacity(ask.bundle, nodes) < ask.minimum:
        best = max(nodes, key=lambda node: copies(ask.bundle, node))
        raise ValueError(
            f"{where}: {ask.minimum} {ask.what}s x {ask.needs} do not fit node by node: {int(copies(ask.bundle, best))} "
            f"fit on {best.name}, {int(capacity(ask.bundle, nodes))} on all {len(nodes)} nodes"
        )


def _plural(name: str, amount: float) -> str:
    return describe({name: amount}) if name == "memory" else f"{amount:g} {name}s"


def check_streaming(profile: "Profile", nodes: list[Machine]) -> None:
    """Raise ValueError if synthesis and mining, which a streaming profile runs at once, do not fit together."""
    if not profile.streaming:
        return
    both = [ask for ask in asks(profile) if ask.stage in {"synthesis", "mining"}]
    for name in ("CPU", "GPU", "memory"):
        needed = sum(ask.minimum * ask.bundle.get(name, 0.0) for ask in both) + (1 if name == "CPU" else 0)
        total = sum(node.resources[name] for node in nodes)
        if needed > total + 1e-9:
            raise ValueError(
                f"streaming is true, but the fewest actors of stages.synthesis and stages.mining together take "
                f"{_plural(name, needed)} of {_plural(name, total)}"
            )


def check_object_store(profile: "Profile", nodes: list[Machine]) -> None:
    """Raise ValueError if the blocks in flight, or the memory of a node, are too much for one."""
    store = profile.object_store_mib
    for name, pool in profile.pools.items():
        if name != HEAD_POOL and store >= pool.memory_gib * 1024:
            raise ValueError(
                f"object_store_mib is {store}, but a node of pools.{name} has {pool.memory_gib * 1024:g} MiB of memory"
            )
    for ask in asks(profile):
        if ask.what not in {"actor", "engine"}:
            continue
        most = max(min(copies(ask.bundle, node), ask.maximum) for node in nodes)
        needed = most * BLOCKS_PER_ACTOR * profile.block_mib
        if needed > store:
            raise ValueError(
                f"object_store_mib is {store}, but stages.{ask.stage} may hold {needed:g} MiB on a node: {int(most)} "
                f"actors x {BLOCKS_PER_ACTOR} blocks x {profile.block_mib:g} MiB (block_mib)"
            )


def check_environment(profile: "Profile") -> None:
    """Raise ValueError for a secret that is not defined, a variable that is stated twice, or two mounts in one place."""
    for name, pool in profile.pools.items():
        where = f"pools.{name}"
        for variable in pool.secrets:
            if variable not in profile.secrets:
                defined = ", ".join(sorted(profile.secrets)) or "none"
                raise ValueError(
                    f"{where}.secrets: {variable} is not defined; defined in the profile's secrets: {defined}"
                )
            if variable in pool.env:
                raise ValueError(
                    f"{where}: {variable} is stated in both env and secrets; allowed: one of them"
                )
        for variable in CACHE_VARIABLES:
            if profile.cache_folder is not None and variable in pool.env:
                raise ValueError(
                    f"{where}.env: {variable} is stated beside cache_folder, which sets it; allowed: one of them"
                )
        taken = profile.node_folders()
        for volume, mount in pool.volumes.items():
            if mount.path in taken:
                raise ValueError(
                    f"{where}.volumes.{volume}.path: {mount.path!r} is mounted already, by {taken[mount.path]}"
                )
            taken[mount.path] = f"volumes.{volume}"


_IMAGE = re.compile(
    r"(?:(?P<registry>[a-z0-9-]+(?:\.[a-z0-9-]+)+(?::[0-9]+)?|[a-z0-9-]+:[0-9]+|localhost)/)?"
    r"(?P<name>[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True)
class ImageReference:
    """The parts of an image's name, as the OCI distribution specification has them."""

    registry: str | None
    name: str
    tag: str | None
    digest: str | None


def image_reference(image: str) -> ImageReference:
    """Read ``registry/name:tag@sha256:digest``, of which all but the name may be missing.

    Raises:
        ValueError: it is none.
    """
    found = _IMAGE.fullmatch(image)
    if found is None:
        raise ValueError(
            f"{image!r} is no image; allowed: registry/name:tag or registry/name@sha256: and 64 hexadecimal digits, "
            "the name in lower case"
        )
    return ImageReference(**found.groupdict())


class RayVersion(FrozenConfig):
    """What every node runs."""

    version: str = Field(description="Ray's version on every node, exactly.")
    python: str = Field(description="Python's version on every node, such as '3.11'.")
    image: str | None = Field(
        default=None,
        description=(
            "Container image of every node, built from docker/Dockerfile: registry/name:tag, or "
            "registry/name@sha256:... which nobody can replace. Null: none; KubeRay and the launcher need one."
        ),
    )

    @field_validator("image")
    @classmethod
    def _image_is_one(cls, image: str | None) -> str | None:
        if image is not None:
            image_reference(image)
        return image


class AuthConfig(FrozenConfig):
    """Ray's own token authentication for dashboard, jobs and GCS."""

    mode: Literal["token", "disabled"] = Field(
        default="token",
        description=(
            "token: Ray's own token authentication for dashboard, jobs and GCS. disabled: whoever reaches "
            "the ports can run code."
        ),
    )
    token_path: str = Field(
        default="~/.ray/auth_token",
        description="File of the token; a local Ray makes it, readable by its owner only, if it is not there.",
    )


class StorageConfig(FrozenConfig):
    """Where runs are kept when ``run.output_dir`` is a relative path."""

    root: str | None = Field(
        default=None,
        description=(
            "Where runs are kept when run.output_dir is a relative path: s3://..., gs://..., or an "
            "absolute folder that all nodes see. Null: the working directory."
        ),
    )
    claim: str | None = Field(
        default=None,
        description=(
            "KubeRay: PersistentVolumeClaim that is mounted at a root that is a folder. Null: none is "
            "mounted."
        ),
    )
    mount_command: str | None = Field(
        default=None,
        description=(
            "Launcher: shell command that mounts the root on a node before its container starts. Null: "
            "the image has it."
        ),
    )

    @model_validator(mode="after")
    def _mounts_have_a_folder(self) -> "StorageConfig":
        if self.root is not None and "://" not in self.root and not self.root.startswith("/"):
            raise ValueError(f"root is {self.root!r}; allowed: an absolute folder, s3://... or gs://...")
        for key in ("claim", "mount_command"):
            if getattr(self, key) is not None and (self.root is None or "://" in self.root):
                raise ValueError(f"{key} is set, but root is {self.root!r}, no folder to mount it at")
        return self


class SecretKey(FrozenConfig):
    """One value of a Kubernetes Secret."""

    secret: str = Field(description="Name of the Secret, in the profile's namespace.")
    key: str = Field(description="Key of the value in the Secret.")


_VOLUME_SOURCES = ("claim", "secret", "config_map", "host_path")


class Volume(FrozenConfig):
    """A folder that a pool's containers see: where, and what is there."""

    path: str = Field(pattern="^/", description="Absolute folder in the container.")
    claim: str | None = Field(
        default=None, description="KubeRay: PersistentVolumeClaim that is mounted. Null: another source."
    )
    secret: str | None = Field(
        default=None, description="KubeRay: Secret whose keys are files there. Null: another source."
    )
    config_map: str | None = Field(
        default=None, description="KubeRay: ConfigMap whose keys are files there. Null: another source."
    )
    host_path: str | None = Field(
        default=None,
        pattern="^/",
        description="Folder of the node, made if it is not there; what the launcher mounts in any case. Null: another source.",
    )
    read_only: bool = Field(default=False, description="Whether containers may only read it.")

    @model_validator(mode="after")
    def _has_a_source(self) -> "Volume":
        of_kubernetes = [key for key in _VOLUME_SOURCES[:-1] if getattr(self, key) is not None]
        if len(of_kubernetes) > 1:
            raise ValueError(f"{' and '.join(of_kubernetes)} are both set; allowed: one of them")
        if not of_kubernetes and self.host_path is None:
            raise ValueError(f"no source; one of {', '.join(_VOLUME_SOURCES)} is required")
        return self


class Toleration(FrozenConfig):
    """A taint of nodes that a pool's pods put up with."""

    key: str = Field(description="Key of the taint, such as nvidia.com/gpu.")
    value: str | None = Field(default=None, description="Value of the taint. Null: any.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default="NoSchedule", description="Effect of the taint. Null: any."
    )

    def covers(self, key: str, effect: str) -> bool:
        """Whether it puts up with any taint of that key and effect."""
        return self.key == key and self.value is None and self.effect in (None, effect)


# What the device plugins of EFA and of NVIDIA's network operator call their devices.
_FABRIC_RESOURCES = {"efa": "vpc.amazonaws.com/efa", "infiniband": "rdma/rdma_shared_device_a"}
EFA_HUGEPAGES_MIB = 5120  # what libfabric's provider takes, and what AWS's node images set aside
MIB_BESIDE_STORE = 16384  # of shared memory: NCCL's rings and vLLM's broadcasts of 8 GPUs, with room
CACHE_VARIABLES = ("EMBEDLOOM_CACHE", "HF_HOME")


class NodePool(FrozenConfig):
    """Machines of one kind."""

    instance: str | None = Field(
        default=None,
        description=(
            "Instance type of the cloud, such as p4de.24xlarge. Null: not stated; the launcher's file "
            "needs it."
        ),
    )
    cpus: int = Field(ge=1, description="CPUs of one node that Ray may use.")
    gpus: int = Field(default=0, ge=0, description="GPUs of one node.")
    accelerator: str | None = Field(
        default=None,
        description=(
            "Kind of GPU as Ray names it, such as A100; chooses the device in rates.yaml. Null: nodes "
            "without GPUs, or of any kind."
        ),
    )
    memory_gib: float = Field(gt=0, description="Memory of one node that Ray may use, in GiB.")
    min_nodes: int = Field(default=0, ge=0, description="Number of machines that are always there.")
    max_nodes: int = Field(default=1, ge=1, description="Largest number of machines that the pool grows to.")
    spot: bool = Field(
        default=False,
        description="Cheaper machines that may be taken away; every stage resumes. Not for the head.",
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels.")
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Variables of the nodes' environment; they win over those that the profile sets.",
    )
    secrets: tuple[str, ...] = Field(
        default=(), description="Variables whose values come from a Secret: names of the profile's `secrets`."
    )
    volumes: dict[str, Volume] = Field(
        default_factory=dict, description="Name -> folder that the containers see, besides the profile's own."
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(), description="KubeRay: taints of the nodes that the pods put up with."
    )
    image_pull_secrets: tuple[str, ...] = Field(
        default=(), description="KubeRay: Secrets with which the image is pulled from its registry."
    )
    fabric: Literal["efa", "infiniband"] | None = Field(
        default=None,
        description=(
            "Network between the GPUs of several nodes, beside the ordinary one: asks for its devices, locked memory and "
            "NCCL's variables. Null: TCP, on which a reduction of 15 GB takes seconds."
        ),
    )
    fabric_devices: int = Field(
        default=1,
        ge=1,
        description="Devices of the fabric in one node that a pod takes: 4 on p4d and p4de, 32 on p5 and p5e.",
    )
    fabric_resource: str | None = Field(
        default=None,
        description=(
            "KubeRay: what the device plugin calls a device of the fabric. Null: vpc.amazonaws.com/efa, or "
            "rdma/rdma_shared_device_a for infiniband."
        ),
    )
    hugepages_mib: int | None = Field(
        default=None,
        ge=0,
        multiple_of=2,
        description=(
            "Memory in pages of 2 MiB that a pod takes of those that the node has set aside. Null: 5120 with fabric efa, "
            "as AWS's node images have it, else none."
        ),
    )
    disk_gib: int | None = Field(
        default=None,
        ge=1,
        description="Launcher: size of the root disk, in GiB, which holds the image. Null: the machine image's own.",
    )
    placement_group: str | None = Field(
        default=None,
        description=(
            "Launcher: EC2 placement group of strategy cluster that the nodes start in, close to each other; it must be "
            "there. Null: none."
        ),
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "NodePool":
        if self.max_nodes < self.min_nodes:
            raise ValueError(f"max_nodes is {self.max_nodes}, below min_nodes {self.min_nodes}")
        return self

    @model_validator(mode="after")
    def _names_are_names(self) -> "NodePool":
        for variable in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
                raise ValueError(
                    f"env: {variable!r} is no name of a variable; allowed: letters, digits and _"
                )
        for volume in self.volumes:
            if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", volume) or volume in _OWN_VOLUMES:
                raise ValueError(
                    f"volumes: {volume!r} is not allowed; allowed: lower case letters, digits and -, and none of "
                    f"{', '.join(_OWN_VOLUMES)}"
                )
        return self

    @property
    def hugepages(self) -> int:
        """MiB in pages of 2 MiB that a pod takes."""
        if self.hugepages_mib is not None:
            return self.hugepages_mib
        return EFA_HUGEPAGES_MIB if self.fabric == "efa" else 0

    @property
    def fabric_request(self) -> dict[str, int]:
        """Devices that a pod asks for, by the name of their resource."""
        if self.fabric is None:
            return {}
        return {self.fabric_resource or _FABRIC_RESOURCES[self.fabric]: self.fabric_devices}


_OWN_VOLUMES = ("shm", "spill", "runs", "cache", "config")


class LauncherConfig(FrozenConfig):
    """What `ray up` needs of an AWS account, besides instance types."""

    subnet: str | None = Field(
        default=None,
        description="Subnet of all nodes, such as subnet-0123. Null: Ray chooses; EFA's interfaces need it.",
    )
    security_groups: tuple[str, ...] = Field(
        default=(),
        description=(
            "Security groups of all nodes, such as sg-0123; one must allow all traffic within itself. None: Ray makes one; "
            "EFA's interfaces need them."
        ),
    )
    iam_profile: str | None = Field(
        default=None,
        description=(
            "IAM instance profile of all nodes, by name: may start and end instances (head), read the registry and the "
            "storage root. Null: Ray makes one for the head, and the others have none."
        ),
    )
    secrets_file: str = Field(
        default="~/.embedloom/secrets.env",
        description="File on the machine of `ray up` with the profile's secrets, NAME=value a line; copied to the nodes.",
    )


_Budgeted = TypeVar("_Budgeted", PoolConfig, ServeScaling)


def _with_budget(section: _Budgeted, seconds: int) -> _Budgeted:
    if section.start_seconds is not None:
        return section
    return section.model_copy(update={"start_seconds": seconds})


class Profile(FrozenConfig):
    """One place to run: this machine, or a cluster."""

    backend: Literal["local", "existing"] = Field(
        default="local",
        description=(
            "local: a Ray that the command starts on this machine. existing: the running cluster at "
            "`address`."
        ),
    )
    address: str | None = Field(
        default=None, description="existing: address of the cluster, or auto. Null: this machine's own Ray."
    )
    region: str | None = Field(
        default=None,
        description="AWS region; makes `cluster render` write the launcher's file. Null: it does not.",
    )
    namespace: str = Field(default="default", description="Kubernetes namespace of the KubeRay files.")
    storage: StorageConfig = Field(default=StorageConfig(), description="Where runs are kept.")
    logical_cpus: int | None = Field(
        default=None,
        ge=2,
        description=(
            "Without pools: CPUs that Ray schedules with, which may be more than there are, since Ray "
            "only counts them. Null: those of the machine."
        ),
    )
    gpus: int = Field(default=0, ge=0, description="Without pools: GPUs of this machine.")
    accelerator: str | None = Field(
        default=None,
        description=(
            "Without pools: kind of this machine's GPUs as Ray names it, such as H100; chooses the device in rates.yaml. "
            "Null: not stated, so `plan` predicts nothing of them."
        ),
    )
    object_store_mib: int = Field(
        default=512,
        ge=100,
        description="Shared memory of Ray's object store on every node, in MiB; must hold three blocks per actor.",
    )
    spill_folder: str | None = Field(
        default=None,
        description=(
            "Folder on a fast local disk of every node, to which the object store spills. Null: Ray's "
            "session folder."
        ),
    )
    start_seconds: int | None = Field(
        default=None,
        ge=1,
        exclude_if=lambda value: value is None,
        description=(
            "start_seconds of every stage and of serve that states none of its own. Null: 3600 with pools of min_nodes 0, whose "
            "nodes must first be bought, else 600."
        ),
    )
    block_mib: float = Field(default=32.0, gt=0, description="Target size of Ray Data's blocks, in MiB.")
    dashboard_port: int = Field(default=8265, ge=1, le=65535, description="Port of Ray's dashboard.")
    pools: dict[str, NodePool] = Field(
        default_factory=dict,
        description="Pool name -> machines of one kind; the pool named head holds the cluster's head.",
    )
    shared_memory_mib: int | None = Field(
        default=None,
        ge=100,
        description=(
            "With pools: shared memory of a container, in MiB, of which the object store is a part; NCCL and vLLM need some "
            "too. Null: the object store and 16384 more."
        ),
    )
    cache_folder: str | None = Field(
        default=None,
        pattern="^/",
        description=(
            "With pools: folder of every node that models and data sets are fetched to (EMBEDLOOM_CACHE, and HF_HOME in it), "
            "on its fast local disk or below the storage root. Null: the container's own disk, lost with it. On one machine, "
            "set EMBEDLOOM_CACHE."
        ),
    )
    secrets: dict[str, SecretKey] = Field(
        default_factory=dict,
        description="Variable -> Kubernetes Secret with its value; pools name the variables they get.",
    )
    launcher: LauncherConfig = Field(
        default=LauncherConfig(), description="What the launcher's file needs of an AWS account."
    )
    stages: StageResources = Field(
        default=StageResources(),
        description="What each stage may take. Stages run one after another, so each may take everything.",
    )
    streaming: bool = Field(
        default=False,
        description="Embed rows for mining while others are still written; takes both stages' actors at once.",
    )
    serve: ServeScaling = Field(
        default=ServeScaling(), description="How many replicas the endpoint has, and what each reserves."
    )
    serve_reranker: ServeScaling | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "The same of the endpoint's reranker, where one is served: its replicas are a pool of their own, scaled by their own "
            "queue. Null: as serve."
        ),
    )
    serve_search: ServeScaling | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "Replicas that search the served corpus (serving.corpus), a pool of their own on CPUs, scaled towards 2 searches a "
            "replica unless target_ongoing_requests says otherwise; those of a node share its vectors. Null: the processes that "
            "answer HTTP search it."
        ),
    )

    @field_validator("serve_search")
    @classmethod
    def _searches_take_no_gpu(cls, value: ServeScaling | None) -> ServeScaling | None:
        if value is not None and (value.gpus or value.min_replicas == 0):
            raise ValueError(
                f"serve_search: gpus {value.gpus:g} and min_replicas {value.min_replicas}; allowed: gpus 0 and at least 1 replica"
            )
        return value

    @model_validator(mode="after")
    def _stages_fit_the_machines(self) -> "Profile":
        if self.pools and (self.gpus or self.logical_cpus is not None or self.accelerator is not None):
            raise ValueError(
                "logical_cpus, gpus and accelerator describe one machine; with pools, each pool states its own"
            )
        for key in ("cache_folder", "shared_memory_mib"):
            if getattr(self, key) is not None and not self.pools:
                raise ValueError(f"{key} is for pools, and this profile has none")
        check_profile(self)
        # Here, and not where it is asked for: a stage is handed its pool and never sees the profile.
        budget = self.start_seconds or (COLD_START_SECONDS if self.buys_nodes else None)
        if budget is not None:
            self.__dict__["serve"] = _with_budget(self.serve, budget)
            pools = {stage: _with_budget(getattr(self.stages, stage), budget) for stage in POOL_STAGES}
            self.__dict__["stages"] = self.stages.model_copy(update=pools)
        return self

    def store_bytes(self, pool: str) -> int:
        """Object store of a node in bytes: the profile's, on the head at most 30 % of its memory (Ray's own share)."""
        whole = self.object_store_mib * 2**20
        return min(whole, int(self.pools[pool].memory_gib * 2**30 * 0.3)) if pool == HEAD_POOL else whole

    def shm_mib(self, pool: str) -> int:
        """Shared memory of a node's container in MiB."""
        return self.shared_memory_mib or math.ceil(self.store_bytes(pool) / 2**20) + MIB_BESIDE_STORE

    def node_folders(self) -> dict[str, str]:
        """Folders that every container of the profile has from outside, and which key says so."""
        found = {"/dev/shm": "the object store"}
        if self.spill_folder is not None:
            found[self.spill_folder] = "spill_folder"
        if self.storage.root is not None and "://" not in self.storage.root:
            found[self.storage.root] = "storage.root"
        if self.cache_folder is not None and not self.is_shared(self.cache_folder):
            found[self.cache_folder] = "cache_folder"
        return found

    def is_shared(self, folder: str) -> bool:
        """Whether a folder lies below a storage root that is a folder too."""
        root = self.storage.root
        return root is not None and Path(folder).is_relative_to(root)

    @property
    def buys_nodes(self) -> bool:
        """Whether some nodes are bought when they are asked for."""
        return any(pool.min_nodes == 0 for pool in self.pools.values())

    @property
    def start_budget(self) -> int:
        """Seconds until what is asked for must be there, where a stage says nothing else."""
        return self.start_seconds or (COLD_START_SECONDS if self.buys_nodes else WARM_START_SECONDS)

    @property
    def total_gpus(self) -> int:
        """GPUs at full size."""
        if not self.pools:
            return self.gpus
        return sum(pool.gpus * pool.max_nodes for pool in self.pools.values())

    def run_folder(self, folder: str) -> str:
        """Where a run's folder is: below the storage root, unless it has a place of its own."""
        if self.storage.root is None or "://" in folder or folder.startswith("/"):
            return folder
        return f"{self.storage.root.rstrip('/')}/{folder}"


class ClusterConfig(FrozenConfig):
    """The whole file."""

    version: Literal[1] = Field(description="Version of the file's form.")
    ray: RayVersion = Field(
        description="Versions of Ray and Python, and the image, that all nodes have in common."
    )
    auth: AuthConfig = Field(default=AuthConfig(), description="Who may use the cluster.")
    profiles: dict[str, Profile] = Field(
        min_length=1,
        description="Profile name -> one place to run: this machine, or a cluster. `--profile` chooses one.",
    )

    def profile(self, name: str) -> Profile:
        """One profile by name.

        Raises:
            ConfigError: no such profile.
        """
        if name not in self.profiles:
            raise ConfigError(
                f"--profile: {name!r} is not in the cluster config; allowed: {', '.join(sorted(self.profiles))}"
            )
        return self.profiles[name]


def load_cluster(path: Path) -> ClusterConfig:
    """Read and check the cluster config.

    Raises:
        ConfigError: naming the file, the key, the value seen and what is allowed.
    """
    return validate(ClusterConfig, read_yaml(path), str(path))
