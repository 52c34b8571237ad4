"""Cross-checks of one profile: what its stages want against what its machines have. Pure, no Ray.

Each raises ValueError with one plain sentence, which becomes a ConfigError naming file and profile.
"""

import math
from typing import TYPE_CHECKING

from embedloom.cluster.placement import POOL_STAGES, Ask, Machine, asks, capacity, copies, describe, machines
from embedloom.config.resources import PoolConfig

if TYPE_CHECKING:
    from embedloom.cluster.config import Profile

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
