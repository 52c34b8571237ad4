import pickle
from pathlib import Path

import cloudpickle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.compute.shards import (
    PoolActor,
    Shard,
    _reading,
    _writing,
    parquet_rows,
    plan_shards,
    read_shard,
    row_of,
    run_sharded,
)
from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError, MissingDependency, StageError
from fakes_engines import DoublingWorker


def rows_of(shards: list[Shard]) -> list[tuple[str, int]]:
    return [
        (piece.file, row)
        for shard in shards
        for piece in shard.pieces
        for row in range(piece.start, piece.stop)
    ]


@given(sizes=st.lists(st.integers(0, 40), max_size=8), shard_rows=st.integers(1, 25), first=st.integers(0, 9))
def test_every_row_falls_into_exactly_one_shard_in_order(sizes: list[int], shard_rows: int, first: int):
    files = [(f"f{i}", size) for i, size in enumerate(sizes)]
    shards = plan_shards(files, shard_rows, first)
    assert rows_of(shards) == [(name, row) for name, size in files for row in range(size)]
    assert all(shard.rows == shard_rows for shard in shards[:-1])
    assert all(0 < shard.rows <= shard_rows for shard in shards[-1:])
    assert [shard.index for shard in shards] == list(range(first, first + len(shards)))


def test_shards_by_hand():
    shards = plan_shards([("a", 3), ("b", 0), ("c", 4)], 5)
    assert [[(p.file, p.start, p.stop) for p in shard.pieces] for shard in shards] == [
        [("a", 0, 3), ("c", 0, 2)],
        [("c", 2, 4)],
    ]
    assert [shard.part for shard in shards] == ["part-000000.parquet", "part-000001.parquet"]


@pytest.fixture
def source(tmp_path: Path) -> Place:
    """Rows 0 to 22 in three files."""
    place = Place(str(tmp_path / "source"))
    for number, (start, stop) in enumerate([(0, 9), (9, 10), (10, 23)]):
        place.write_table(f"rows/part-{number:06d}.parquet", pa.table({"n": list(range(start, stop))}))
    return place


def test_a_shard_reads_its_rows_across_files(source: Place):
    shards = plan_shards(parquet_rows(source, "rows"), 8)
    assert [read_shard(source, shard).column("n").to_pylist() for shard in shards] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 23)),
    ]


def test_a_folder_without_parquet_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nothing: no Parquet file"):
        parquet_rows(Place(str(tmp_path)), "nothing")


class Runs:
    """run_sharded over the source, with a count of the worker's calls."""

    def __init__(self, source: Place, folder: Path) -> None:
        self.source = source
        self.output = Place(str(folder / "output"))
        self.notes = folder / "notes"
        self.notes.mkdir()

    def __call__(self, trouble: str = "", actors: int = 1, first_part: int = 0) -> list[str]:
        return run_sharded(
            stage="double",
            source=self.source,
            source_folder="rows",
            output=self.output,
            done_folder="done",
            shard_rows=4,
            worker=DoublingWorker,
            worker_arguments={"notes": str(self.notes), "trouble": trouble},
            pool=PoolConfig(min_actors=actors, max_actors=actors, cpus=1),
            first_part=first_part,
        )

    @property
    def calls(self) -> int:
        return len(list(self.notes.glob("call-*")))

    def files(self) -> dict[str, bytes]:
        names = self.output.names("done") + self.output.names("odd")
        return {name: self.output.read_bytes(name) for name in names}


@pytest.fixture
def runs(source: Place, tmp_path: Path, ray_local: None) -> Runs:
    return Runs(source, tmp_path)


@pytest.mark.ray
def test_parts_hold_the_rows_and_a_rerun_computes_only_missing_ones(runs: Runs):
    parts = runs(actors=2, first_part=3)
    assert parts == [f"done/part-{n:06d}.parquet" for n in range(3, 9)]
    assert runs.output.read_tables("done").column("n").to_pylist() == [2 * n for n in range(23)]
    assert runs.output.read_tables("odd").column("n").to_pylist() == list(range(1, 23, 2))
    assert runs.output.read_tables("copy").equals(runs.output.read_tables("done"))
    assert runs.calls == 6
    before = runs.files()

    assert runs(first_part=3) == parts
    assert runs.calls == 6, "a finished run must not start an actor"

    for name in (parts[1], parts[4], "odd/part-000005.parquet"):
        (Path(runs.output.uri) / name).unlink()
    assert runs(first_part=3) == parts
    assert runs.calls == 8
    # Only the done folder decides: the other folders' files are written before it, so a crash cannot lose them.
    assert runs.files() == {
        name: content for name, content in before.items() if name != "odd/part-000005.parquet"
    }


@pytest.mark.ray
def test_a_crashing_actor_loses_and_repeats_nothing(runs: Runs):
    parts = runs("crash")
    assert (runs.notes / "crashed").exists()
    assert runs.output.names("done") == parts
    assert runs.output.read_tables("done").column("n").to_pylist() == [2 * n for n in range(23)]
    assert runs.output.read_tables("odd").column("n").to_pylist() == list(range(1, 23, 2))


