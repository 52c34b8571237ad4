"""Sinks against the real thing, without Ray: each id once, whatever is written twice; what does not fit is named."""

import datetime
import importlib.util
import socket
import subprocess
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.block import BlockAccessor

import embedloom
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.raydata.parquet import id_digest, those_in, written_ids
from embedloom.raydata.qdrant import point_id
from embedloom.raydata.sinks import VectorSink, float_rows
from embedloom.retrieval.index import load_index
from embedloom.retrieval.stored import vector_columns

IDS = ["d1", "d'2", "डी3", "d4"]


def vectors(seed, rows=4, size=8):
    found = np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def rows(seed=0, ids=IDS, **columns):
    made = vectors(seed, len(ids))
    vector = vector_columns(made, "float32")["vector"]
    return pa.table({"id": ids, "title": [f"Titel {one}" for one in ids], **columns, "vector": vector})


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"{package} is not installed; pip install 'embedloom[…]' as docs/how-to/ray-data.md says"
            )


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """A PostgreSQL with pgvector, started here: the one in pgserver's wheel, or Debian's with its package for pgvector."""
    needs("psycopg", "pgvector")
    if importlib.util.find_spec("pgserver") is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(
                "XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run"))
            )  # platformdirs warns without one
            import pgserver
        server = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()
        return
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    control = [*Path("/usr/share/postgresql").glob("*/extension/vector.control")]
    if not found or not control:
        pytest.skip("no PostgreSQL with pgvector: pip install pgserver, or Debian's postgresql-NN-pgvector")
    yield from _debians(found[-1].parent, tmp_path_factory.mktemp("postgres"))


def _debians(programs, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    subprocess.run([programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust"], check=True)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    control = [programs / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-o", options, "-l", folder / "log", "start"], check=True)
    yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True)


@pytest.fixture(params=["parquet", "lance", "lancedb", "qdrant", "pgvector"])
def sink(request, tmp_path):
    """Each sink on something empty."""
    kind = request.param
    if kind == "parquet":
        return embedloom.ParquetSink(str(tmp_path / "parts"))
    if kind == "lance":
        needs("lance")
        return embedloom.LanceSink(str(tmp_path / "docs.lance"))
    if kind == "lancedb":
        needs("lancedb")
        return embedloom.LanceDBSink(str(tmp_path / "db"), "docs")
    if kind == "qdrant":
        needs("qdrant_client")
        return embedloom.QdrantSink(str(tmp_path / "qdrant"), "docs", distance="dot")
    uri = request.getfixturevalue("postgres")
    return embedloom.PgvectorSink(
        uri, f"docs_{abs(hash(request.node.name)) % 10**8}_{tmp_path.name[-6:].lower()}"
    )


def stored(sink):
    """What a sink's own client reads back: {id: (title, vector)}."""
    store = sink.store
    if isinstance(sink, embedloom.ParquetSink):
        table = pa.concat_tables(pq.read_table(store.place.local / name) for name in store.names())
    elif isinstance(sink, embedloom.LanceSink):
        import lance

        table = lance.dataset(store.uri).to_table()
    elif isinstance(sink, embedloom.LanceDBSink):
        import lancedb

        table = lancedb.connect(store.uri).open_table(store.table).to_arrow()
    elif isinstance(sink, embedloom.QdrantSink):
        with store._client() as client:
            points, rest = client.scroll(store.collection, limit=1000, with_vectors=True)
        assert rest is None
        assert len({point.payload["id"] for point in points}) == len(points)
        return {point.payload["id"]: (point.payload["title"], np.float32(point.vector)) for point in points}
    else:
        import psycopg

        with psycopg.connect(store.conninfo) as connection:
            found = connection.execute(f"SELECT id, title, vector::text FROM {store.table}").fetchall()
        return {
            one: (title, np.array(vector.strip("[]").split(","), np.float32)) for one, title, vector in found
        }
    assert len(set(table["id"].to_pylist())) == table.num_rows
    return {row["id"]: (row["title"], np.float32(row["vector"])) for row in table.to_pylist()}


def write(sink, table):
    sink.on_write_start(table.schema)
    return sink.write([table], None)


def assert_holds(sink, *tables):
    wanted = {row["id"]: row for table in tables for row in table.to_pylist()}
    found = stored(sink)
    assert found.keys() == wanted.keys()
    for one, (title, vector) in found.items():
        assert title == wanted[one]["title"]
        np.testing.assert_array_equal(vector, np.float32(wanted[one]["vector"]))


