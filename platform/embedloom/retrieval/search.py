"""Exact top-k by inner product: pure functions whose result depends on the vectors and positions alone.

A float32 matrix product rounds differently for every block shape, thread count and library, so its order among
near-equal scores means nothing. It therefore only nominates: every document that could be among the top k,
given the worst rounding error of a float32 product, is scored again in float64, one pair at a time, rounded to
float32 and ordered by (score, position). Blocks, shards, actors and engines then cannot change a single bit.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from embedloom.errors import DataError

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Positions = np.ndarray[Any, np.dtype[np.int64]]
Engine = Literal["auto", "faiss", "torch"]

_MARGIN = 16  # nominees beyond k; widened fourfold for the rare query whose ties reach further
_NOMINEES = 2**22  # nominees held at a time
_RESCORE_BYTES = 64 * 2**20
_UNIT = 2.0**-24  # relative rounding error of one float32 operation


@dataclass(frozen=True, slots=True)
class TopK:
    """The best documents of each query, best first, ties by smaller position.

    ``positions`` is int64 and ``scores`` float32, both [queries, min(k, documents)].
    """

    positions: Positions
    scores: Matrix


def top_k(
    queries: Matrix,
    documents: Matrix,
    k: int,
    *,
    positions: Positions | None = None,
    query_rows: int = 1024,
    document_rows: int = 65536,
    engine: Engine = "auto",
) -> TopK:
    """Exact top-k inner products of every query.

    Args:
        queries: float32 [n, d].
        documents: float32 [m, d].
        k: documents wanted per query; fewer come back if there are fewer.
        positions: int64 [m], the number each document is known by and ties are broken by; default 0 to m-1.
            Number documents by their rank among the sorted ids and ties are broken by id.
        query_rows: queries per block.
        document_rows: documents per block; ``query_rows x document_rows`` floats bound the memory.
        engine: what nominates; ``auto``: torch on a CUDA device, else FAISS if installed, else torch. The
            result is the same.

    Raises:
        DataError: dimensions that differ, or a vector that is zero, NaN or infinite.
    """
    if k < 1:
        raise DataError(f"top_k: k is {k}; allowed: 1 or more")
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise DataError(
            f"top_k: queries are {list(queries.shape)} and documents {list(documents.shape)}; both must be [rows, d] with the same d"
        )
    known = np.arange(len(documents), dtype=np.int64) if positions is None else positions
    check_vectors(queries, "queries")
    check_vectors(documents, "documents")
    blocks = []
    for start in range(0, len(queries), query_rows):
        part = np.ascontiguousarray(queries[start : start + query_rows], dtype=np.float32)
        found = [
            _search_block(
                part,
                documents[first : first + document_rows],
                known[first : first + document_rows],
                k,
                engine,
            )
            for first in range(0, len(documents), document_rows)
        ]
        blocks.append(merge_top_k(found, k) if found else _empty(len(part)))
    if not blocks:
        return _empty(0, min(k, len(documents)))
    return TopK(np.concatenate([b.positions for b in blocks]), np.concatenate([b.scores for b in blocks]))


def merge_top_k(parts: Sequence[TopK], k: int) -> TopK:
    """Best k of the partial results of several document shards, for the same queries.

    Args:
        parts: results with positions that are unique over all shards; at least one.
        k: documents wanted per query; each part must have been searched with at least this k.
    """
    positions = np.concatenate([part.positions for part in parts], axis=1)
    scores = np.concatenate([part.scores for part in parts], axis=1)
    order = np.lexsort((positions, -scores), axis=-1)[:, :k]
    return TopK(np.take_along_axis(positions, order, axis=1), np.take_along_axis(scores, order, axis=1))


def pair_scores(left: Matrix, right: Matrix) -> Matrix:
    """Inner product of each row of ``left`` with the same row of ``right``, as ``top_k`` scores a pair.

    Args:
        left: float32 [n, d].
        right: float32 [n, d].

    Returns:
        float32 [n].
    """
    return np.asarray(_exact(left, right[:, None, :])[:, 0])


def check_vectors(vectors: Matrix, source: str, ids: Any = None) -> None:
    """Refuse vectors that have no direction.

    Args:
        vectors: float32 [n, d].
        source: what they are, named in the error.
        ids: their names, a list or an Arrow column; None names the row.

    Raises:
        DataError: a zero, NaN or infinite vector, named by id, or by row if no ids are given.
    """
    if vectors.shape[0] == 0:
        return
    # The extremes decide: both are NaN if any value is.
    high, low = vectors.max(axis=1, initial=0), vectors.min(axis=1, initial=0)
    bad = ~np.isfinite(high) | ~np.isfinite(low) | ((high == 0) & (low == 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        name = f"row {row}" if ids is None else f"id {str(ids[row])!r}"
        value = "zero" if np.isfinite(high[row]) and np.isfinite(low[row]) else "not finite"
        raise DataError(
            f"{source}: the vector of {name} is {value} ({int(bad.sum())} such of {len(vectors)}); it has no neighbours"
        )


def _search_block(queries: Matrix, documents: Matrix, positions: Positions, k: int, engine: Engine) -> TopK:
    documents = np.ascontiguousarray(documents, dtype=np.float32)
    total = len(documents)
    kept = min(k, total)
    out_positions = np.empty((len(queries), kept), dtype=np.int64)
    out_scores = np.empty((len(queries), kept), dtype=np.float32)
    slack = _rounding_slack(queries, documents)
    pending, width = np.arange(len(queries)), min(total, k + _MARGIN)
    while len(pending):
        step, unsure = max(1, _NOMINEES // width), []
        for start in range(0, len(pending), step):
            rows = pending[start : start + step]
            rough, nominees = _nominate(queries[rows], documents, width, engine)
            sure = (rough[:, -1] < rough[:, kept - 1] - slack[rows]) | (width == total)
            unsure.append(rows[~sure])
            rows, nominees = rows[sure], nominees[sure]
            best = merge_top_k(
                [TopK(positions[nominees], _rescore(queries[rows], documents, nominees))], kept
            )
            out_positions[rows], out_scores[rows] = best.positions, best.scores
        pending, width = np.concatenate(unsure), min(total, width * 4)
    return TopK(out_positions, out_scores)


def _rounding_slack(queries: Matrix, documents: Matrix) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far below the k-th rough score a true member of the top k may lie, per query: [n].

    A float32 inner product of d terms, summed in any order, is off by at most d u / (1 - d u) |q| |x|; it counts
    twice, once for either document compared, and the final rounding to float32 may make two scores equal.
    """
    terms = queries.shape[1] * _UNIT
    longest = np.sqrt(np.einsum("md,md->m", documents, documents, dtype=np.float64).max(initial=0))
    lengths = np.sqrt(np.einsum("nd,nd->n", queries, queries, dtype=np.float64))
    return np.asarray((2 * terms / (1 - terms) + 4 * _UNIT) * lengths * longest)


