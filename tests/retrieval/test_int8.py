"""The compiled loops beside NumPy, and what happens where they are missing."""

import numpy as np
import pytest

from embedloom.errors import ConfigError
from embedloom.retrieval import search
from embedloom.retrieval.search import pick_engine, top_k

kernel = search.load_kernel()
needs_kernel = pytest.mark.skipif(kernel is None, reason="not compiled, or no AVX-512 VNNI")


def scan_arguments(codes, documents, needed, room):
    """Buffers of one scan without slack: an upper bound is the integer product itself."""
    n, m = len(codes), len(documents)
    packed = (documents.astype(np.int16) + 128).astype(np.uint8)
    packed = np.ascontiguousarray(packed.reshape(-1, 64, documents.shape[1] // 4, 4).transpose(0, 2, 1, 3))
    ones, none = np.ones(m, np.float32), np.zeros(m, np.float32)
    slopes = np.ones(n, np.float32)
    offsets = codes.sum(axis=1, dtype=np.int32) * np.int32(128)
    counts, rows = np.zeros(n, np.int32), np.zeros((n, room), np.int32)
    uppers = np.zeros((n, room), np.float32)
    return [codes, packed, ones, none, none, offsets, slopes, slopes, needed, counts, rows, uppers]


@needs_kernel
@pytest.mark.parametrize("dimension", [4, 36, 384])
def test_scan_finds_exactly_the_products_that_reach_what_is_needed(dimension):
    generator = np.random.default_rng(dimension)
    codes = generator.integers(-127, 128, (12, dimension), dtype=np.int8)
    documents = generator.integers(-127, 128, (192, dimension), dtype=np.int8)
    products = codes.astype(np.int64) @ documents.astype(np.int64).T
    needed = np.quantile(products, 0.9, axis=1).astype(np.float32)
    arguments = scan_arguments(codes, documents, needed, 192)
    assert kernel.scan(*arguments, 0) == 3
    counts, rows, uppers = arguments[-3:]
    for query, count in enumerate(counts):
        expected = np.flatnonzero(products[query] >= needed[query])
        np.testing.assert_array_equal(rows[query, :count], expected)
        np.testing.assert_array_equal(uppers[query, :count], products[query, expected])


@needs_kernel
def test_scan_stops_where_there_is_no_room_for_another_block():
    codes = np.ones((6, 4), np.int8)
    documents = np.ones((256, 4), np.int8)
    arguments = scan_arguments(codes, documents, np.zeros(6, np.float32), 150)
    assert kernel.scan(*arguments, 0) == 2
    np.testing.assert_array_equal(arguments[-3], [128] * 6)


@needs_kernel
def test_buffers_that_do_not_belong_together_are_refused():
    codes, documents = np.ones((6, 4), np.int8), np.ones((64, 4), np.int8)
    good = scan_arguments(codes, documents, np.zeros(6, np.float32), 64)
    for wrong, value in [(0, codes[:5].copy()), (1, good[1][:, :, :32].copy()), (8, np.zeros(5, np.float32)), (10, np.zeros((6, 63), np.int32))]:  # fmt: skip
        bad = [value if place == wrong else buffer for place, buffer in enumerate(good)]
        with pytest.raises(ValueError, match="sizes do not belong together"):
            kernel.scan(*bad, 0)


@needs_kernel
@pytest.mark.parametrize("k", [1, 7, 130])
def test_thresholds_learnt_keep_every_document_of_the_true_top_k(k):
    """Documents of very different lengths, so that the 8-bit order and the true one differ."""
    generator = np.random.default_rng(k)
    documents = generator.standard_normal((5000, 40)).astype(np.float32) ** 3
    queries = generator.standard_normal((20, 40)).astype(np.float32)
    block = search.Int8Block(documents)
    rows = block.nominate(queries, k, np.full(20, -np.inf, np.float32))
    true = queries.astype(np.float64) @ documents.astype(np.float64).T
    best = np.argsort(-true, axis=1)[:, :k]
    for nominated, wanted in zip(rows, best, strict=True):
        real = nominated[nominated >= 0]
        assert set(wanted) <= set(real)
        assert len(real) == len(set(real)) < k + 20


def test_without_the_kernel_the_engine_is_named_and_auto_takes_another(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert search.load_kernel() is None
    assert pick_engine("auto") != "int8"
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(ConfigError, match="search engine 'int8': needs a CPU with AVX-512 VNNI"):
        top_k(vectors, vectors, 1, engine="int8")
    np.testing.assert_array_equal(top_k(vectors, vectors, 1).positions, [[0], [1], [2]])