def test_what_is_written_twice_is_there_once_and_only_what_is_missing_is_left(sink):
    first, second = rows(0), rows(1, ["d5", "d6"])
    assert sink.store.present([*IDS, "d5"], "id") == set()
    assert write(sink, first) == 4
    assert sink.store.present([*IDS, "d5"], "id") == set(IDS)
    write(sink, first)  # as a task does that is run again
    write(sink, second)
    assert_holds(sink, first, second)
    assert sink.store.present([], "id") == set()


def test_a_row_that_changed_is_replaced(sink):
    if isinstance(sink, embedloom.ParquetSink):
        pytest.skip("Parquet cannot replace a row; that an id in two files is refused has a test of its own")
    write(sink, rows(0))
    changed = rows(2, ["d4", "d9"])
    write(sink, changed)
    assert_holds(sink, rows(0), changed)


def test_vectors_of_another_size_are_refused_before_anything_is_written(sink):
    write(sink, rows(0))
    other = pa.table(
        {"id": ["x"], "title": ["x"], "vector": vector_columns(vectors(0, 1, 16), "float32")["vector"]}
    )
    with pytest.raises(DataError, match="holds vectors of 8 dimensions, those to be written have 16"):
        sink.on_write_start(other.schema)
    assert_holds(sink, rows(0))


def test_a_column_that_a_table_lacks_is_named(sink):
    if isinstance(sink, embedloom.QdrantSink | embedloom.ParquetSink):
        pytest.skip("payloads and files have no common columns")
    write(sink, rows(0))
    with pytest.raises(ConfigError, match="has no column 'page'; columns there: id, title, vector"):
        sink.on_write_start(rows(0, page=[1, 2, 3, 4]).schema)


def test_other_columns_go_along(sink):
    when = datetime.datetime(2026, 12, 1, 5, 30, tzinfo=datetime.UTC)
    more = {
        "page": pa.array([1, None, 3, 4], pa.int32()),
        "share": [0.5, 0.25, None, 1.0],
        "seen": pa.array([when, None, when, when], pa.timestamp("us", "UTC")),
        "tags": [["a", "ß"], [], None, ["c"]],
        "good": [True, False, None, True],
    }
    write(sink, rows(0, **more))
    assert_holds(sink, rows(0))
    if isinstance(sink, embedloom.PgvectorSink):
        import psycopg

        with psycopg.connect(sink.store.conninfo) as connection:
            question = f"SELECT page, share, seen, tags, good FROM {sink.store.table} WHERE id = 'd1'"
            assert connection.execute(question).fetchone() == (1, 0.5, when, ["a", "ß"], True)
    if isinstance(sink, embedloom.QdrantSink):
        with sink.store._client() as client:
            [point] = client.retrieve("docs", [point_id("d1")])
        assert point.payload == {
            "id": "d1", "title": "Titel d1", "page": 1, "share": 0.5, "seen": "2026-12-01 05:30:00.000000Z",
            "tags": ["a", "ß"], "good": True,
        }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_whole_number_ids_and_stored_types(sink, dtype):
    made = vector_columns(vectors(3), dtype)
    table = pa.table({"id": [3, 1, 2, 0], "title": list("abcd"), **made})
    write(sink, table)
    write(sink, table)
    found = stored(sink)
    assert found.keys() == {0, 1, 2, 3}
    wanted = float_rows(table, "id", "vector").column("vector").to_pylist()
    for one, vector in zip([3, 1, 2, 0], wanted, strict=True):
        np.testing.assert_allclose(found[one][1], vector, atol=1e-6)
    assert "scale" not in (
        table.column_names if dtype == "float16" else float_rows(table, "id", "vector").column_names
    )
    assert sink.store.present([1, 7], "id") == {1}


class Kept:
    """A store that keeps what it is given."""

    rows = 3

    def __init__(self):
        self.tables = []

    def prepare(self, schema, id_column, vector_column):
        self.schema = schema

    def upsert(self, table, id_column, vector_column):
        self.tables.append(table)


