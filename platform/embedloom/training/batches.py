"""How a global batch is shared out: to ranks by cost, then to micro-batches by tokens. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

from embedloom.training.groups import compute_cost
from embedloom.training.order import balanced_ranks, imbalance, micro_batches


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Positions in a global batch, by rank and micro-batch; each position stands in exactly one."""

    ranks: list[list[list[int]]]
    imbalance: float  # share of its time that the average rank waits for the slowest, by cost

    @property
    def counts(self) -> list[int]:
        """Queries of each rank."""
        return [sum(map(len, own)) for own in self.ranks]


def plan_batch(
    lengths: Sequence[Sequence[int]], world_size: int, micro_batch_tokens: int, hidden_size: int
) -> BatchPlan:
    """Share out a global batch; every worker computes the same plan from the same lengths.

    Args:
        lengths: tokens of every text of each query's group.
        world_size: ranks.
        micro_batch_tokens: tokens a forward may hold; a larger group gets a forward of its own.
        hidden_size: of the model, for the cost of attention.

    Returns:
        The plan; every rank has the same number of micro-batches, some may be empty.
    """
    costs = [compute_cost(own, hidden_size) for own in lengths]
    tokens = [sum(own) for own in lengths]
    ranks = balanced_ranks(costs, world_size)
    count = max(1, *(len(micro_batches([tokens[p] for p in own], micro_batch_tokens)) for own in ranks))
    cut = [
        [
            [own[at] for at in part]
            for part in micro_batches([tokens[p] for p in own], micro_batch_tokens, count)
        ]
        for own in ranks
    ]
    return BatchPlan(cut, imbalance(costs, ranks))
