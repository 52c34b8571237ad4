"""Which example comes at which step: a function of (rows, shares, seed) only.

Never of the number of workers, actors or restarts, so a resumed or resized run sees the very next example.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embedloom.errors import DataError

Indices = np.ndarray[Any, np.dtype[np.int64]]


def quotas(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Split ``total`` by shares; largest remainders first, ties by name, so the parts sum to ``total`` exactly."""
    weight = sum(shares.values())
    exact = {name: total * share / weight for name, share in shares.items()}
    parts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (parts[name] - exact[name], name))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def one_pass(datasets: Sequence[str], shares: Mapping[str, float]) -> int:
    """Most examples that keep the shares without using a row twice.

    Raises:
        DataError: a dataset with a share above zero has no rows.
    """
    wanted = {name: share for name, share in shares.items() if share > 0}
    weight = sum(wanted.values())
    sizes = {name: sum(1 for dataset in datasets if dataset == name) for name in wanted}
    for name, size in sizes.items():
        if size == 0:
            raise DataError(
                f"training.mix: {name!r} has a share of {wanted[name]:g}, but no mined example; found {sorted(set(datasets))}"
            )
    return max(1, int(min(sizes[name] * weight / share for name, share in wanted.items())))


def example_order(datasets: Sequence[str], shares: Mapping[str, float], total: int, seed: int) -> Indices:
    """Row numbers of the examples of one stage, in training order.

    Each dataset gives its exact quota, going through its rows in a fresh shuffle as often as needed; the quotas
    are then shuffled together.

    Args:
        datasets: dataset name of every row.
        shares: share per dataset; names with a share of 0 are left out.
        total: examples wanted.
        seed: the only source of randomness.

    Returns:
        int64 [total].

    Raises:
        DataError: a dataset with a share above zero has no rows.
    """
    one_pass(datasets, shares)
    rng = np.random.default_rng(seed)
    names = np.asarray(datasets)
    chosen: list[Indices] = []
    for name, quota in sorted(quotas({n: s for n, s in shares.items() if s > 0}, total).items()):
        rows = np.flatnonzero(names == name)
        passes = -(-quota // len(rows))
        chosen.append(
            np.concatenate([rng.permutation(rows) for _ in range(passes)])[:quota] if passes else rows[:0]
        )
    return rng.permutation(np.concatenate(chosen)).astype(np.int64)


def balanced_ranks(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Assign positions of a global batch to ranks so that the costs per rank are as even as a greedy pass makes them.

    Longest first to the least loaded rank (ties to the one with fewer positions, then the lower rank), so no
    rank waits for one that drew the long texts.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for position in sorted(range(len(costs)), key=lambda p: (-costs[p], p)):
        rank = min(range(world_size), key=lambda r: (loads[r], len(ranks[r]), r))
        ranks[rank].append(position)
        loads[rank] += costs[position]
    return ranks


def micro_batches(costs: Sequence[int], budget: int, count: int | None = None) -> list[list[int]]:
    """Cut one rank's positions into micro-batches of at most ``budget`` tokens, or into exactly ``count`` of them.

    A single group above the budget gets a micro-batch of its own. With ``count``, the groups are dealt out
    evenly, so ranks agree on the number of backward passes; a micro-batch may then be empty.
    """
    if count is not None:
        return balanced_ranks(costs, count)
    batches: list[list[int]] = []
    load = 0
    for position, cost in enumerate(costs):
        if batches and load + cost <= budget:
            batches[-1].append(position)
            load += cost
        else:
            batches.append([position])
            load = cost
    return batches
