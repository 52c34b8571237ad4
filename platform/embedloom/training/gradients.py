"""Forward and backward of one worker: texts to vectors, the vectors of all workers, and gradients back to where each was made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedloom.encoder.model import Encoder, token_budget_batches
from embedloom.encoder.pairs import PairEncoder
from embedloom.training.data import Group, Teaching
from embedloom.training.losses import (
    Objective,
    TeacherScores,
    VectorGroups,
    joined_keys,
    key_tensor,
    padded_keys,
    text_key,
)

# The part that DeepSpeed wraps: groups of token ids in, vectors out.


# Without packing, a micro-batch goes through the backbone in this many length-sorted pieces or a few more: enough to lose most
# padding, few enough to keep the matrix products large.
_PIECES = 4


class ContrastiveModule(nn.Module):
    """Backbone + pooling of one micro-batch, in one forward so ZeRO's hooks see it whole."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.backbone = encoder.backbone
        self._encoder = encoder

    def forward(self, groups: list[Group]) -> tuple[Tensor, Tensor]:
        """Queries [b, d] and documents [b, 1 + k, d]; all groups have the same number of documents."""
        texts = [group.query for group in groups] + [
            document for group in groups for document in group.documents
        ]
        vectors = in_pieces(self._encoder, texts)
        return vectors[: len(groups)], vectors[len(groups) :].view(len(groups), -1, vectors.shape[1])


