"""What the stages of a profile ask of its machines, and what fits: pure arithmetic, no Ray.

Stages run one after another, so each is placed on empty machines; what is served is placed beside nothing too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from embedloom.config.resources import PoolConfig

if TYPE_CHECKING:
    from embedloom.cluster.config import Profile

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
    lines: list[tuple[Any, ...]] = [("stage", "wants", "each", "placed as", "fits", "spread"), *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in lines
    ]
    return "\n".join([*table, *(message for message in messages if message)])
