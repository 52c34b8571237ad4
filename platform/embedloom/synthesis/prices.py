"""What a synthesis section costs before anything runs: which generators run side by side, answers, tokens and hours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import EndpointConfig, FamilyConfig, Generator, JudgeCheck, SynthesisConfig
from embedloom.errors import ConfigError
from embedloom.synthesis.families.registry import FAMILIES, family_prompt
from embedloom.synthesis.judge import ANSWER_TOKENS, judge_prompt
from embedloom.synthesis.prompts_used import sampling_of, task_families, writers
from embedloom.synthesis.quotas import shares

# Which generators run side by side: pure arithmetic over what the profile lets the stage take.


_ASKING_CPUS = 0.1  # of an actor that waits for a server


@dataclass(frozen=True, slots=True)
class Placed:
    """A generator and the actors it gets while its wave runs."""

    generator: Generator
    pool: PoolConfig


def waves(generators: Sequence[Generator], profile_pool: PoolConfig) -> list[list[Placed]]:
    """Generators that run at the same time, wave after wave, in the order of the config.

    The stage may take what the profile's pool may take at most: ``max_actors`` times its CPUs, GPUs and memory.
    Generators are put together while their smallest pools fit; what is then left goes actor by actor to the
    generator with the fewest actors for its weight, up to its own ``max_actors``. Endpoints compute elsewhere and run
    beside the first.

    Raises:
        ConfigError: a generator's smallest pool alone is more than the stage may take.
    """
    found: list[list[Generator]] = []
    for number, generator in enumerate(generators):
        if generator.endpoint is not None:
            continue
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
    planned = [_scaled(wave, profile_pool) for wave in found]
    elsewhere = [
        Placed(one, one.pool or asking_pool(profile_pool)) for one in generators if one.endpoint is not None
    ]
    if not elsewhere:
        return planned
    return [[*elsewhere, *planned[0]], *planned[1:]] if planned else [elsewhere]


def asking_pool(profile_pool: PoolConfig) -> PoolConfig:
    """One actor that only sends requests: hundreds at once, in one event loop."""
    return PoolConfig(cpus=_ASKING_CPUS, start_seconds=profile_pool.start_seconds)


def judge_pool(check: JudgeCheck, profile_pool: PoolConfig) -> PoolConfig:
    """The judge's actors: those of the profile, or the one that asks an endpoint."""
    return profile_pool if check.endpoint is None else asking_pool(profile_pool)


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
_CHARACTERS_PER_TOKEN = 4  # of English, and dearer elsewhere: prices are about what comes
CPU_RATES = {
    "smollm2-135m": Rate(265.0, "32 short JSON answers at a time, two idle AMD EPYC cores with AVX-512 bf16"),
}


@dataclass(frozen=True, slots=True)
class Price:
    """One generator's part: answers of the first round and the tokens they have at most; of an endpoint, those of prompts too."""

    model: str
    answers: int
    output_tokens: int
    rate: Rate | None
    prompt_tokens: int = 0
    endpoint: EndpointConfig | None = None

    @property
    def money(self) -> float | None:
        """What an endpoint costs at most; None where a price is unknown."""
        return None if self.endpoint is None else self.endpoint.cost(self.prompt_tokens, self.output_tokens)

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
    shown = [0] * len(generators)
    for options in config.families:
        family = FAMILIES[options.family]
        if family.extracts:
            continue
        for number, rows in enumerate(shares(options.rows, weights)):
            asked = math.ceil(rows / config.expected_acceptance / family.asked_rows(options))
            answers[number] += asked
            tokens[number] += asked * sampling_of(options, config.sampling).max_new_tokens
            shown[number] += asked * _prompt_tokens(options, generators[number])
    for section in task_families(config):
        for number, rows in enumerate(shares(config.tasks.count, weights)):
            asked = math.ceil(rows / section.tasks_per_answer)
            answers[number] += asked
            tokens[number] += asked * config.sampling.max_new_tokens
    return [
        Price(one.model, answer, token, rate_of(one, gpu), prompt if one.endpoint else 0, one.endpoint)
        for one, answer, token, prompt in zip(generators, answers, tokens, shown, strict=True)
    ]


