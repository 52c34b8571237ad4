"""What a synthesis section costs before anything runs: which generators run side by side, answers, tokens and hours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import Generator, SynthesisConfig
from embedloom.errors import ConfigError
from embedloom.synthesis.families.registry import FAMILIES
from embedloom.synthesis.prompts_used import sampling_of, task_families, writers
from embedloom.synthesis.quotas import shares

# Which generators run side by side: pure arithmetic over what the profile lets the stage take.


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
    pools = [_started_as(budget, one.pool) if one.pool else budget for one in wave]
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


def _started_as(budget: PoolConfig, pool: PoolConfig) -> PoolConfig:
    """A generator's own pool; how long machines take to come is the profile's to say."""
    return pool.model_copy(update={"start_seconds": pool.start_seconds or budget.start_seconds})


def _needs(pool: PoolConfig) -> str:
    parts = [f"{pool.cpus:g} CPUs"]
    if pool.gpus:
        parts.append(f"{pool.gpus:g} GPUs")
    if pool.memory_gib:
        parts.append(f"{pool.memory_gib:g} GiB")
    return " + ".join(parts)


# What a synthesis section costs, before anything runs: answers, output tokens at most, and hours by known rates.


@dataclass(frozen=True, slots=True)
class Rate:
    """Output tokens per second of one GPU (or, without GPUs, of one actor), and where the number is from."""

    tokens_per_second: float
    source: str


# Models of arXiv 2511.07025 §4.3 by the parameters active per token, in billions.
ACTIVE_BILLIONS = {
    "gpt-oss-20b": 3.6,
    "gpt-oss-120b": 5.1,
    "Mixtral-8x22B-Instruct-v0.1": 39.0,
    "Llama-3.3-70B-Instruct": 70.0,
    "Llama-4-Scout-17B-16E-Instruct": 17.0,
    "Llama-4-Maverick-17B-128E-Instruct": 17.0,
}
_SMALL = Rate(2_400.0, "an 8B model on one L40S, github.com/ray-project/ray/issues/52634")
_LARGE = Rate(600.0, "a guess for models above 10 B active parameters; measure yours")
_LARGE_BILLIONS = 10.0
CPU_RATES = {
    "smollm2-135m": Rate(265.0, "32 short JSON answers at a time, two idle AMD EPYC cores with AVX-512 bf16"),
}


@dataclass(frozen=True, slots=True)
class Price:
    """One generator's part: answers of the first round and the tokens they have at most."""

    model: str
    answers: int
    output_tokens: int
    rate: Rate | None

    @property
    def hours(self) -> float | None:
        """GPU-hours (without GPUs: hours of one actor) at most; None where no rate is known."""
        return None if self.rate is None else self.output_tokens / self.rate.tokens_per_second / 3600


def prices(config: SynthesisConfig, gpu: bool) -> list[Price]:
    """What each generator writes at most if nothing is refused."""
    generators = writers(config)
    weights = [generator.weight for generator in generators]
    answers = [0] * len(generators)
    tokens = [0] * len(generators)
    for options in config.families:
        family = FAMILIES[options.family]
        if family.extracts:
            continue
        for number, rows in enumerate(shares(options.rows, weights)):
            asked = math.ceil(rows / config.expected_acceptance / family.asked_rows(options))
            answers[number] += asked
            tokens[number] += asked * sampling_of(options, config.sampling).max_new_tokens
    for section in task_families(config):
        for number, rows in enumerate(shares(config.tasks.count, weights)):
            asked = math.ceil(rows / section.tasks_per_answer)
            answers[number] += asked
            tokens[number] += asked * config.sampling.max_new_tokens
    return [
        Price(generator.model, answer, token, rate_of(generator, gpu))
        for generator, answer, token in zip(generators, answers, tokens, strict=True)
    ]


def rate_of(generator: Generator, gpu: bool) -> Rate | None:
    """The rate of a model, by its name; None where nothing is known."""
    if not gpu:
        return CPU_RATES.get(generator.model)
    active = ACTIVE_BILLIONS.get(generator.model.rsplit("/", 1)[-1].removesuffix("-FP8"))
    if active is None:
        return None
    return _LARGE if active > _LARGE_BILLIONS else _SMALL


def describe(config: SynthesisConfig, pool: PoolConfig) -> list[str]:
    """Lines for ``plan``: what runs side by side, and what it costs at most.

    Raises:
        ConfigError: a generator's pool is more than the profile lets the stage take.
    """
    gpu = any((generator.pool or pool).gpus for generator in config.generators)
    lines = []
    planned = waves(writers(config), pool)
    for number, wave in enumerate(planned, start=1):
        names = ", ".join(f"{one.generator.model} ({_actors(one.pool)})" for one in wave)
        how = "side by side" if len(wave) > 1 else "alone"
        turn = f"turn {number} of {len(planned)}, " if len(planned) > 1 else ""
        lines.append(f"synthesis: {turn}{how}: {names}")
    found = prices(config, gpu)
    unit = "GPU-hours" if gpu else "actor-hours"
    for price in found:
        cost = "no rate known, not priced" if price.hours is None else f"{price.hours:,.1f} {unit} at most"
        lines.append(
            f"synthesis: {price.model}: {price.answers:,} answers, {price.output_tokens:,} output tokens at most, {cost}"
        )
    if len(found) > 1:
        known = [price.hours for price in found if price.hours is not None]
        tokens = sum(price.output_tokens for price in found)
        lines.append(
            f"synthesis: together {tokens:,} output tokens, {sum(known):,.1f} {unit} at most"
            + ("" if len(known) == len(found) else f" for {len(known)} of {len(found)} generators")
        )
    rates = {price.rate for price in found if price.rate is not None}
    for rate in sorted(rates, key=lambda one: one.tokens_per_second):
        lines.append(f"synthesis: {rate.tokens_per_second:,.0f} output tokens/s: {rate.source}")
    return lines


def _actors(pool: PoolConfig) -> str:
    count = (
        f"{pool.min_actors}"
        if pool.min_actors == pool.max_actors
        else f"{pool.min_actors}..{pool.max_actors}"
    )
    return f"{count} x {f'{pool.gpus:g} GPU' if pool.gpus else f'{pool.cpus:g} CPU'}"
