"""Forward and backward of one worker's share of a global batch, for losses of a query alone and of the whole batch.

A loss over the whole batch needs every vector before the first backward. Where a worker's share does not fit into one
micro-batch, gradients are cached (GradCache, arXiv 2101.06983): all micro-batches go forward without a graph, the loss
gives the gradient of every vector, and each micro-batch goes forward again to carry its vectors' gradients back. The
result is that of one large micro-batch; memory is that of a small one, and the price is one more forward, a third of
a step (a backward costs two).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from embedloom.training.gather import gather_groups
from embedloom.training.groups import Group
from embedloom.training.losses import Objective
from embedloom.training.losses.vectors import VectorGroups, joined_keys
from embedloom.training.module import vector_groups

MicroBatches = Sequence[list[Group]]  # of one worker; an empty one keeps it in step with the others


class GradientPass:
    """Accumulates gradients of the mean loss of a global batch in a DeepSpeed engine."""

    def __init__(self, engine: Any, objective: Objective, rank: int, world_size: int) -> None:
        self._engine = engine
        self._objective = objective
        self._rank = rank
        self._scale = float(world_size)

    def run(self, micro_batches: MicroBatches, counts: Sequence[int], filler: list[Group]) -> Tensor:
        """Gradients of the mean loss over the global batch; returns this worker's losses, in order of its groups.

        Each query weighs 1 / global batch whatever worker and micro-batch it fell into: DeepSpeed averages gradients
        over workers, so they are scaled by their number.

        Args:
            micro_batches: this worker's groups; every worker has the same number of micro-batches.
            counts: queries of each worker.
            filler: a group to run where a micro-batch is empty, with weight 0: all workers must take part in the
                collective calls.
        """
        weight = self._scale / sum(counts)
        if self._objective.needs == "nothing":
            return self._alone(micro_batches, filler, weight)
        if len(micro_batches) == 1:
            return self._whole(micro_batches[0], counts, filler, weight)
        return self._cached(micro_batches, counts, filler, weight)

    def _alone(self, micro_batches: MicroBatches, filler: list[Group], weight: float) -> Tensor:
        """Micro-batch by micro-batch, for a loss that needs no other query."""
        losses: list[Tensor] = []
        for number, groups in enumerate(micro_batches):
            vectors = self._forward(groups or filler)
            own = self._objective(vectors, vectors, 0)
            self._backward(own.sum() * (weight if groups else 0.0), number == len(micro_batches) - 1)
            losses += [own.detach()] if groups else []
        return torch.cat(losses) if losses else torch.empty(0)

    def _whole(
        self, groups: list[Group], counts: Sequence[int], filler: list[Group], weight: float
    ) -> Tensor:
        """One micro-batch a worker: backward goes through the exchange of vectors."""
        vectors = self._forward(groups or filler)
        own = vectors if groups else vectors.rows(slice(0, 0))
        losses = self._losses(own, counts)
        # The zero keeps a worker without groups in the graph.
        self._backward(losses.sum() * weight + vectors.queries.sum() * 0.0, True)
        return losses.detach()

    def _cached(
        self, micro_batches: MicroBatches, counts: Sequence[int], filler: list[Group], weight: float
    ) -> Tensor:
        states = []
        parts: list[VectorGroups] = []
        for groups in micro_batches:
            states.append(_random_state())
            with torch.no_grad():
                vectors = self._forward(groups or filler)
            parts.append(vectors if groups else vectors.rows(slice(0, 0)))
        queries = torch.cat([part.queries for part in parts]).requires_grad_()
        documents = torch.cat([part.documents for part in parts]).requires_grad_()
        own = VectorGroups(
            queries,
            documents,
            torch.cat([part.query_keys for part in parts]),
            torch.cat([part.document_keys for part in parts]),
            joined_keys([part.rights for part in parts]),
        )
        losses = self._losses(own, counts)
        of_queries, of_documents = torch.autograd.grad(losses.sum() * weight, (queries, documents))
        done = 0
        for number, (groups, state) in enumerate(zip(micro_batches, states, strict=True)):
            with _replayed(state):
                vectors = self._forward(groups or filler)
            span = slice(done, done + len(groups))
            done += len(groups)
            if groups:
                carried = (vectors.queries * of_queries[span]).sum()
                carried = carried + (vectors.documents * of_documents[span]).sum()
            else:
                carried = vectors.queries.sum() * 0.0
            self._backward(carried, number == len(micro_batches) - 1)
        return losses.detach()

    def _losses(self, own: VectorGroups, counts: Sequence[int]) -> Tensor:
        batch, first = gather_groups(self._objective.shared_part(own), counts, self._rank)
        return self._objective(own, batch, first)

    def _forward(self, groups: list[Group]) -> VectorGroups:
        queries, documents = self._engine(groups)
        return vector_groups(groups, queries, documents)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


@contextmanager
def _replayed(state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """Random numbers as they were, so that dropout repeats itself; then those of before again."""
    before = _random_state()
    _restore(state)
    try:
        yield
    finally:
        _restore(before)


def _restore(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
