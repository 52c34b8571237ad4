"""Stored types against sentence-transformers, FAISS and the definition of their scales."""

import faiss
import numpy as np
import pyarrow as pa
import pytest
from sentence_transformers.quantization import quantize_embeddings

from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.embed import vector_table
from embedloom.retrieval.search import top_k
from embedloom.retrieval.sharded import VectorCatalogue, VectorStore
from embedloom.retrieval.stored import dequantize, quantize, shorten, stored_vectors
from embedloom.retrieval.vector_files import read_vectors

IDS = [f"d{n:03d}" for n in range(200)]


@pytest.fixture(scope="module")
def vectors():
    drawn = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_bits_are_packed_as_sentence_transformers_packs_them(vectors):
    bits, _ = quantize(vectors, "binary")
    np.testing.assert_array_equal(bits, quantize_embeddings(vectors, "ubinary"))


def test_hamming_order_of_the_bits_is_what_faiss_finds(vectors):
    bits, _ = quantize(vectors, "binary")
    index = faiss.IndexBinaryFlat(64)
    index.add(bits)
    distances, _ = index.search(bits[:5], 20)
    by_hand = np.sort((np.unpackbits(bits[:5, None] ^ bits[None], axis=2)).sum(axis=2), axis=1)[:, :20]
    np.testing.assert_array_equal(distances, by_hand)


def test_scale_brings_int8_back_to_half_a_step(vectors):
    values, scales = quantize(vectors, "int8")
    assert values.dtype == np.int8 and np.abs(values.astype(int)).max(axis=1).tolist() == [127] * 200
    error = np.abs(dequantize(values, scales) - vectors).max(axis=1)
    assert (error <= scales * 0.5001).all()


def test_int8_keeps_neighbours_no_worse_than_a_scale_per_dimension(vectors):
    exact = top_k(vectors[:50], vectors, 10).positions
    values, scales = quantize(vectors, "int8")
    ours = top_k(vectors[:50], dequantize(values, scales), 10).positions
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    theirs = quantize_embeddings(vectors, "int8", ranges=np.stack([low, high])).astype(np.float32)
    theirs = (theirs + 128.5) * (high - low) / 255 + low
    reference = top_k(vectors[:50], theirs.astype(np.float32), 10).positions

    def recall(found):
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])

    assert recall(ours) >= recall(reference) - 0.01
    assert recall(ours) > 0.97


def test_scale_of_bits_is_the_one_nearest_to_the_vector(vectors):
    bits, scales = quantize(vectors, "binary")
    signs = np.unpackbits(bits, axis=1).astype(np.float64) * 2 - 1
    nearest = (signs * vectors).sum(axis=1) / (signs * signs).sum(
        axis=1
    )  # least squares, by the normal equation
    np.testing.assert_allclose(scales, nearest, rtol=1e-5)
    np.testing.assert_allclose(dequantize(bits, scales), signs * nearest[:, None], rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bytes_a_row"), [("float32", 256), ("float16", 128), ("int8", 68), ("binary", 12)]
)
def test_any_type_is_read_back(tmp_path, vectors, dtype, bytes_a_row):
    place = Place(str(tmp_path))
    table = vector_table(IDS, vectors, "c", "m", 1, dtype)
    place.write_table("v/part-000000.parquet", table)
    ids, found = read_vectors(place, "v", "c")
    assert ids == IDS and found.dtype == np.float32
    cosines = (found * vectors).sum(axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > (0.7 if dtype == "binary" else 0.999)
    assert (
        sum(c.nbytes for n, c in zip(table.column_names, table.columns, strict=True) if n != "id")
        == bytes_a_row * 200
    )


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_any_type_is_searched(tmp_path, vectors, dtype):
    place = Place(str(tmp_path))
    table = vector_table(IDS, vectors, "c", "m", 1, dtype)
    place.write_table("v/part-000000.parquet", table)
    catalogue = VectorCatalogue.read(place, "v")
    assert catalogue.dimension == 64
    found = VectorStore(catalogue).search(vectors[:5], 3)
    expected = top_k(vectors[:5], dequantize(*quantize(vectors, dtype)), 3)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert [IDS[row] for row in found.positions[:, 0]] == [IDS[row] for row in expected.positions[:, 0]]
    with pytest.raises(DataError, match="without the column 'scale'"):
        stored_vectors(table.drop_columns(["scale"]), "f")


def test_bad_stored_vectors_are_refused_by_id(tmp_path, vectors):
    place = Place(str(tmp_path))
    bad = vectors.copy()
    bad[7] = np.nan
    place.write_table("v/part-000000.parquet", vector_table(IDS, bad, "c", "m", 1))
    with pytest.raises(DataError, match="id 'd007' is not finite"):
        read_vectors(place, "v")
    place.write_table("w/part-000000.parquet", vector_table(IDS, vectors, "c", "m", 1))
    place.write_table("w/part-000001.parquet", vector_table(IDS, vectors[:, :8], "c", "m", 1))
    with pytest.raises(DataError, match="has 8 dimensions, the files before have 64"):
        read_vectors(place, "w")
    with pytest.raises(DataError, match="expected fixed_size_list"):
        stored_vectors(pa.table({"id": ["a"], "vector": ["text"]}), "f")


def test_shortened_vectors_are_unit_length_again(vectors):
    short = shorten(vectors, 16, normalize=True)
    np.testing.assert_allclose((short**2).sum(axis=1), 1, rtol=1e-5)
    # Same direction as the prefix: what torch's normalize gives.
    expected = vectors[:, :16] / np.sqrt((vectors[:, :16].astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(short, expected, rtol=1e-5)
    assert shorten(vectors, 64, normalize=True) is vectors
    np.testing.assert_array_equal(shorten(vectors, 16, normalize=False), vectors[:, :16])
    with pytest.raises(ConfigError, match="65 is above the 64 dimensions"):
        shorten(vectors, 65, normalize=True)


def test_bits_need_a_multiple_of_eight(vectors):
    with pytest.raises(ConfigError, match="the vectors have 63"):
        quantize(vectors[:, :63], "binary")
