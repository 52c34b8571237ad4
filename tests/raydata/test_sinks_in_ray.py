"""Sinks as ``write_datasink`` uses them: a job that ends in the middle goes on with what is missing, and each id is there once."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import embedloom
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.retrieval.index import load_index
from embedloom.retrieval.stored import vector_columns

pytestmark = pytest.mark.ray
BLOCK, BLOCKS = 16, 5
VECTORS = np.random.default_rng(0).normal(size=(BLOCK * BLOCKS, 8)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)


def documents():
    tables = [pa.table({"id": range(n * BLOCK, (n + 1) * BLOCK)}) for n in range(BLOCKS)]
    return ray.data.from_arrow(tables)


class Vectors:
    """In place of a model: the vectors by id, and a note of every row that was embedded; may break off."""

    def __init__(self, notes, breaks_at=None):
        self.notes, self.breaks_at = notes, breaks_at

    def __call__(self, table):
        ids = table.column("id").to_pylist()
        if self.breaks_at in ids:
            raise RuntimeError("the job ends here")
        with Path(self.notes).open("a") as file:
            file.writelines(f"{one}\n" for one in ids)
        return table.append_column("vector", vector_columns(VECTORS[ids], "float32")["vector"])


def embedded(dataset, notes, breaks_at=None):
    return dataset.map_batches(
        Vectors,
        fn_constructor_args=(str(notes), breaks_at),
        batch_format="pyarrow",
        concurrency=1,
        batch_size=BLOCK,
    )


def test_a_job_that_broke_off_embeds_and_writes_only_what_is_missing(ray_local, tmp_path):
    sink = embedloom.FaissSink(str(tmp_path / "out"), contract_hash="c", rows_per_file=BLOCK)
    with pytest.raises(Exception, match="the job ends here"):
        embedded(documents(), tmp_path / "first", breaks_at=BLOCK * (BLOCKS - 1)).write_datasink(sink)
    there = {
        one
        for name in sink.store.names()
        for one in pq.read_table(sink.store.place.local / name)["id"].to_pylist()
    }
    assert len(there) < BLOCK * BLOCKS
    embedded(sink.missing(documents()), tmp_path / "second").write_datasink(sink)
    again = [int(line) for line in (tmp_path / "second").read_text().split()]
    assert sorted(again) == sorted(set(range(BLOCK * BLOCKS)) - there)
    index = load_index(Place(str(tmp_path / "out")), "c")
    assert index.search(VECTORS, 1)[0] == [[one] for one in range(BLOCK * BLOCKS)]
    assert sink.missing(documents()).count() == 0
    with pytest.raises(DataError, match=r"stands in .* and .*; write sink.missing"):
        sink.store.upsert(
            pq.read_table(sink.store.place.local / sink.store.names()[0]).slice(0, 3), "id", "vector"
        )
        sink.on_write_complete(None)
