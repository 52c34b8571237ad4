"""Two versions of the model behind one endpoint: which answers a request, and how far the new one has drifted. No Ray here."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field

from embedloom.config.base import FrozenConfig
from embedloom.serving.calls import Backend
from embedloom.serving.messages import EncodeJob, EncodeResult, ModelInfo, Refusal, TokenizeResult, Vectors
from embedloom.serving.rollout.trial import Side, Window

# How far a new version of the model has drifted: do both find the same neighbours? Plain numpy.


NEIGHBOURS = 10
MIN_TEXTS = 64  # in the store; among fewer, two random orders agree too often
_MOST_TEXTS = 512  # 8 MB at 4,096 dimensions
_ROWS_COMPARED = 8  # of one request, so that a bulk request costs no more than a query


@dataclass(frozen=True, slots=True)
class Compared:
    """What one request's texts say."""

    texts: int  # with neighbours
    overlap_sum: float
    cosines: int
    cosine_sum: float


class NeighbourStore:
    """Vectors of recent texts, in which neighbours are looked up; a ring.

    ``same_space``: the new version's queries must work on vectors that the live version made, so its neighbours are
    looked up among those. Else each version looks among its own vectors of the same texts.
    """

    def __init__(self, same_space: bool) -> None:
        self.same_space = same_space
        self._live: list[Vectors] = []
        self._candidate: list[Vectors] = []
        self._next = 0

    def __len__(self) -> int:
        """Texts held."""
        return len(self._live)

    def add(self, live: Vectors, candidate: Vectors | None = None) -> None:
        """Keep vectors [n, dimension] of texts by the live version and, unless ``same_space``, by the new one."""
        others = live if self.same_space or candidate is None else candidate
        if not self.same_space and candidate is None:
            return
        for own, other in zip(live[:_ROWS_COMPARED], others[:_ROWS_COMPARED], strict=False):
            if len(self._live) < _MOST_TEXTS:
                self._live.append(own)
                self._candidate.append(other)
            else:
                self._live[self._next], self._candidate[self._next] = own, other
                self._next = (self._next + 1) % _MOST_TEXTS

    def compare(self, live: Vectors, candidate: Vectors) -> Compared:
        """Both versions' vectors of the same texts, [n, dimension] each."""
        live, candidate = live[:_ROWS_COMPARED], candidate[:_ROWS_COMPARED]
        cosines = 0.0
        if self.same_space:
            lengths = np.linalg.norm(live, axis=1) * np.linalg.norm(candidate, axis=1)
            cosines = float(((live * candidate).sum(axis=1) / np.maximum(lengths, 1e-12)).sum())
        count = len(live) if self.same_space else 0
        if len(self) < MIN_TEXTS:
            return Compared(0, 0.0, count, cosines)
        one, other = _nearest(live, self._live), _nearest(candidate, self._candidate)
        shares = [
            len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(one.tolist(), other.tolist(), strict=True)
        ]
        return Compared(len(live), sum(shares), count, cosines)


