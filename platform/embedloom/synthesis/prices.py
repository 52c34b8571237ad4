"""What a synthesis section costs, before anything runs: answers, output tokens at most, and hours by known rates."""

import math
from dataclasses import dataclass

from embedloom.config.resources import PoolConfig
from embedloom.config.synthesis import Generator, SynthesisConfig
from embedloom.synthesis.families.registry import FAMILIES
from embedloom.synthesis.pools import waves
from embedloom.synthesis.prompts_used import sampling_of, task_families, writers
from embedloom.synthesis.quotas import shares


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
