"""Vectors on disk: ids, contracts and dimensions are checked; file cuts and memory change nothing."""

import numpy as np
import pyarrow as pa
import pytest

from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.retrieval import sharded as vectors_module
from embedloom.retrieval.embed import vector_table
from embedloom.retrieval.search import top_k
from embedloom.retrieval.sharded import VectorCatalogue, VectorStore, choose, rank
from embedloom.retrieval.vector_files import check_same_contract, read_vector_file

IDS = [f"d{number:03d}" for number in range(90)]


@pytest.fixture(scope="module")
def vectors():
    values = np.random.default_rng(0).standard_normal((90, 12)).astype(np.float32)
    values[50:60] = values[20:30]  # ties
    return values


def write(place, ids, vectors, parts, contract="c1", dtype="float32", folder="v"):
    for number, rows in enumerate(np.array_split(np.arange(len(ids)), parts)):
        table = vector_table([ids[row] for row in rows], vectors[rows], contract, "m", 1, dtype)
        place.write_table(f"{folder}/part-{number:06d}.parquet", table)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_search_does_not_depend_on_files_order_or_memory(tmp_path, vectors, parts, memory_bytes, monkeypatch):
    place = Place(str(tmp_path))
    order = np.random.default_rng(parts).permutation(90)
    write(place, [IDS[row] for row in order], vectors[order], parts)
    monkeypatch.setattr(vectors_module, "BLOCK_ROWS", 20)
    catalogue = VectorCatalogue.read(place, "v")
    store = VectorStore(catalogue, memory_bytes)
    assert len(catalogue.blocks(20)) == {1: 1, 2: 2, 3: 3, 7: 4}[parts]
    found = store.search(vectors[:10], 15)
    expected = top_k(vectors[:10], vectors, 15)  # IDS are in order, so the row is the rank
    np.testing.assert_array_equal(found.positions, expected.positions)
    assert found.scores.tobytes() == expected.scores.tobytes()
    assert catalogue.ids.take(pa.array(found.positions[0])).to_pylist() == [
        IDS[row] for row in expected.positions[0]
    ]


def test_find_and_score_pairs(tmp_path, vectors):
    place = Place(str(tmp_path))
    write(place, IDS[::-1], vectors[::-1], 4)
    catalogue = VectorCatalogue.read(place, "v")
    positions = catalogue.find(["d089", "nobody", "d000", "d007", "d089"])
    assert positions.tolist() == [89, -1, 0, 7, 89]
    rows = np.array([0, 0, 1, 1, 1])
    found, scores = VectorStore(catalogue).nominate(vectors[:2], 0, rows, positions)
    assert found.rows.shape == (2, 0) and np.isnan(scores[1])
    expected = (vectors[rows].astype(np.float64) * vectors[positions].astype(np.float64)).sum(axis=1)
    np.testing.assert_array_equal(scores[[0, 2, 3, 4]], expected[[0, 2, 3, 4]].astype(np.float32))
    assert len(catalogue) == 90


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_given_documents_are_scored_over_shares_where_none_are_searched_for(
    tmp_path, vectors, shares, monkeypatch
):
    place = Place(str(tmp_path))
    write(place, IDS, vectors, 3)
    monkeypatch.setattr(vectors_module, "BLOCK_ROWS", 30)
    catalogue = VectorCatalogue.read(place, "v")
    stores = [VectorStore(catalogue, 2**30, (number, shares)) for number in range(shares)]
    rows, positions = np.array([0, 0, 1]), np.array([5, 40, 80])  # one in each file
    near, scores = choose([store.nominate(vectors[:2], 0, rows, positions) for store in stores], 0)
    found = rank(near, [store.score(vectors[:2], *near.unscored()) for store in stores], 0)
    assert found.positions.shape == found.scores.shape == (2, 0)
    expected = (vectors[rows].astype(np.float64) * vectors[positions].astype(np.float64)).sum(axis=1)
    np.testing.assert_array_equal(scores, expected.astype(np.float32))


def test_half_precision_files_are_searched_as_stored(tmp_path, vectors):
    place = Place(str(tmp_path))
    write(place, IDS, vectors, 2, dtype="float16")
    half = vectors.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(
        VectorStore(VectorCatalogue.read(place, "v")).search(vectors[:3], 5).scores,
        top_k(vectors[:3], half, 5).scores,
    )


def test_other_contract_between_files_is_named(tmp_path, vectors):
    place = Place(str(tmp_path))
    write(place, IDS, vectors, 1, contract="aaaa")
    place.write_table("v/part-000001.parquet", vector_table(["x"], vectors[:1], "bbbb", "m", 1))
    with pytest.raises(DataError, match=r"'bbbb'.*'aaaa'"):
        VectorCatalogue.read(place, "v")


def test_other_contract_between_queries_and_documents_names_both():
    check_same_contract(("q", "1"), ("d", "1"))
    with pytest.raises(DataError, match=r"q has contract_hash '1', d has '2'"):
        check_same_contract(("q", "1"), ("d", "2"))


def test_mixed_dimensions_are_named(tmp_path, vectors):
    place = Place(str(tmp_path))
    write(place, IDS, vectors, 1)
    place.write_table("v/part-000001.parquet", vector_table(["x"], vectors[:1, :5], "c1", "m", 1))
    with pytest.raises(
        DataError,
        match=r"part-000001.parquet: column 'vector' has 5 dimensions, v/part-000000.parquet has 12",
    ):
        VectorCatalogue.read(place, "v")


def test_ragged_lists_name_the_id(tmp_path):
    place = Place(str(tmp_path))
    table = pa.table({"id": ["a", "b"], "vector": pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))})
    place.write_table("v/part-000000.parquet", table.replace_schema_metadata({b"contract_hash": b"c"}))
    with pytest.raises(DataError, match="id 'b' has 1 dimensions, the first has 2"):
        read_vector_file(place, "v/part-000000.parquet")


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_bad_vector_names_its_id(tmp_path, vectors, bad):
    place = Place(str(tmp_path))
    broken = vectors.copy()
    broken[33] = bad
    write(place, IDS, broken, 2)
    with pytest.raises(DataError, match=r"part-000000\.parquet: the vector of id 'd033' is"):
        VectorStore(VectorCatalogue.read(place, "v")).search(vectors[:1], 2)
    with pytest.raises(DataError, match="id 'd033'"):
        read_vector_file(place, "v/part-000000.parquet")


def test_missing_pieces_are_named(tmp_path, vectors):
    place = Place(str(tmp_path))
    with pytest.raises(DataError, match="no Parquet file"):
        VectorCatalogue.read(place, "v")
    place.write_table("a/part-0.parquet", pa.table({"id": ["a"]}))
    with pytest.raises(DataError, match="no column 'vector'"):
        VectorCatalogue.read(place, "a")
    plain = vector_table(["a"], vectors[:1], "c", "m", 1).replace_schema_metadata(None)
    place.write_table("b/part-0.parquet", plain)
    with pytest.raises(DataError, match="no contract_hash"):
        VectorCatalogue.read(place, "b")
    place.write_table("c/part-0.parquet", vector_table(["a", "a"], vectors[:2], "c", "m", 1))
    with pytest.raises(DataError, match="id 'a' stands twice"):
        VectorCatalogue.read(place, "c")
    place.write_table("d/part-0.parquet", pa.table({"id": ["a"], "vector": ["text"]}))
    with pytest.raises(DataError, match="column 'vector' is string"):
        read_vector_file(place, "d/part-0.parquet")
