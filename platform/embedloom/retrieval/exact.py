"""The score of a pair: a function of its two vectors alone, in whatever company it is computed.

Products of float32 are exact in float64, and einsum without BLAS adds them in an order that depends on the dimension
alone; the sum is rounded to float32 once. A BLAS product rounds differently for every shape and thread count.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Positions = np.ndarray[Any, np.dtype[np.int64]]

# Queries rescored together: with some hundred documents of 4 KiB each, about a second-level cache.
_QUERIES = 8
_PAIRS = 4096


def pair_scores(left: Matrix, right: Matrix) -> Matrix:
    """Inner product of each row of ``left`` with the same row of ``right``, as ``top_k`` scores a pair.

    Args:
        left: float32 [n, d].
        right: float32 [n, d].

    Returns:
        float32 [n].
    """
    blocks = [
        np.einsum("nd,nd->n", left[s : s + _PAIRS].astype(np.float64), right[s : s + _PAIRS].astype(np.float64), optimize=False)
        for s in range(0, len(left), _PAIRS)
    ]  # fmt: skip
    scores: Matrix = np.concatenate([np.empty(0), *blocks]).astype(np.float32)
    return scores


def row_scores(queries: Matrix, documents: Matrix, rows: Positions) -> Matrix:
    """Scores of each query with the documents at its rows, on as many threads as torch uses.

    Args:
        queries: float32 [n, d].
        documents: float32 [m, d].
        rows: [n, w], -1 in places without a document.

    Returns:
        float32 [n, w], -inf in those places.
    """
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)

    def work(start: int) -> None:
        here = rows[start : start + _QUERIES]
        used = np.flatnonzero((here >= 0).any(axis=0))
        if not len(used):
            return
        here = here[:, : used[-1] + 1]
        products = np.einsum(
            "nwd,nd->nw",
            documents[np.maximum(here, 0)].astype(np.float64),
            queries[start : start + _QUERIES].astype(np.float64),
            optimize=False,
        )
        scores[start : start + _QUERIES, : here.shape[1]] = np.where(here >= 0, products, -np.inf)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(work, range(0, len(rows), _QUERIES)))
    return scores
