"""Which generators run side by side: pure arithmetic over what the profile lets the stage take."""

from collections.abc import Sequence
from dataclasses import dataclass

from embedloom.config.resources import PoolConfig
from embedloom.config.synthesis import Generator
from embedloom.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placed:
    """A generator and the actors it gets while its wave runs."""

    generator: Generator
    pool: PoolConfig


def waves(generators: Sequence[Generator], profile_pool: PoolConfig) -> list[list[Placed]]:
    """Generators that run at the same time, wave after wave, in the order of the config.

    The stage may take what the profile's pool may take at most: ``max_actors`` times its CPUs, GPUs and memory.
    Generators are put together while their smallest pools fit; what is then left goes actor by actor to the
    generator with the fewest actors for its weight, up to its own ``max_actors``.

    Raises:
        ConfigError: a generator's smallest pool alone is more than the stage may take.
    """
    found: list[list[Generator]] = []
    for number, generator in enumerate(generators):
        own = generator.pool or profile_pool
        if not _fits([(own, own.min_actors)], profile_pool):
            raise ConfigError(
                f"synthesis.generators.{number}.pool: {own.min_actors} actors x {_needs(own)} exceed what the profile "
                f"lets synthesis take, {profile_pool.max_actors} actors x {_needs(profile_pool)}"
            )
        together = [*found[-1], generator] if found else []
        if together and _fits([_smallest(one, profile_pool) for one in together], profile_pool):
            found[-1].append(generator)
        else:
            found.append([generator])
    return [_scaled(wave, profile_pool) for wave in found]


def _smallest(generator: Generator, profile_pool: PoolConfig) -> tuple[PoolConfig, int]:
    pool = generator.pool or profile_pool
    return pool, pool.min_actors


def _fits(wanted: Sequence[tuple[PoolConfig, int]], budget: PoolConfig) -> bool:
    return all(
        sum(getattr(pool, name) * actors for pool, actors in wanted)
        <= getattr(budget, name) * budget.max_actors + 1e-9
        for name in ("cpus", "gpus", "memory_gib")
        if name != "memory_gib" or budget.memory_gib  # 0: not reserved, so not counted
    )


def _scaled(wave: Sequence[Generator], budget: PoolConfig) -> list[Placed]:
    pools = [one.pool or budget for one in wave]
    actors = [pool.min_actors for pool in pools]
    while True:
        open_ones = [
            n
            for n, pool in enumerate(pools)
            if actors[n] < pool.max_actors
            and _fits([(p, a + (m == n)) for m, (p, a) in enumerate(zip(pools, actors, strict=True))], budget)
        ]
        if not open_ones:
            break
        neediest = min(open_ones, key=lambda n: (actors[n] / max(wave[n].weight, 1e-9), n))
        actors[neediest] += 1
    return [
        Placed(one, pool.model_copy(update={"max_actors": most}))
        for one, pool, most in zip(wave, pools, actors, strict=True)
    ]


def _needs(pool: PoolConfig) -> str:
    parts = [f"{pool.cpus:g} CPUs"]
    if pool.gpus:
        parts.append(f"{pool.gpus:g} GPUs")
    if pool.memory_gib:
        parts.append(f"{pool.memory_gib:g} GiB")
    return " + ".join(parts)