def _nearest(vectors: Vectors, stored: list[Vectors]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Rows of the nearest stored vectors by cosine: [n, NEIGHBOURS], unordered."""
    matrix = np.stack(stored)
    matrix = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    # Queries need no normalising: their length does not change the order.
    return np.argpartition(-(vectors @ matrix.T), NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]


# Two versions of the model behind one endpoint: who answers which request, and what is seen of both. No Ray here.
#
# The live version answers unless a trial is on. A trial sends a share of requests to the new version, or a copy of each
# (shadow), and fills a ``Window``. Whatever the new version fails at, the live one answers, so a bad version costs time
# and no answers. A trial ends by itself when nobody renews it: the command that watches it may have died.


_MOST_SECONDS = 4096  # answers whose time is kept, of each version
_MOST_COPIES = 4  # in flight; a request beyond them is not copied
_NO_ROOM = ("overloaded", "model_replaced")  # refusals that say nothing about the request


class TrialOrders(FrozenConfig):
    """How a new version is tried."""

    version: str  # its fingerprint
    application: str  # where its encoders run
    share: float = Field(ge=0, le=1)  # of requests that it answers
    shadow: bool = False  # it gets copies, and its answers reach nobody
    same_space: bool = True  # its vectors may be compared with the live version's
    lease_seconds: float = Field(default=20.0, gt=0)


class _Trial:
    def __init__(self, orders: TrialOrders, backend: Backend, deadline: float) -> None:
        self.orders = orders
        self.backend = backend
        self.deadline = deadline
        self.window = Window(version=orders.version)
        self.store = NeighbourStore(orders.same_space)
        self.seen = 0
        self.copies: set[asyncio.Task[None]] = set()

    def draws(self) -> bool:
        """Whether the next request goes to the new version: exactly the share, spread evenly."""
        self.seen += 1
        share = self.orders.share
        return int(self.seen * share) > int((self.seen - 1) * share)


class VersionRouter:
    """A backend over the live version's and, during a trial, the new version's."""

    def __init__(
        self, live: Backend, timeout_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Build one.

        Args:
            live: the version that answers.
            timeout_seconds: of a whole request; the new version gets half of it, so that the live one can still answer.
            clock: seconds.
        """
        self._live = live
        self._timeout = timeout_seconds / 2
        self._clock = clock
        self._trial: _Trial | None = None

    def order(self, orders: TrialOrders, backend: Backend) -> None:
        """Begin a trial, or renew and change the one that is on."""
        deadline = self._clock() + orders.lease_seconds
        if self._trial is None or self._trial.orders.version != orders.version:
            self._trial = _Trial(orders, backend, deadline)
        self._trial.orders, self._trial.deadline = orders, deadline

    def end(self) -> None:
        """Back to the live version alone."""
        self._trial = None

    def window(self) -> Window:
        """What was seen in the trial that is on; an empty one without a version where none is."""
        trial = self._current()
        return Window() if trial is None else trial.window

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        """Vectors by one of the versions, or why not; raises what the live version raises."""
        trial = self._current()
        if trial is None or job.fingerprint is not None:
            # Pinned to the live version's weights: a search of vectors that it made.
            return await self._live.encode(job)
        if not trial.orders.shadow and trial.draws():
            return await self._by_candidate(trial, job)
        started = self._clock()
        result = await self._live.encode(job)
        if not _is_full(result):
            self._seen(trial.window.live, started)
        if isinstance(result, EncodeResult):
            if trial.orders.shadow:
                self._copy(trial, self._compare_with_candidate(trial, job, result))
            else:
                trial.store.add(result.vectors)
        return result

    async def _by_candidate(self, trial: _Trial, job: EncodeJob) -> EncodeResult | Refusal:
        """The new version's answer, or, where it has none, the live one's."""
        answer = await self._ask(trial, job)
        if answer is not None and not _is_full(answer):
            self._copy(trial, self._compare_with_live(trial, job, answer))
            return answer
        started = self._clock()
        result = await self._live.encode(job)
        # That both are full says nothing about the new version, nor does a request that takes the live one longer than
        # the new one had.
        if isinstance(answer, Refusal) and not _is_full(result) and self._clock() - started <= self._timeout:
            self._failed(trial.window, answer.message)
        return result

    async def tokenize(self, job: EncodeJob) -> TokenizeResult | Refusal:
        """Token ids by the live version."""
        return await self._live.tokenize(job)

    async def describe(self) -> ModelInfo:
        """The live version."""
        return await self._live.describe()

    async def replicas(self) -> int:
        """The live version's encoders that are up."""
        return await self._live.replicas()

    def _current(self) -> _Trial | None:
        if self._trial is not None and self._clock() > self._trial.deadline:
            self._trial = None
        return self._trial

    def _seen(self, side: Side, started: float) -> None:
        side.requests += 1
        if len(side.seconds) >= _MOST_SECONDS:
            del side.seconds[: _MOST_SECONDS // 2]
        side.seconds.append(self._clock() - started)

    def _failed(self, window: Window, why: str) -> None:
        window.last_error = why
        window.candidate.requests += 1
        window.candidate.errors += 1

    async def _ask(self, trial: _Trial, job: EncodeJob) -> EncodeResult | Refusal | None:
        """The new version's answer, or None where it failed; that it is full is for the caller to judge."""
        started = self._clock()
        # It is told its own half of the time, so that it refuses at once what it could not do within it.
        own = replace(job, deadline=time.time() + self._timeout)
        try:
            answer = await asyncio.wait_for(trial.backend.encode(own), self._timeout)
        except (
            Exception
        ) as error:  # whatever is wrong with the new version, it is what a trial is there to find
            self._failed(trial.window, f"{type(error).__name__}: {error}"[:300])
            return None
        if not _is_full(answer):
            self._seen(trial.window.candidate, started)
        return answer

    def _copy(self, trial: _Trial, work: Coroutine[Any, Any, None]) -> None:
        if len(trial.copies) >= _MOST_COPIES:
            work.close()
            return
        task = asyncio.ensure_future(work)
        trial.copies.add(task)
        task.add_done_callback(trial.copies.discard)

    async def _compare_with_live(self, trial: _Trial, job: EncodeJob, answer: EncodeResult | Refusal) -> None:
        if not isinstance(answer, EncodeResult):
            return
        try:
            live = await self._live.encode(job)
        except Exception:  # it has its own requests to fail or not
            return
        if isinstance(live, EncodeResult):
            self._compare(trial, live, answer)

    async def _compare_with_candidate(self, trial: _Trial, job: EncodeJob, live: EncodeResult) -> None:
        # A pin says what the client's index is of; this answer meets no index.
        answer = await self._ask(trial, replace(job, contract_hash=None, fingerprint=None))
        if isinstance(answer, EncodeResult):
            self._compare(trial, live, answer)
        elif isinstance(answer, Refusal) and _is_full(answer):  # the live one had room
            self._failed(trial.window, answer.message)

    def _compare(self, trial: _Trial, live: EncodeResult, candidate: EncodeResult) -> None:
        if trial.orders.same_space and live.vectors.shape != candidate.vectors.shape:
            trial.window.candidate.errors += 1
            trial.window.last_error = (
                f"vectors {candidate.vectors.shape}, the live version's {live.vectors.shape}"
            )
            return
        found = trial.store.compare(live.vectors, candidate.vectors)
        window = trial.window
        window.compared += found.texts
        window.overlap_sum += found.overlap_sum
        window.cosines += found.cosines
        window.cosine_sum += found.cosine_sum
        trial.store.add(live.vectors, candidate.vectors)


def _is_full(answer: EncodeResult | Refusal) -> bool:
    """Whether a version had no room for a request, whatever it asks for."""
    return isinstance(answer, Refusal) and answer.code in _NO_ROOM
