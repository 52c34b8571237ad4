"""Nominating near documents by 8-bit products, with a bound on what the 8 bits can hide.

With VNNI an int8 product runs five times as fast as a float32 one, and its integer sums are exact. What is lost is
known per vector: with x = b X + e (b the scale, X the 8-bit vector, e the residual) and q likewise,

    |q.x - b_q b Q.X| <= |q| |e_x| + |e_q| |b X|     (Cauchy-Schwarz)

so every document that can be among the top k is nominated, for certain, and the caller scores the nominees exactly.
The products and the comparison with the threshold are one loop in C (_nominate.c): with a library's product, writing
the sums, reading them back and opening them took twice the time of the product itself.
"""

import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from embedloom.encoder.device import as_tensor
from embedloom.errors import ConfigError
from embedloom.retrieval.exact import Matrix, Positions

_BLOCK = 64  # documents and queries at a time in the kernel
_QUERIES = 6
_CHUNK = 32768  # rows quantized at a time: every step of it makes a float32 copy
_LEVELS = 127
_ROOM = 2048  # places for nominees per query to begin with
_MOST_NOMINEES = 2**23  # places over all queries of a slice; above it 8 bits tell too few documents apart
_GROWTH = 4  # each look at the threshold comes after so many times the documents of the one before
_NORM_ERROR = 1 + 1e-5  # float32 norms of any dimension in use are off by less
_UNIT = 2.0**-24  # relative rounding error of one float32 operation


def load_kernel() -> ModuleType | None:
    """The compiled loops, or None where they were not built or the CPU has no AVX-512 VNNI."""
    try:
        kernel = importlib.import_module("embedloom.retrieval._nominate")
    except ImportError:
        return None
    return kernel if kernel.supported() else None


@dataclass(frozen=True, slots=True)
class Quantized:
    """Vectors in 8 bits: codes int8 [n, d]; scale b, residual |e| and length |b X|, each float32 [n]."""

    codes: np.ndarray[tuple[int, int], np.dtype[np.int8]]
    scales: Matrix
    residuals: Matrix
    lengths: Matrix


def quantize(vectors: Matrix) -> Quantized:
    """Each vector with a scale of its own: its largest component becomes 127."""
    rows = as_tensor(np.ascontiguousarray(vectors, dtype=np.float32))
    scales = rows.abs().amax(dim=1) / _LEVELS
    codes = torch.round(rows / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1))
    rebuilt = codes * scales.unsqueeze(1)
    residuals = torch.linalg.vector_norm(rows - rebuilt, dim=1) * _NORM_ERROR
    lengths = torch.linalg.vector_norm(rebuilt, dim=1) * _NORM_ERROR
    return Quantized(codes.to(torch.int8).numpy(), scales.numpy(), residuals.numpy(), lengths.numpy())


