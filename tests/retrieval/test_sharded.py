"""Search over several actors: the bits of one process, whatever the shares, kills or memory."""

import contextlib
import os
from pathlib import Path

import numpy as np
import psutil
import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError, StageError
from embedloom.retrieval import sharded
from embedloom.retrieval.embed import vector_table
from embedloom.retrieval.search import pair_scores, top_k
from embedloom.retrieval.sharded import Asked, VectorCatalogue, search_sharded

IDS = [f"d{number:03d}" for number in range(140)]
PAIRS = (np.array([0, 1, 1, 4]), np.array([7, 139, 0, -1]))


class Task:
    """Five queries a block; results go to files. ``kill`` names a file that says the actors were killed already."""

    def __init__(self, queries, folder: Path, kill: Path | None = None) -> None:
        self.queries, self.folder, self.kill = queries, folder, kill
        self.driver = os.getpid()

    def read(self, number):
        return Asked(self.queries[5 * number : 5 * number + 5], *PAIRS)

    def finish(self, number, found, scores):
        if self.kill is not None and not self.kill.exists():
            self.kill.touch()
            for process in psutil.Process(self.driver).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ray::_Share" in " ".join(process.cmdline()):
                        process.kill()
        np.savez(self.folder / f"{number}.npz", positions=found.positions, scores=found.scores, pairs=scores)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """140 vectors with ties in seven files whose order is not that of the ids, and 20 queries."""
    place = Place(str(tmp_path_factory.mktemp("vectors")))
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((140, 16)).astype(np.float32)
    vectors[60:80] = vectors[20:40]
    order = generator.permutation(140)
    for number, rows in enumerate(np.array_split(order, 7)):
        table = vector_table([IDS[row] for row in rows], vectors[rows], "c", "m", 1)
        place.write_table(f"v/part-{number:06d}.parquet", table)
    return (
        place,
        vectors,
        np.concatenate([vectors[:10], generator.standard_normal((10, 16)).astype(np.float32)]),
    )


def search(place, task, actors, memory_bytes=2**30, cpus=0.5, start_seconds=None):
    pool = PoolConfig(min_actors=actors, max_actors=actors, cpus=cpus, start_seconds=start_seconds)
    catalogue = VectorCatalogue.read(place, "v")
    return list(
        search_sharded(
            stage="test", catalogue=catalogue, items=4, task=task, k=12, pool=pool, memory_bytes=memory_bytes
        )
    )


def check(folder, vectors, queries):
    expected = top_k(queries, vectors, 12)
    for number in range(4):
        found = np.load(folder / f"{number}.npz")
        rows = slice(5 * number, 5 * number + 5)
        np.testing.assert_array_equal(found["positions"], expected.positions[rows])
        assert found["scores"].tobytes() == expected.scores[rows].tobytes()
        known = PAIRS[1] >= 0
        pairs = pair_scores(queries[rows][PAIRS[0][known]], vectors[PAIRS[1][known]])
        np.testing.assert_array_equal(found["pairs"][known], pairs)
        assert np.isnan(found["pairs"][~known]).all()


@pytest.mark.ray
@pytest.mark.parametrize("actors", [1, 2, 3, 7])
def test_shares_give_the_bits_of_one_process(ray_local, stored, tmp_path, actors):
    place, vectors, queries = stored
    assert search(place, Task(queries, tmp_path), actors, memory_bytes=0 if actors == 2 else 2**30) == [
        0,
        1,
        2,
        3,
    ]
    check(tmp_path, vectors, queries)


@pytest.mark.ray
def test_killed_actors_come_back(ray_local, stored, tmp_path):
    place, vectors, queries = stored
    killed = tmp_path / "killed"
    assert search(place, Task(queries, tmp_path, killed), 2) == [0, 1, 2, 3]
    assert killed.exists()
    check(tmp_path, vectors, queries)


@pytest.mark.ray
def test_a_bad_vector_ends_the_search_with_its_name(ray_local, stored, tmp_path):
    _, vectors, queries = stored
    place = Place(str(tmp_path))
    broken = vectors.copy()
    broken[33] = np.nan
    place.write_table("v/part-000000.parquet", vector_table(IDS, broken, "c", "m", 1))
    with pytest.raises(DataError, match="the vector of id 'd033' is not finite"):
        search(place, Task(queries, tmp_path), 2)


@pytest.mark.ray
def test_bfloat16_shares_score_only_who_is_near_in_all_of_them(ray_local, stored, tmp_path, monkeypatch):
    """The engine of GPUs in the actors; of 80 and 60 vectors the memory takes 60, so that both ways of scoring are taken."""
    place, vectors, queries = stored

    class Bf16Share(sharded._Share):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._store._engine = "bf16"

    monkeypatch.setattr(sharded, "_Share", Bf16Share)
    search(place, Task(queries, tmp_path), 2, memory_bytes=70 * 16 * 4)
    check(tmp_path, vectors, queries)


@pytest.mark.ray
def test_an_actor_without_a_place_ends_the_search(ray_local, stored, tmp_path, monkeypatch):
    import ray

    place, _, queries = stored
    monkeypatch.setattr(sharded, "_LOOK_SECONDS", 0.5)
    cpus = ray.cluster_resources()["CPU"] / 2 + 0.5  # one has a place, the second has not
    message = rf"test: only [01] of the 2 actors .* placed in 1 s \(start_seconds\); each needs {cpus:g} CPUs, 0 GPUs and 0 GiB; .*'CPU'.*free"
    with pytest.raises(StageError, match=message):
        search(place, Task(queries, tmp_path), 2, cpus=cpus, start_seconds=1)
