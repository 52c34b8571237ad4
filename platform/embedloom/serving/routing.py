"""Which replica gets a request: of two drawn by chance, the one whose queued tokens take less time.

Ray Serve's own router draws two as well, but compares requests in hand, of which one may be a query of twenty tokens and the other a
bulk request of a hundred thousand. What a replica has queued it says with every answer; what this gateway has sent since is known
here. Several gateways need not agree: each sees in the answers what the others sent.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter

from embedloom.serving.messages import EncodeJob

_TOKENS_PER_CHARACTER = 0.3  # until a replica has counted them
_LEAST_TOKENS = 16  # of any text: its prompt and special tokens


def estimated_tokens(job: EncodeJob) -> int:
    """About how many tokens a request has, before anybody has tokenised it."""
    total = 0
    for part in job.parts:
        total += sum(map(len, part.token_ids or ()))
        total += sum(_LEAST_TOKENS + int(len(text) * _TOKENS_PER_CHARACTER) for text in part.texts or ())
    return total


@dataclass
class _Replica:
    queued: float = 0.0  # as it last said
    rate: float = 0.0  # tokens a second
    told_at: float = 0.0
    sent: dict[str, tuple[float, int]] = field(default_factory=dict)  # requests in hand: when sent, tokens


class TokenBoard:
    """What one gateway knows of the replicas' queues. Serve's router asks from a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._replicas: dict[str, _Replica] = {}

    def told(self, replica: str, queued: float, rate: float) -> None:
        """A replica said what waits there, and how fast it is."""
        with self._lock:
            one = self._replicas.setdefault(replica, _Replica())
            one.queued, one.rate, one.told_at = queued, rate, self._clock()

    def sent(self, replica: str, request: str, tokens: int) -> None:
        """A request was sent to a replica."""
        with self._lock:
            self._replicas.setdefault(replica, _Replica()).sent[request] = self._clock(), tokens

    def done(self, replica: str, request: str) -> None:
        """A request is answered, or failed."""
        with self._lock:
            if replica in self._replicas:
                self._replicas[replica].sent.pop(request, None)

    def keep(self, replicas: set[str]) -> None:
        """Forget all others."""
        with self._lock:
            self._replicas = {name: one for name, one in self._replicas.items() if name in replicas}

    def seconds(self, replica: str) -> float:
        """How long what waits at a replica takes; of one whose rate is not known, its tokens; 0 of one that is not known."""
        with self._lock:
            one = self._replicas.get(replica)
            if one is None:
                return 0.0
            left = max(0.0, one.queued - one.rate * (self._clock() - one.told_at))
            later = sum(tokens for sent_at, tokens in one.sent.values() if sent_at >= one.told_at)
            return (left + later) / (one.rate or 1.0)


_boards: dict[tuple[str, str], TokenBoard] = {}


def board_of(application: str, deployment: str) -> TokenBoard:
    """The board of one model's encoders in this process, shared by whoever hears answers and whoever routes."""
    return _boards.setdefault((application, deployment), TokenBoard())


class QueuedTokensRouter(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):
    """Serve's request router over ``TokenBoard``; Serve sends the class by value, so it looks the board up by import."""

    def _board(self) -> Any:
        from embedloom.serving import routing

        return routing.board_of(self._deployment_id.app_name, self._deployment_id.name)

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Two replicas by chance, the less busy first; the second takes the request where the first has no room."""
        near = tuple(self.apply_locality_routing(pending_request=pending_request))
        board = self._board()
        drawn = random.sample(near, min(2, len(near)))
        return [[self._replicas[one]] for one in sorted(drawn, key=lambda one: board.seconds(one.unique_id))]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """A replica took a request."""
        from embedloom.serving.messages import EncodeJob
        from embedloom.serving.routing import estimated_tokens

        job = pending_request.args[0] if pending_request.args else None
        if isinstance(job, EncodeJob):
            request = pending_request.metadata.internal_request_id
            self._board().sent(replica_id.unique_id, request, estimated_tokens(job))

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """A request is over."""
        self._board().done(replica_id.unique_id, internal_request_id)

    def update_replicas(self, replicas: list[Any]) -> None:
        """Serve says which replicas there are."""
        super().update_replicas(replicas)
        self._board().keep({one.replica_id.unique_id for one in replicas})