def _prompt_tokens(options: FamilyConfig, generator: Generator) -> int:
    """Of one prompt: its template, and the longest document that it shows, at some four characters a token."""
    if generator.endpoint is None:
        return 0
    characters = sum(len(message.content) for message in family_prompt(options, generator.small).messages)
    if FAMILIES[options.family].source in ("documents", "pairs"):
        characters += getattr(options, "max_document_characters", 0)
    return math.ceil(characters / _CHARACTERS_PER_TOKEN)


def judge_price(config: SynthesisConfig) -> Price | None:
    """What a judge behind an endpoint is asked if every row comes to it; None without one."""
    check = config.quality.judge
    if check is None or check.endpoint is None:
        return None
    rows = sum(options.rows for options in config.families)
    characters = (
        sum(len(message.content) for message in judge_prompt(check).messages) + 2 * check.max_characters
    )
    prompt = math.ceil(characters / _CHARACTERS_PER_TOKEN)
    return Price(f"judge {check.model}", rows, rows * ANSWER_TOKENS, None, rows * prompt, check.endpoint)


def rate_of(generator: Generator, gpu: bool) -> Rate | None:
    """The rate of a model, by its name; None where nothing is known."""
    if generator.endpoint is not None:
        return None
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
    gpu = any((one.pool or pool).gpus for one in config.generators if one.endpoint is None)
    lines = []
    planned = waves(writers(config), pool)
    for number, wave in enumerate(planned, start=1):
        names = ", ".join(f"{one.generator.model} ({_place(one)})" for one in wave)
        how = "side by side" if len(wave) > 1 else "alone"
        turn = f"turn {number} of {len(planned)}, " if len(planned) > 1 else ""
        lines.append(f"synthesis: {turn}{how}: {names}")
    found = prices(config, gpu)
    unit = "GPU-hours" if gpu else "actor-hours"
    judge = judge_price(config)
    for price in [*found, *([judge] if judge else [])]:
        cost = "no rate known, not priced" if price.hours is None else f"{price.hours:,.1f} {unit} at most"
        lines.append(
            f"synthesis: {price.model}: {price.answers:,} answers, {price.output_tokens:,} output tokens at most, "
            f"{cost if price.endpoint is None else _money(price, price.endpoint)}"
        )
    here = [price for price in found if price.endpoint is None]
    if len(here) > 1:
        known = [price.hours for price in here if price.hours is not None]
        tokens = sum(price.output_tokens for price in here)
        lines.append(
            f"synthesis: together {tokens:,} output tokens, {sum(known):,.1f} {unit} at most"
            + ("" if len(known) == len(here) else f" for {len(known)} of {len(here)} generators")
        )
    rates = {price.rate for price in found if price.rate is not None}
    for rate in sorted(rates, key=lambda one: one.tokens_per_second):
        lines.append(f"synthesis: {rate.tokens_per_second:,.0f} output tokens/s: {rate.source}")
    return lines


def _money(price: Price, endpoint: EndpointConfig) -> str:
    """What an endpoint costs, as far as its prices are known."""
    money = price.money
    if money is None:
        return "no input_price and output_price, not priced"
    cap = "no budget" if endpoint.budget is None else f"budget {endpoint.budget:,.2f}"
    short = " (LESS THAN THAT)" if endpoint.budget is not None and endpoint.budget < money else ""
    return f"about {price.prompt_tokens:,} prompt tokens, {money:,.2f} in the currency of its prices at most, {cap}{short}"


def _place(one: Placed) -> str:
    return "endpoint" if one.generator.endpoint is not None else _actors(one.pool)


def _actors(pool: PoolConfig) -> str:
    count = (
        f"{pool.min_actors}"
        if pool.min_actors == pool.max_actors
        else f"{pool.min_actors}..{pool.max_actors}"
    )
    return f"{count} x {f'{pool.gpus:g} GPU' if pool.gpus else f'{pool.cpus:g} CPU'}"