def in_pieces(encoder: Encoder, texts: list[list[int]]) -> Tensor:
    """Vectors of the texts of one micro-batch, in order: [texts, d]."""
    if encoder.packed:
        return encoder.forward(texts)
    lengths = [len(text) for text in texts]
    batches = token_budget_batches(lengths, max(max(lengths), sum(lengths) // _PIECES))
    parts = [encoder.forward([texts[position] for position in batch]) for batch in batches]
    order = torch.tensor([position for batch in batches for position in batch], device=parts[0].device)
    return torch.cat(parts)[torch.argsort(order)]


class PairModule(nn.Module):
    """A reranker on one micro-batch: every document of a group with its query, whose logits are vectors of one dimension."""

    def __init__(self, encoder: PairEncoder) -> None:
        super().__init__()
        self.model = encoder.model
        self._encoder = encoder

    def forward(self, groups: list[Group]) -> tuple[Tensor, Tensor]:
        """Ones [b, 1] and logits [b, 1 + k, 1], so that a similarity is a logit; all groups have as many documents."""
        template = self._encoder.pairs
        pairs = []
        for group in groups:
            query = template.bare(group.query)
            pairs += [template.pair(query, template.bare(document)) for document in group.documents]
        logits = in_pieces(self._encoder, pairs)
        return logits.new_ones(len(groups), 1), logits.view(len(groups), -1, 1)


def vector_groups(groups: list[Group], queries: Tensor, documents: Tensor) -> VectorGroups:
    """Vectors of groups together with the keys of their texts."""
    return VectorGroups(
        queries,
        documents,
        key_tensor([_query_key(group) for group in groups], queries.device),
        key_tensor([_document_keys(group) for group in groups], queries.device),
        padded_keys([group.right_keys or _document_keys(group)[:1] for group in groups], queries.device),
        _teacher_scores([group.teaching for group in groups], queries.device),
    )


def _teacher_scores(rows: Sequence[Teaching | None], device: torch.device) -> TeacherScores | None:
    """What a teacher says of all groups' documents; None where no group has a teacher."""
    taught = [row for row in rows if row is not None]
    if not taught:
        return None
    return TeacherScores(
        torch.tensor([row.scores for row in taught], device=device),
        torch.tensor([row.temperature for row in taught], device=device),
        torch.tensor([row.weight for row in taught], device=device),
    )


def _query_key(group: Group) -> int:
    return text_key(group.query) if group.query_key is None else group.query_key


def _document_keys(group: Group) -> list[int]:
    return (
        [text_key(text) for text in group.documents] if group.document_keys is None else group.document_keys
    )


# Vectors of all workers on every worker, with gradients that flow back to where a vector was made.


class _AllGather(torch.autograd.Function):
    """all_gather of parts of different lengths; backward sums the gradients that all workers have for a part.

    ``torch.distributed.nn.all_gather`` needs equal lengths, which balanced ranks do not have.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
        ctx.start, ctx.rows = sum(counts[:rank]), counts[rank]
        padded = local.new_zeros((max(counts), *local.shape[1:]))
        padded[: local.shape[0]] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows], None, None


def all_gather(local: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """The rows of all workers, in the order of their ranks.

    Every worker must call it, and must call backward on what it makes of the result, even where that has weight 0:
    both directions are collective.

    Args:
        local: this worker's rows [counts[rank], ...].
        counts: rows of each worker.
        rank: this worker.

    Returns:
        [sum(counts), ...]. Its gradient arrives at ``local`` summed over all workers, as if one process had
        computed the sum of all workers' losses.
    """
    gathered: Tensor = _AllGather.apply(local, tuple(counts), rank)
    return gathered


def gather_groups(own: VectorGroups, counts: Sequence[int], rank: int) -> tuple[VectorGroups, int]:
    """The groups of all workers in the order of their ranks, and where this worker's own begin."""
    if len(counts) == 1:
        return own, 0
    return VectorGroups(
        all_gather(own.queries, counts, rank),
        all_gather(own.documents, counts, rank),
        all_gather(own.query_keys, counts, rank),
        all_gather(own.document_keys, counts, rank),
    ), sum(counts[:rank])


# Forward and backward of one worker's share of a global batch, for losses of a query alone and of the whole batch.
#
# A loss over the whole batch needs every vector before the first backward. Where a worker's share does not fit into one
# micro-batch, gradients are cached (GradCache, arXiv 2101.06983): all micro-batches go forward without a graph, the loss
# gives the gradient of every vector, and each micro-batch goes forward again to carry its vectors' gradients back. The
# result is that of one large micro-batch; memory is that of a small one, and the price is one more forward, a third of
# a step (a backward costs two).


class StepReduction:
    """One reduction over workers a step, by DeepSpeed's ``coalesce_grad_reduction``: each worker sums its micro-batches' own.

    ZeRO-2 and 3 otherwise reduce every gradient after every micro-batch, as each worker keeps a part of it only. Here a
    step's whole gradient stays on each worker until its end.

    Args:
        engine: a DeepSpeed engine of ZeRO stage 2 or 3.
        in_float32: whether gradients of bfloat16 weights are summed in float32, which autograd does not do; not for ZeRO-3,
            whose weights are not whole between two passes.
    """

    def __init__(self, engine: Any, in_float32: bool) -> None:
        self._engine = engine
        self._sums: dict[Tensor, Tensor] = {}
        self._is_open = False
        for weight in engine.module.parameters() if in_float32 else ():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._add)

    @contextmanager
    def step(self, passes: int) -> Iterator[None]:
        """All backward passes of one step; the reduction comes at its end.

        A single pass is reduced as it goes: once anyway, and while it still computes.
        """
        if passes == 1:
            yield
            return
        self._is_open = True
        try:
            with self._engine.coalesce_grad_reduction():
                yield
                while self._sums:
                    weight, total = self._sums.popitem()
                    weight.grad = total.to(weight.dtype)
        finally:
            self._is_open = False
            self._sums.clear()

    def _add(self, weight: Tensor) -> None:
        """Take a weight's gradient over as soon as a backward pass has it, so that no pass keeps its own beside the sums."""
        if self._is_open and weight.grad is not None:
            known = self._sums.get(weight)
            self._sums[weight] = weight.grad.float() if known is None else known.add_(weight.grad)
            weight.grad = None


MicroBatches = Sequence[list[Group]]  # of one worker; an empty one keeps it in step with the others


class GradientPass:
    """Accumulates gradients of the mean loss of a global batch in a DeepSpeed engine."""

    def __init__(
        self,
        engine: Any,
        objective: Objective,
        rank: int,
        world_size: int,
        reduction: StepReduction | None = None,
    ) -> None:
        self._engine = engine
        self._reduction = reduction  # None: as the engine reduces
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
        with self._reduction.step(len(micro_batches)) if self._reduction is not None else nullcontext():
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
            TeacherScores.joined([part.teacher for part in parts]),
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
