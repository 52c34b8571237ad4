"""How long actors may take to start: by stage, by profile and by the size of what they load; weights come before the actors."""

import time
from pathlib import Path

import pyarrow as pa
import pytest

from embedloom.compute.shards import Handling, fetch_weights, stream
from embedloom.config.base import validate
from embedloom.config.cluster import PoolConfig, Profile, load_cluster
from embedloom.config.shipped import SHIPPED_CLUSTER
from embedloom.errors import DataError, StageError

HEAD = {"instance": "m6i.large", "cpus": 4, "memory_gib": 8, "min_nodes": 1, "max_nodes": 1}
MORE = {"instance": "m6i.xlarge", "cpus": 8, "memory_gib": 16, "min_nodes": 1, "max_nodes": 2}


def profile(**content: object) -> Profile:
    return validate(Profile, {"backend": "existing", "address": "auto", **content}, "p")


def test_nodes_that_must_be_bought_have_an_hour_and_those_that_are_up_ten_minutes():
    bought = profile(pools={"head": HEAD, "more": {**MORE, "min_nodes": 0}})
    assert bought.stages.synthesis.start_budget == bought.serve.start_budget == bought.start_budget == 3600
    up = profile(pools={"head": HEAD, "more": MORE})
    assert up.stages.synthesis.start_budget == up.serve.start_budget == up.start_budget == 600


def test_a_stage_states_its_own_budget_and_the_profile_that_of_the_others():
    stated = profile(
        pools={"head": HEAD, "more": {**MORE, "min_nodes": 0}},
        start_seconds=900,
        stages={"mining": {"start_seconds": 60}},
        serve={"start_seconds": 120},
    )
    stages = stated.stages
    assert (stages.mining.start_budget, stages.embedding.start_budget) == (60, 900)
    assert stated.serve.start_budget == 120


def test_the_shipped_cluster_buys_its_gpus_and_waits_for_them():
    shipped = load_cluster(SHIPPED_CLUSTER)
    assert shipped.profile("a100x64").stages.embedding.start_budget == 3600
    assert shipped.profile("local").stages.embedding.start_budget == 600


class SlowWorker:
    """Takes its time to load, and needs what was fetched before."""

    def __init__(self, seconds: float, fetched: str) -> None:
        if not Path(fetched).exists():
            raise DataError("the actor started before its weights were there")
        time.sleep(seconds)

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        return {"done": rows}


class Fetch:
    """Gives a model's folder, and leaves a note of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> Path:
        model = self.folder / "model"
        model.mkdir(exist_ok=True)
        (model / "weights").write_bytes(b"x" * 1000)
        return model


def run(folder: Path, pool: PoolConfig, seconds: float) -> list[int]:
    return list(
        stream(
            stage="slow",
            items=range(2),
            read=lambda item: pa.table({"n": [item]}),
            write=lambda item, name, table: None,
            written=lambda item: False,
            worker=SlowWorker,
            worker_arguments={"seconds": seconds, "fetched": str(folder / "model")},
            done_folder="done",
            pool=pool,
            handling=Handling(weights=(Fetch(folder),)),
        )
    )


@pytest.mark.ray
def test_a_constructor_that_takes_longer_than_the_budget_ends_the_stage_by_name(
    ray_local: None, tmp_path: Path
):
    # The weights' task has its place at once; the actor sleeps far beyond its second.
    with pytest.raises(
        StageError, match=r"^slow: its actors were not placed and loaded within 1 s; .*start_seconds"
    ):
        run(tmp_path, PoolConfig(start_seconds=1), 600)


@pytest.mark.ray
def test_a_slow_constructor_within_the_budget_finds_its_weights(ray_local: None, tmp_path: Path):
    assert sorted(run(tmp_path, PoolConfig(start_seconds=500), 5)) == [0, 1]


@pytest.mark.ray
def test_fetching_tells_the_bytes_and_a_pool_without_a_place_says_so(ray_local: None, tmp_path: Path):
    assert fetch_weights("fetch", (Fetch(tmp_path),), PoolConfig()) == 1000
    with pytest.raises(
        StageError, match=r"fetch: no task could be placed in 1 s \(start_seconds\); .*1 GPUs"
    ):
        fetch_weights("fetch", (Fetch(tmp_path),), PoolConfig(gpus=1, start_seconds=1))
