"""Nominating near documents by 8-bit products, with a bound on what the 8 bits can hide.

On CPUs with VNNI an int8 product runs five times as fast as a float32 one, and its integer sums are exact. What is
lost is known per vector: with x = b X + e (b the scale, X the 8-bit vector, e the residual) and q likewise,

    |q.x - b_q b Q.X| <= |q| |e_x| + |e_q| |b X|     (Cauchy-Schwarz)

so every document that can be among the top k is nominated, for certain, and the caller scores the nominees exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedloom.encoder.device import as_tensor
from embedloom.retrieval.exact import Matrix, Positions

Score = Callable[[Positions], Matrix]  # exact scores [n, w] of rows [n, w]; -inf where a row is -1

_CHUNK = 32768  # documents per product: the int32 sums of 512 queries (64 MiB) are about a last-level cache
_GROUP = 16  # sums looked at through their maximum; only groups that reach the threshold are opened
_LEVELS = 127
_MOST_NOMINEES = 2**24  # held at a time, over all queries of a block
_WIDTH = 1024  # places for nominees per query to begin with
_NORM_ERROR = 1 + 1e-5  # float32 norms of any dimension in use are off by less


@dataclass(frozen=True, slots=True)
class Quantized:
    """Vectors in 8 bits: codes int8 [n, d]; scale b, residual |e| and length |b X|, each [n]."""

    codes: Tensor
    scales: Tensor
    residuals: Tensor
    lengths: Tensor


def quantize(vectors: Matrix) -> Quantized:
    """Each vector with a scale of its own: its largest component becomes 127."""
    rows = as_tensor(np.ascontiguousarray(vectors, dtype=np.float32))
    scales = rows.abs().amax(dim=1) / _LEVELS
    codes = torch.round(rows / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1))
    rebuilt = codes * scales.unsqueeze(1)
    residuals = torch.linalg.vector_norm(rows - rebuilt, dim=1) * _NORM_ERROR
    lengths = torch.linalg.vector_norm(rebuilt, dim=1) * _NORM_ERROR
    return Quantized(codes.to(torch.int8), scales, residuals, lengths)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Documents of like scale; ``rows`` is -1 at padding."""

    codes: Tensor  # int8 [c, d]
    rows: Tensor  # [c]
    scales: Tensor  # [groups, _GROUP]
    highest: Tensor  # [groups]
    lowest: Tensor  # [groups]
    residual: float
    length: float
    padded: int  # rows from here on are padding


class Int8Block:
    """A block of documents, quantized once and searched by many blocks of queries."""

    def __init__(self, documents: Matrix) -> None:
        # Chunk by chunk, because every step of quantizing makes a float32 copy of what it is given.
        cuts = range(0, len(documents), _CHUNK)
        largest = torch.cat([as_tensor(documents[s : s + _CHUNK]).abs().amax(dim=1) for s in cuts])
        # Sorted by scale, a group's maximum is nearly its best document's score, and a chunk's largest residual
        # nearly everyone's.
        order = torch.argsort(largest)
        self._chunks = [self._chunk(documents, order[s : s + _CHUNK]) for s in cuts]

    @staticmethod
    def _chunk(documents: Matrix, rows: Tensor) -> _Chunk:
        part = quantize(documents[rows.numpy()])
        padding = -len(rows) % _GROUP
        scales = torch.nn.functional.pad(part.scales, (0, padding)).view(-1, _GROUP)
        return _Chunk(
            torch.nn.functional.pad(part.codes, (0, 0, 0, padding)),
            torch.nn.functional.pad(rows, (0, padding), value=-1),
            scales,
            scales.amax(dim=1),
            scales.amin(dim=1),
            float(part.residuals.max()),
            float(part.lengths.max()),
            len(rows),
        )

    def nominate(
        self, queries: Matrix, k: int, floor: Matrix, score: Score
    ) -> tuple[Positions, Matrix] | None:
        """Every document that may score among the best k and not below ``floor``, with its exact score.

        Args:
            queries: float32 [n, d].
            k: documents wanted per query.
            floor: [n] true scores that k documents are already known to reach; -inf where none are.
            score: exact scores of rows.

        Returns:
            Rows [n, w] of the block, -1 in places without one, and their scores, -inf there; None if the scores lie
            so close together that 8 bits tell too few of them apart.
        """
        asked = quantize(queries)
        norms = torch.linalg.vector_norm(as_tensor(queries), dim=1) * _NORM_ERROR
        found = _Nominees(k, torch.from_numpy(floor).clone(), score)
        sums = torch.empty(len(queries), len(self._chunks[0].rows), dtype=torch.int32)
        for number, chunk in enumerate(self._chunks):
            # Scaling an integer sum and adding the slack round a few times more.
            rounding = 8 * 2.0**-24 * norms * (chunk.length + chunk.residual)
            found.slack = norms * chunk.residual + asked.residuals * chunk.length + rounding
            # A fresh result of this size costs as many page faults as the product costs time.
            out = sums if sums.shape[1] == len(chunk.rows) else sums.new_empty(len(queries), len(chunk.rows))
            torch._int_mm(asked.codes, chunk.codes.T, out=out)
            # Where every true score is negative, a padding's sum of zero would pass for the best.
            out[:, chunk.padded :] = torch.iinfo(torch.int32).min
            self._collect(out, chunk, asked.scales, found)
            if found.too_many:
                return None
            if number == 0:
                found.learn()
        return found.finish()

    def _collect(self, sums: Tensor, chunk: _Chunk, scales: Tensor, found: "_Nominees") -> None:
        """Open the groups whose best sum reaches the threshold and take the documents that do."""
        grouped = sums.view(len(sums), -1, _GROUP)
        tops = grouped.amax(dim=-1)
        if found.empty:
            least = torch.where(tops > 0, tops * chunk.lowest, tops * chunk.highest)
            found.start(least * scales.unsqueeze(1))
        needed = (found.threshold - found.slack) / scales
        reached = tops * chunk.highest >= needed.unsqueeze(1)
        if bool((needed < 0).any()):
            # A negative sum is largest at the smallest scale of its group.
            reached |= tops * chunk.lowest >= needed.unsqueeze(1)
        query, group = reached.nonzero(as_tuple=True)
        opened = grouped[query, group] * chunk.scales[group]
        hit, slot = (opened >= needed[query].unsqueeze(1)).nonzero(as_tuple=True)
        rows = chunk.rows[group[hit] * _GROUP + slot]
        real = rows >= 0
        query, hit, slot = query[hit][real], hit[real], slot[real]
        found.add(query, rows[real], opened[hit, slot] * scales[query] + found.slack[query])