@pytest.mark.ray
def test_bad_input_in_a_worker_surfaces_as_itself(runs: Runs):
    with pytest.raises(DataError, match=r"^row 7: column 'n' is 7, allowed: anything else$"):
        runs("user")


@pytest.mark.ray
def test_an_error_in_a_workers_constructor_surfaces_as_itself(runs: Runs):
    with pytest.raises(MissingDependency, match=r"^doubling needs the package 'warp-drive'") as caught:
        runs("start")
    assert caught.value.extra == "cpu"


@pytest.mark.ray
def test_an_unreadable_source_file_surfaces_as_itself(runs: Runs, source: Place):
    size = (Path(source.uri) / "rows/part-000002.parquet").stat().st_size
    content = source.read_bytes("rows/part-000002.parquet")
    (Path(source.uri) / "rows/part-000002.parquet").write_bytes(b"PAR1" + bytes(size - 400) + content[-396:])
    with pytest.raises(DataError, match=r"rows/part-000002.parquet: not readable as Parquet"):
        runs()


@pytest.mark.ray
def test_any_other_failure_names_the_stage_and_the_cause(runs: Runs):
    with pytest.raises(
        StageError, match=r"^double: a worker failed: RuntimeError: the accelerator is on fire$"
    ):
        runs("other")


def test_a_worker_must_name_the_done_folder_last(source: Place, tmp_path: Path):
    actor = PoolActor(DoublingWorker, {"notes": str(tmp_path), "trouble": "order"}, "done", threads=1)
    row = row_of({"position": 0, "item": b""}, {"": source.read_table("rows/part-000000.parquet")})
    (failure,) = actor({column: [value] for column, value in row.items()})["failure"]
    assert str(pickle.loads(failure)) == "the worker returned folders ['done', 'odd'], expected 'done' last"


def test_an_item_that_ray_computes_again_is_passed_by_when_its_tables_are_stored():
    """A lost machine's finished items come again; asking an engine twice would cost, writing twice would not be once."""

    def refuse(*_: object) -> object:
        raise AssertionError("a stored item was worked on")

    row = _reading(refuse, None, lambda item: item == 3)({"position": 0, "item": pickle.dumps(3)})
    batch = PoolActor(lambda: refuse, {}, "out", 1)({column: [value] for column, value in row.items()})
    passed = {column: values[0] for column, values in batch.items()}
    assert _writing(refuse, refuse, "out", lambda _: False, str)(passed) == {
        "position": 0,
        "name": "3",
        "failure": b"",
    }
    late = row_of({"position": 0, "item": pickle.dumps(3)}, {"out": pa.table({"n": [1]})})
    assert _writing(refuse, None, "out", lambda _: True, str)(late) == {
        "position": 0,
        "name": "3",
        "failure": b"",
    }


def carried(source: Place, output: Place, shards: int) -> int:
    """Bytes of what the functions of a stage's tasks carry, where there are so many shards."""
    sizes: list[int] = []

    def stream(
        *, items: list[Shard], read: object, write: object, written: object, name: object, **_: object
    ) -> list[int]:
        assert len(items) == shards
        sizes.append(sum(len(cloudpickle.dumps(one)) for one in (read, write, written, name)))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedloom.compute.shards.stream", stream)
        run_sharded(
            stage="test", source=source, source_folder="rows", output=output, done_folder="done", shard_rows=-(-1000 // shards),
            worker=None, worker_arguments={}, pool=PoolConfig(),
        )  # fmt: skip
    return sizes[0]


def test_what_tasks_carry_does_not_grow_with_the_shards(tmp_path: Path):
    source = Place(str(tmp_path / "source"))
    source.write_table("rows/part-000000.parquet", pa.table({"n": list(range(1000))}))
    assert carried(source, Place(str(tmp_path / "out")), 2) == carried(
        source, Place(str(tmp_path / "out")), 1000
    )


def test_a_shard_reads_the_row_groups_that_it_lies_in(tmp_path: Path):
    place = Place(str(tmp_path))
    place.write_table("in.parquet", pa.table({"n": list(range(5000)), "text": ["x" * 50] * 5000}))
    assert place.parquet_groups("in.parquet") == [1024, 1024, 1024, 1024, 904]
    asked: list[list[int]] = []
    real = pq.ParquetFile.read_row_groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pq.ParquetFile,
            "read_row_groups",
            lambda self, groups, **more: (asked.append(groups), real(self, groups, **more))[1],
        )
        for shard in plan_shards([("in.parquet", 5000)], 512):
            rows = read_shard(place, shard).column("n").to_pylist()
            assert rows == list(range(512 * shard.index, min(5000, 512 * (shard.index + 1))))
    assert asked == [[n // 2] for n in range(10)]
