"""Exact search against brute force in float64, and the same bits for every cut of the documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.errors import DataError
from embedloom.retrieval import search
from embedloom.retrieval.search import DocumentBlock, TopK, check_vectors, merge_top_k, pair_scores, top_k

needs_kernel = pytest.mark.skipif(search.load_kernel() is None, reason="not compiled, or no AVX-512 VNNI")
ENGINES = ["faiss", "torch", "bf16", pytest.param("int8", marks=needs_kernel)]
HERE = ["torch", "faiss", "bf16"] + ([] if search.load_kernel() is None else ["int8"])


def brute_force(queries, documents, k):
    """Reference: float64 products, rounded to float32, sorted by (-score, position)."""
    scores = (queries.astype(np.float64) @ documents.astype(np.float64).T).astype(np.float32)
    order = np.lexsort((np.broadcast_to(np.arange(len(documents)), scores.shape), -scores), axis=-1)[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def unit_rows(generator, rows, dimension):
    values = generator.standard_normal((rows, dimension)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def collection():
    """Documents with many copies, near copies and ties at every possible boundary."""
    generator = np.random.default_rng(3)
    base = unit_rows(generator, 500, 48)
    near = base[:200] * np.float32(1 + 1e-7)
    documents = np.concatenate(
        [base, base[:150], near, np.repeat(base[7:8], 60, axis=0), unit_rows(generator, 300, 48)]
    )
    documents = documents[generator.permutation(len(documents))]
    queries = np.concatenate([unit_rows(generator, 40, 48), base[:20], base[7:8]])
    return queries, documents


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("k", [1, 5, 30, 64])
def test_equals_brute_force_with_duplicates(collection, engine, k):
    queries, documents = collection
    found = top_k(queries, documents, k, engine=engine)
    positions, scores = brute_force(queries, documents, k)
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_array_equal(found.scores, scores)


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_agree_bit_for_bit(collection, shards):
    queries, documents = collection
    whole = top_k(queries, documents, 20)
    positions = np.arange(len(documents))
    parts = [
        top_k(queries, documents[rows], 20, positions=rows, engine=HERE[number % len(HERE)])
        for number, rows in enumerate(np.array_split(positions, shards))
    ]
    merged = merge_top_k(parts[::-1], 20)
    np.testing.assert_array_equal(merged.positions, whole.positions)
    assert merged.scores.tobytes() == whole.scores.tobytes()


@pytest.mark.parametrize(("query_rows", "document_rows"), [(1, 7), (3, 100), (1000, 1), (17, 333)])
def test_blocks_change_nothing(collection, query_rows, document_rows):
    queries, documents = collection[0][:12], collection[1][:400]
    whole = top_k(queries, documents, 9)
    cut = top_k(queries, documents, 9, query_rows=query_rows, document_rows=document_rows)
    np.testing.assert_array_equal(cut.positions, whole.positions)
    assert cut.scores.tobytes() == whole.scores.tobytes()


def test_every_document_tied_with_the_kth_is_considered():
    """1,000 equal documents: the 5 smallest positions win, whatever an engine nominates first."""
    vector = unit_rows(np.random.default_rng(0), 1, 16)
    documents = np.repeat(vector, 1000, axis=0)
    order = np.random.default_rng(1).permutation(1000)
    for engine in ("faiss", "torch", "bf16"):
        found = top_k(vector, documents, 5, positions=order, engine=engine)
        np.testing.assert_array_equal(found.positions, [[0, 1, 2, 3, 4]])
        assert len(set(found.scores[0].tolist())) == 1


def test_near_ties_below_float32_resolution_follow_the_exact_products():
    """Large cancelling terms: float32 sums misorder these, exact products do not."""
    generator = np.random.default_rng(5)
    documents = generator.standard_normal((300, 64)).astype(np.float32)
    documents[:, :32] *= 3000
    documents[:, 32:] *= 0.01
    query = np.concatenate([np.full(16, 1.0), np.full(16, -1.0), np.full(32, 1.0)])[None].astype(np.float32)
    documents[:, 16:32] = documents[:, :16]
    found = top_k(query, documents, 10)
    positions, scores = brute_force(query, documents, 10)
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 60),
    queries=st.integers(0, 5),
    dimension=st.integers(1, 33),
    k=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    engine=st.sampled_from(["auto", "torch", "faiss", "bf16"]),
)
def test_any_cut_gives_the_same_result(seed, rows, queries, dimension, k, cuts, engine):
    generator = np.random.default_rng(seed)
    # Small integers make exact ties frequent.
    documents = generator.integers(-2, 3, (rows, dimension)).astype(np.float32)
    documents[(documents == 0).all(axis=1), 0] = 1
    asked = generator.integers(1, 3, (queries, dimension)).astype(np.float32)
    positions, scores = brute_force(asked, documents, k)
    parts = np.split(np.arange(rows), sorted({min(cut, rows) for cut in cuts}))
    found = [top_k(asked, documents[part], k, positions=part, engine=engine) for part in parts]
    merged = merge_top_k(found, k)
    np.testing.assert_array_equal(merged.positions, positions)
    np.testing.assert_array_equal(merged.scores, scores)


@needs_kernel
@pytest.mark.parametrize("count", [1, 2, 15, 17])
def test_documents_that_all_point_away_are_found(count):
    """Every score is negative, and 8-bit products come in groups of 16 that padding fills with sums of zero."""
    documents = -unit_rows(np.random.default_rng(3), count, 24)
    query = -documents.mean(axis=0, keepdims=True)
    for k in (1, count):
        found = top_k(query, documents, k, engine="int8")
        positions, scores = brute_force(query, documents, k)
        np.testing.assert_array_equal(found.positions, positions)
        np.testing.assert_array_equal(found.scores, scores)


def test_fewer_documents_than_k_gives_shorter_lists():
    found = top_k(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[:2], 10)
    assert found.positions.shape == (3, 2)
    assert merge_top_k(
        [found, TopK(np.empty((3, 0), np.int64), np.empty((3, 0), np.float32))], 10
    ).scores.shape == (3, 2)


def test_pair_scores_equal_the_search_scores():
    generator = np.random.default_rng(2)
    queries, documents = unit_rows(generator, 9, 40), unit_rows(generator, 30, 40)
    found = top_k(queries, documents, 1)
    best = pair_scores(queries, documents[found.positions[:, 0]])
    assert best.tobytes() == np.ascontiguousarray(found.scores[:, 0]).tobytes()


@pytest.mark.parametrize(
    ("value", "word"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite"), (0.0, "zero")],
)
def test_vector_without_direction_is_named(value, word):
    vectors = np.ones((3, 4), dtype=np.float32)
    vectors[1] = value
    with pytest.raises(DataError, match=f"id 'second' is {word}"):
        check_vectors(vectors, "documents", ["first", "second", "third"])
    with pytest.raises(DataError, match=f"documents: the vector of row 1 is {word}"):
        top_k(np.ones((1, 4), np.float32), vectors, 1)
    with pytest.raises(DataError, match="queries: the vector of row 1"):
        top_k(vectors, np.ones((1, 4), np.float32), 1)


def test_different_dimensions_are_refused():
    with pytest.raises(DataError, match=r"queries are \[1, 4\] and documents \[2, 5\]"):
        top_k(np.ones((1, 4), np.float32), np.ones((2, 5), np.float32), 1)
    with pytest.raises(DataError, match="k is 0"):
        top_k(np.ones((1, 4), np.float32), np.ones((2, 4), np.float32), 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_searched_one_after_another_prune_each_other(engine):
    """Real-sized blocks: several chunks of 8-bit products, thresholds handed from block to block."""
    generator = np.random.default_rng(5)
    documents = unit_rows(generator, 70_000, 32) * generator.uniform(0.5, 2, (70_000, 1)).astype(np.float32)
    queries = unit_rows(generator, 50, 32)
    best = None
    for rows in np.array_split(np.arange(70_000), [40_000, 40_010]):
        best = DocumentBlock(documents[rows], rows, engine).search(queries, 12, best, query_rows=20)
    positions, scores = brute_force(queries, documents, 12)
    np.testing.assert_array_equal(best.positions, positions)
    np.testing.assert_array_equal(best.scores, scores)


def test_quantization_error_stays_below_its_bound():
    generator = np.random.default_rng(6)
    left, right = (generator.standard_normal((300, 64)).astype(np.float32) ** 3 for _ in range(2))
    q, x = search.quantize(left), search.quantize(right)
    rough = (q.codes.astype(np.float64) @ x.codes.astype(np.float64).T) * q.scales[:, None] * x.scales
    true = left.astype(np.float64) @ right.astype(np.float64).T
    lengths = np.linalg.norm(left, axis=1)
    bound = lengths[:, None] * x.residuals + q.residuals[:, None] * x.lengths
    assert (np.abs(rough - true) <= bound).all()
    assert np.abs(rough - true).max() > 0


@needs_kernel
@pytest.mark.parametrize("most", [search._MOST_NOMINEES, 10_000])
def test_documents_that_8_bits_cannot_tell_apart(most, monkeypatch):
    """Thousands of copies of one vector with noise below the quantization step; too many nominees go by float32."""
    monkeypatch.setattr(search, "_MOST_NOMINEES", most)
    generator = np.random.default_rng(7)
    base = unit_rows(generator, 1, 24)
    documents = (base + generator.standard_normal((3000, 24)) * 1e-5).astype(np.float32)
    queries = np.concatenate([base, unit_rows(generator, 5, 24)])
    found = top_k(queries, documents, 10, engine="int8")
    positions, scores = brute_force(queries, documents, 10)
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_array_equal(found.scores, scores)