def test_rows_go_in_batches_of_the_stores_size():
    sink = VectorSink(Kept())
    assert write(sink, rows(0, [f"d{n}" for n in range(7)])) == 7
    assert [table.num_rows for table in sink.store.tables] == [3, 3, 1]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (rows().drop_columns(["id"]), r"id_column: no column 'id'; columns found: \['title', 'vector'\]"),
        (rows().drop_columns(["vector"]), "vector_column: no column 'vector'"),
        (rows(ids=["a", None, "b"]), "holds 1 nulls; every row needs an id"),
        (rows(ids=["a", "b", "a"]), "id 'a' stands 2 times in one batch"),
        (pa.table({"id": [1.5], "vector": [[1.0]]}), "column 'id' is double; allowed: text or whole numbers"),
        (pa.table({"id": ["a", "b"], "vector": [[1.0], None]}), "column 'vector' holds 1 nulls"),
        (
            pa.table({"id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}),
            "the vector of id 'b' has 2 dimensions",
        ),
        (pa.table({"id": ["a"], "vector": ["text"]}), "column 'vector' is string"),
    ],
)
def test_rows_that_cannot_be_written_are_named(table, said):
    with pytest.raises(DataError, match=said):
        VectorSink(Kept()).write([table], None)


def test_qdrants_ids_are_numbers_or_uuids_of_names():
    assert point_id(7) == 7
    assert point_id("d1") == point_id("d1") != point_id("d2")
    assert point_id("http://a/") == str(uuid.uuid5(uuid.NAMESPACE_URL, "http://a/"))
    with pytest.raises(DataError, match="-1; allowed by Qdrant"):
        point_id(-1)
    needs("qdrant_client")
    with pytest.raises(ConfigError, match=r"column 'raw' is binary; allowed in a payload"):
        embedloom.QdrantSink("http://127.0.0.1:1", "docs").on_write_start(rows(0, raw=[b"a"] * 4).schema)


def test_missing_clients_are_named_with_their_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    from embedloom.errors import MissingDependency

    for make, extra in (
        (lambda: embedloom.QdrantSink("http://q", "c"), "qdrant"),
        (lambda: embedloom.PgvectorSink("host=db", "t"), "pgvector"),
        (lambda: embedloom.LanceSink("x"), "lance"),
        (lambda: embedloom.LanceDBSink("x", "t"), "lancedb"),
    ):
        with pytest.raises(MissingDependency, match=rf"pip install 'embedloom\[{extra}\]'"):
            make()


def test_parquet_knows_its_ids_and_refuses_one_in_two_files(tmp_path):
    sink = embedloom.ParquetSink(str(tmp_path))
    write(sink, rows(0))
    write(sink, rows(1, [1, 2]))
    digests = written_ids(sink.store, "id")
    assert those_in([*IDS, 1, "1", "d5"], digests) == {*IDS, 1}
    assert len(id_digest("a")) == 16
    write(sink, rows(2, ["d4", "d8"]))
    with pytest.raises(
        DataError, match=r"id 'd4' stands in part-\w+\.parquet and part-\w+\.parquet \(1 such ids\)"
    ):
        written_ids(sink.store, "id")


def test_a_faiss_index_is_built_over_all_files(tmp_path):
    needs("faiss")
    from embedloom.retrieval.index import build_index

    sink = embedloom.FaissSink(str(tmp_path), contract_hash="c1", id_column="name", vector_column="v")
    table = rows(0).rename_columns(["name", "title", "v"])
    write(sink, table)
    write(sink, rows(1, ["d7"]).rename_columns(["name", "title", "v"]))
    build_index(sink._config, sink.store.place, "c1")
    index = load_index(Place(str(tmp_path)), "c1")
    ids, scores = index.search(vectors(0), 1)
    assert [one for [one] in ids] == IDS
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    with pytest.raises(ConfigError, match="FaissSink: "):
        embedloom.FaissSink(str(tmp_path), "lsh")


def test_nothing_half_written_stays(tmp_path):
    (tmp_path / "_tmp-1-part-x.parquet").write_bytes(b"half")
    sink = embedloom.ParquetSink(str(tmp_path))
    write(sink, rows(0))
    assert [path.name[:5] for path in tmp_path.iterdir()] == ["part-"]


def test_vectors_of_numpy_batches_are_written_like_lists():
    made = vectors(4)
    block = BlockAccessor.batch_to_block({"id": np.array(IDS, dtype=object), "vector": made})
    assert not pa.types.is_fixed_size_list(block.schema.field("vector").type)  # Ray's own type of tensors
    sink = VectorSink(Kept())
    sink.on_write_start(block.schema)
    assert sink.store.schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert sink.write([block.slice(1)], None) == 3
    [table] = sink.store.tables
    np.testing.assert_array_equal(np.float32(table.column("vector").to_pylist()), made[1:])