def _nominate(queries: Matrix, documents: Matrix, width: int, engine: Engine) -> tuple[Matrix, Positions]:
    """Rough scores, descending, and rows of the ``width`` best documents per query."""
    cuda = torch.cuda.is_available()
    if engine == "faiss" or (engine == "auto" and not cuda and _has_faiss()):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        scores, rows = faiss.knn(queries, documents, width, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, rows
    device = "cuda" if cuda else "cpu"
    precision = torch.get_float32_matmul_precision()
    # TF32 and bfloat16 products round far beyond the slack that makes the nominees complete.
    torch.set_float32_matmul_precision("highest")
    try:
        products = torch.from_numpy(queries).to(device) @ torch.from_numpy(documents).to(device).T
    finally:
        torch.set_float32_matmul_precision(precision)
    best = products.topk(width, dim=1)
    return best.values.cpu().numpy(), best.indices.cpu().numpy()


def _has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def _rescore(queries: Matrix, documents: Matrix, nominees: Positions) -> Matrix:
    """Exact float32 scores of the nominees, [n, width], a bounded number of rows at a time."""
    scores = np.empty(nominees.shape, dtype=np.float32)
    step = max(1, _RESCORE_BYTES // max(1, nominees.shape[1] * documents.shape[1] * 8))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        scores[rows] = _exact(queries[rows], documents[nominees[rows]])
    return scores


def _exact(queries: Matrix, documents: Matrix) -> Matrix:
    """float32 scores [n, w] of queries [n, d] and documents [n, w, d].

    Products of float32 are exact in float64, and einsum without BLAS adds them in an order that depends on d
    alone, so a pair scores the same in whatever company.
    """
    products = np.einsum(
        "nwd,nd->nw", documents.astype(np.float64), queries.astype(np.float64), optimize=False
    )
    return np.asarray(products, dtype=np.float32)


def _empty(rows: int, width: int = 0) -> TopK:
    return TopK(np.empty((rows, width), dtype=np.int64), np.empty((rows, width), dtype=np.float32))
