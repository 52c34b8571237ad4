"""The generation actor in its pool: requests in, answers out, several shards at once, engines that are lost."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pytest

from embedloom.compute.generation import (
    ANSWERS,
    GenerationRequest,
    GenerationWorker,
    generation_arguments,
    read_requests,
    read_results,
    request_table,
    shards_in_flight,
    side_by_side,
)
from embedloom.compute.shards import Handling, Starts, run_sharded
from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import EngineOptions
from embedloom.core.storage import Place
from embedloom.errors import StageError
from fakes_engines import CrashingEngine, FakeEngine, KilledParentEngine, LostEngine, ParentEngine, is_running

SCHEMA = {
    "type": "object",
    "properties": {"query": {"type": "string", "maxLength": 60}},
    "required": ["query"],
}
POOL = PoolConfig(cpus=1)


def request(number: int, text: str = "document") -> GenerationRequest:
    return GenerationRequest(
        f"id-{number}", ({"role": "user", "content": f"{text} {number}"},), number, 32, 0.7, 0.9, SCHEMA
    )


def test_requests_survive_the_table_beside_other_columns():
    requests = [request(1, "Grüße\n\t{x}"), request(2)]
    table = side_by_side(pa.table({"family": ["sts", "bitext"]}), request_table(requests))
    assert table.column_names[0] == "family"
    assert read_requests(table) == requests


def test_a_worker_answers_beside_the_requests(tmp_path: Path):
    worker = GenerationWorker(**generation_arguments(lambda: tmp_path, EngineOptions(), POOL, FakeEngine))
    requests = [request(1), request(2, "refuse"), request(3, "mumble")]
    (table,) = worker(side_by_side(pa.table({"n": [1, 2, 3]}), request_table(requests))).values()
    results = read_results(table)
    assert table.column("n").to_pylist() == [1, 2, 3]
    assert [one.id for one in results] == ["id-1", "id-2", "id-3"]
    assert [one.error for one in results] == [None, "prompt has 9 tokens, 8 fit", None]
    assert results == FakeEngine(
        model_folder=tmp_path, options=EngineOptions(), threads=1, gpu=False, tensor_parallel=1
    ).generate(requests)


@pytest.mark.parametrize(
    ("options", "pool", "expected"),
    [
        (EngineOptions(), POOL, 1),  # on CPU a rerun gives the same texts
        (EngineOptions(), PoolConfig(gpus=1), 4),
        (EngineOptions(shards_in_flight=3), POOL, 3),
    ],
)
def test_shards_in_flight(options: EngineOptions, pool: PoolConfig, expected: int):
    assert shards_in_flight(options, pool) == expected


class Runs:
    """21 requests in shards of four, through an engine."""

    def __init__(self, folder: Path, poison: int | None = None) -> None:
        self.place = Place(str(folder / "run"))
        self.model = folder / "model"
        self.model.mkdir()
        requests = [request(n, "poison" if n == poison else "document") for n in range(21)]
        self.place.write_table("requests/part-000000.parquet", request_table(requests))

    def __call__(self, engine: type[FakeEngine], in_flight: int = 1) -> list[str]:
        model = self.model
        run_sharded(
            stage="write",
            source=self.place,
            source_folder="requests",
            output=self.place,
            done_folder="texts",
            shard_rows=4,
            worker=GenerationWorker,
            worker_arguments=generation_arguments(lambda: model, EngineOptions(), POOL, engine),
            pool=POOL,
            handling=Handling(
                finish=lambda tables: {"texts": tables[ANSWERS].select(["request_id", "answer"])},
                in_flight=in_flight,
                starts=Starts(self.place.child("starts"), "run-1", limit=3),
            ),
        )
        return self.place.read_tables("texts").column("request_id").to_pylist()


@pytest.mark.ray
def test_several_shards_at_once_and_a_crash_lose_and_repeat_nothing(ray_local: None, tmp_path: Path):
    runs = Runs(tmp_path)
    assert runs(CrashingEngine, in_flight=3) == [f"id-{n}" for n in range(21)]
    assert (runs.model / "crashed").exists()


@pytest.mark.ray
def test_a_shard_that_always_kills_its_engine_ends_the_run_by_name(ray_local: None, tmp_path: Path):
    runs = Runs(tmp_path, poison=6)
    with pytest.raises(StageError, match=r"^write: item 1 was begun 3 times and took its process with it"):
        runs(LostEngine)
    assert "texts/part-000001.parquet" not in runs.place.names("texts")


@pytest.mark.ray
@pytest.mark.parametrize("engine", [ParentEngine, KilledParentEngine])
def test_an_engines_own_processes_are_gone_before_its_actor_is_started_again(
    ray_local: None, tmp_path: Path, engine: type[FakeEngine]
):
    runs = Runs(tmp_path)
    assert runs(engine) == [f"id-{n}" for n in range(21)]
    starts = [json.loads(path.read_text()) for path in sorted((runs.model / "starts").iterdir())]
    assert len(starts) >= 2, "the engine was lost, so it started twice"
    assert starts[0] == starts[1] == [], "a child of the lost engine was still there"
    children = [int(path.name) for path in (runs.model / "children").iterdir()]
    deadline = time.monotonic() + 60
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, children)), "the pool ended and left a child behind"