class _Nominees:
    """Nominees so far of every query with the most they may score, and the score a newcomer may have to beat."""

    def __init__(self, k: int, threshold: Tensor, score: Score) -> None:
        self.too_many = False
        self._k = k
        self._score = score
        self.threshold = threshold
        self.slack = torch.zeros(len(threshold))  # of the documents looked at now
        self._widest = self.slack  # of those looked at so far
        self._filled = torch.zeros(len(threshold), dtype=torch.int64)
        self._upper = torch.full((len(threshold), max(_WIDTH, 2 * k)), -torch.inf)
        self._rows = torch.full(self._upper.shape, -1)

    @property
    def empty(self) -> bool:
        """Whether nothing is known yet that a newcomer would have to beat."""
        return bool(torch.isinf(self.threshold).all())

    def start(self, rough: Tensor) -> None:
        """Learn a first threshold from rough scores [n, w] of different documents."""
        if rough.shape[1] >= self._k:
            self._raise(rough.topk(self._k, dim=1).values[:, -1] - self.slack)

    def add(self, query: Tensor, rows: Tensor, upper: Tensor) -> None:
        """Take newcomers, sorted by query."""
        self._widest = torch.maximum(self._widest, self.slack)
        counts = torch.bincount(query, minlength=len(self._filled))
        if int((self._filled + counts).max()) > self._upper.shape[1]:
            self._compact()
            self._widen(int((self._filled + counts).max()))
        if self.too_many:
            return
        starts = counts.cumsum(0) - counts
        place = self._filled[query] + torch.arange(len(query)) - starts[query]
        self._upper[query, place] = upper
        self._rows[query, place] = rows
        self._filled += counts

    def learn(self) -> Matrix:
        """Raise the threshold by the exact scores of the most promising k, which are returned: [n, <= k]."""
        self._compact()
        exact = self._score(self._rows[:, : self._k].numpy())
        if exact.shape[1] == self._k:
            self._raise(torch.from_numpy(exact).amin(dim=1))
        self._drop()
        return exact

    def finish(self) -> tuple[Positions, Matrix]:
        """All nominees, most promising first, with their exact scores."""
        first = self.learn()
        width = max(first.shape[1], int(self._filled.max()))
        rest = self._rows[:, first.shape[1] : width].numpy()
        rows = self._rows[:, :width].numpy()
        scores = np.concatenate([first, self._score(rest)], axis=1) if rest.size else first
        return rows, np.where(rows >= 0, scores, -np.inf)

    def _raise(self, known: Tensor) -> None:
        self.threshold = torch.maximum(self.threshold, known)

    def _compact(self) -> None:
        """Sort by promise, and drop what k others certainly beat."""
        width = max(1, int(self._filled.max()))
        upper, order = self._upper[:, :width].sort(dim=1, descending=True)
        self._upper[:, :width] = upper
        self._rows[:, :width] = self._rows[:, :width].gather(1, order)
        if width >= self._k:
            self._raise(upper[:, self._k - 1] - 2 * self._widest)
        self._drop()

    def _drop(self) -> None:
        gone = self._upper < self.threshold.unsqueeze(1)
        self._upper.masked_fill_(gone, -torch.inf)
        self._rows.masked_fill_(gone, -1)
        self._filled = (self._rows >= 0).sum(dim=1)

    def _widen(self, width: int) -> None:
        more = width - self._upper.shape[1]
        self.too_many = width * len(self._upper) > _MOST_NOMINEES
        if more > 0 and not self.too_many:
            self._upper = torch.nn.functional.pad(self._upper, (0, more), value=-torch.inf)
            self._rows = torch.nn.functional.pad(self._rows, (0, more), value=-1)