class Int8Block:
    """A block of documents, quantized once and searched by many blocks of queries.

    Raises:
        ConfigError: the compiled loops are missing, or the CPU lacks what they need.
    """

    def __init__(self, documents: Matrix) -> None:
        kernel = load_kernel()
        if kernel is None:
            raise ConfigError(
                "search engine 'int8': needs a CPU with AVX-512 VNNI and the loops that gcc builds when embedloom is "
                "installed; `embedloom doctor` says which is missing; allowed here: 'auto', 'faiss', 'torch'"
            )
        self._kernel = kernel
        self.documents = documents
        rows = len(documents) + -len(documents) % _BLOCK
        self.width = documents.shape[1] + -documents.shape[1] % 4
        self.packed = np.zeros((rows // _BLOCK, self.width // 4, _BLOCK, 4), np.uint8)
        self.scales, self.lengths = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        # Of padding, so that it reaches no threshold.
        self.residuals = np.full(rows, -np.inf, np.float32)
        for start in range(0, len(documents), _CHUNK):
            self._pack(start, quantize(documents[start : start + _CHUNK]))
        self.longest = float((self.lengths + np.maximum(self.residuals, 0)).max(initial=0))

    @property
    def nbytes(self) -> int:
        """Memory of the 8-bit form."""
        return self.packed.nbytes

    def _pack(self, start: int, part: Quantized) -> None:
        stop = start + len(part.codes)
        self.scales[start:stop], self.residuals[start:stop] = part.scales, part.residuals
        self.lengths[start:stop] = part.lengths
        codes = np.zeros((len(part.codes) + -len(part.codes) % _BLOCK, self.width), np.int8)
        codes[: len(part.codes), : part.codes.shape[1]] = part.codes
        shifted = (codes ^ np.int8(-128)).view(np.uint8)  # + 128
        blocks = shifted.reshape(-1, _BLOCK, self.width // 4, 4).transpose(0, 2, 1, 3)
        self.packed[start // _BLOCK : start // _BLOCK + len(blocks)] = blocks

    def nominate(self, queries: Matrix, k: int, floor: Matrix) -> Positions | None:
        """Every document that may score among the best k and not below ``floor``.

        Args:
            queries: float32 [n, d].
            k: documents wanted per query.
            floor: [n] true scores that k documents are already known to reach; -inf where none are.

        Returns:
            Rows [n, w] of the block, -1 in places without one; None if the scores lie so close together that 8
            bits tell too few of them apart.
        """
        step = -(-len(queries) // torch.get_num_threads()) or 1
        cuts = [slice(start, start + step) for start in range(0, len(queries), step)]
        with ThreadPoolExecutor(max(1, len(cuts))) as threads:
            found = list(threads.map(lambda rows: self._nominate(queries[rows], k, floor[rows]), cuts))
        sure = [rows for rows in found if rows is not None]
        if len(sure) < len(found):
            return None
        out = np.full((len(queries), max((rows.shape[1] for rows in sure), default=0)), -1, np.int64)
        for cut, rows in zip(cuts, sure, strict=True):
            out[cut, : rows.shape[1]] = rows
        return out

    def _nominate(self, queries: Matrix, k: int, floor: Matrix) -> Positions | None:
        search = _Search(self, self._kernel, queries, k, floor)
        block, blocks = 0, len(self.packed)
        # Without a threshold everything is a nominee, so the first look comes early.
        stop = blocks if np.isfinite(floor).all() else min(blocks, 2 * (k // _BLOCK + 8))
        while block < blocks:
            block = search.scan(block, stop)
            search.learn()
            if not search.has_room():
                return None
            stop = min(blocks, max(stop, block * _GROWTH)) if block == stop else stop
        return search.finish()


class _Search:
    """Queries of one thread: their nominees so far, and what a newcomer has to reach.

    ``needed`` and ``uppers``, the most a nominee may score, are in units of the query's own scale. The kernel takes
    queries six at a time: made-up ones fill the last six and need infinity.
    """

    def __init__(
        self, block: "Int8Block", kernel: ModuleType, queries: Matrix, k: int, floor: Matrix
    ) -> None:
        self._block, self._kernel, self._k = block, kernel, k
        self._queries = np.pad(queries, ((0, -len(queries) % _QUERIES), (0, 0)))
        whole, self._n = len(self._queries), len(queries)
        asked = quantize(self._queries)
        self._codes = np.pad(asked.codes, ((0, 0), (0, block.width - queries.shape[1])))
        self._offsets = self._codes.sum(axis=1, dtype=np.int32) * np.int32(128)
        norms = np.linalg.norm(self._queries, axis=1) * _NORM_ERROR
        self._units = np.where(norms > 0, asked.scales, 1)
        # Scaling an integer sum and adding the slack round a few times, and so does the exact score.
        rounding = 8 * _UNIT * norms
        self._per_residual = np.where(norms > 0, (norms + rounding) / self._units, 1)
        self._per_length = (asked.residuals + rounding) / self._units
        # A float32 product of d terms in 64 lanes is off by at most (d / 64 + 12) u |q| |x|.
        self._errors = (queries.shape[1] / 64 + 16) * np.float32(_UNIT) * norms * np.float32(block.longest)
        self._thresholds = np.pad(floor, (0, whole - self._n), constant_values=np.inf)
        # Finite, because minus infinity is what padded documents reach.
        known = np.isfinite(self._thresholds)
        needed = self._thresholds[known] / self._units[known]
        limits = np.finfo(np.float32)
        self._needed = np.where(self._thresholds > 0, limits.max, limits.min)
        self._needed[known] = needed - np.abs(needed) * np.float32(4 * _UNIT)
        self._counts = np.zeros(whole, np.int32)
        self._rows = np.zeros((whole, max(_ROOM, 4 * k)), np.int32)
        self._uppers = np.zeros(self._rows.shape, np.float32)

    def scan(self, first: int, stop: int) -> int:
        """Collect nominees of the blocks from ``first`` on; the block to go on with, once there is room again."""
        block, rows = self._block, slice(stop * _BLOCK)
        return int(
            self._kernel.scan(
                self._codes, block.packed[:stop], block.scales[rows], block.residuals[rows], block.lengths[rows],
                self._offsets, self._per_residual, self._per_length, self._needed, self._counts, self._rows,
                self._uppers, first,
            )
        )  # fmt: skip

    def learn(self) -> None:
        """Raise the thresholds by the products of the most promising k, and drop who cannot reach them."""
        self._kernel.learn(*self._state())

    def finish(self) -> Positions:
        """Rows [n, w] that float32 products leave in the running, -1 in places without one."""
        self._kernel.finish(*self._state())
        counts = self._counts[: self._n]
        width = int(counts.max(initial=0))
        real = np.arange(width) < counts[:, None]
        return np.where(real, self._rows[: self._n, :width], -1).astype(np.int64)

    def _state(self) -> tuple[Any, ...]:
        return (
            self._queries, self._block.documents, self._errors, self._units, self._counts, self._rows,
            self._uppers, self._thresholds, self._needed, self._k,
        )  # fmt: skip

    def has_room(self) -> bool:
        """Whether every query can take another block; room is made while there may be more."""
        while int(self._counts.max(initial=0)) + _BLOCK > self._rows.shape[1]:
            if self._rows.size * 2 > _MOST_NOMINEES:
                return False
            more = ((0, 0), (0, self._rows.shape[1]))
            self._rows, self._uppers = np.pad(self._rows, more), np.pad(self._uppers, more)
        return True
