import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import Generator
from embedloom.errors import ConfigError
from embedloom.synthesis.prices import waves

GPU = PoolConfig(min_actors=1, max_actors=8, cpus=2, gpus=1)
LAPTOP = PoolConfig(cpus=1, threads=2)


def plan(generators: list[Generator], profile: PoolConfig) -> list[dict[str, tuple[int, int]]]:
    return [
        {one.generator.model: (one.pool.min_actors, one.pool.max_actors) for one in wave}
        for wave in waves(generators, profile)
    ]


def test_on_a_laptop_with_one_actor_generators_take_turns():
    assert plan([Generator(model="a"), Generator(model="b")], LAPTOP) == [{"a": (1, 1)}, {"b": (1, 1)}]


def test_one_generator_gets_the_whole_pool():
    assert plan([Generator(model="a")], GPU) == [{"a": (1, 8)}]


def test_what_is_left_goes_to_the_generators_by_weight():
    found = plan([Generator(model="a", weight=3), Generator(model="b", weight=1)], GPU)
    assert found == [{"a": (1, 6), "b": (1, 2)}]


def test_a_model_over_several_gpus_counts_all_of_them_and_keeps_its_own_bounds():
    wide = PoolConfig(min_actors=1, max_actors=1, cpus=2, gpus=4, tensor_parallel=4)
    found = plan([Generator(model="wide", pool=wide), Generator(model="b")], GPU)
    assert found == [{"wide": (1, 1), "b": (1, 4)}], "4 of 8 GPUs are left"


def test_generators_that_do_not_fit_together_run_one_wave_after_another():
    half = PoolConfig(min_actors=4, max_actors=4, cpus=2, gpus=1)
    found = plan([Generator(model=name, pool=half) for name in "abc"], GPU)
    assert found == [{"a": (4, 4), "b": (4, 4)}, {"c": (4, 4)}]


def test_no_wave_takes_more_than_the_profile_gives():
    pools = [PoolConfig(min_actors=1 + n % 3, max_actors=9, cpus=1 + n % 2, gpus=1) for n in range(7)]
    generators = [Generator(model=str(n), pool=pool, weight=1 + n) for n, pool in enumerate(pools)]
    for wave in waves(generators, GPU):
        assert sum(one.pool.max_actors * one.pool.gpus for one in wave) <= 8
        assert sum(one.pool.max_actors * one.pool.cpus for one in wave) <= 16
        assert all(one.pool.min_actors <= one.pool.max_actors for one in wave)


def test_a_pool_beyond_the_profile_is_named():
    huge = PoolConfig(min_actors=2, max_actors=2, cpus=2, gpus=8, tensor_parallel=8)
    with pytest.raises(ConfigError) as caught:
        waves([Generator(model="a"), Generator(model="huge", pool=huge)], GPU)
    assert str(caught.value) == (
        "synthesis.generators.1.pool: 2 actors x 2 CPUs + 8 GPUs exceed what the profile lets synthesis take, "
        "8 actors x 2 CPUs + 1 GPUs"
    )
