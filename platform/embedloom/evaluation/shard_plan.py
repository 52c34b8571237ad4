"""Who embeds which text: every distinct text of a model belongs to the first part of a task that has it.

The plan follows from the tasks alone, not from what is finished, so batches, and with them the last bits of the
vectors, are the same in a run that was killed ten times and in one that was not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.vector_store import Keys, shard_id
from embedloom.retrieval.scan import first_of_equals

Rows = np.ndarray[Any, np.dtype[np.int64]]
Part = tuple[TaskSpec, str | None]  # a task and one of its subsets, or None for all


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """Some texts of one part of a task."""

    id: str
    part: Part
    rows: Rows  # positions in the part's list of distinct texts


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All shards, and the ones that each part needs before it can be scored."""

    shards: list[Shard] = field(default_factory=list)
    needs: dict[Part, tuple[str, ...]] = field(default_factory=dict)


def plan_shards(keys: Mapping[Part, Keys], shard_texts: int) -> ShardPlan:
    """Cut the texts of all parts into shards of at most ``shard_texts``, no text in two of them.

    Args:
        keys: of each part's distinct texts, uint64 [texts, 2]; parts in the order in which they own texts.
        shard_texts: largest shard.
    """
    plan = ShardPlan()
    parts = list(keys)
    if not parts:
        return plan
    sizes = [len(keys[part]) for part in parts]
    owner = first_of_equals(np.concatenate([keys[part] for part in parts]))
    shard_of = np.full(len(owner), -1, dtype=np.int64)
    starts = np.cumsum([0, *sizes[:-1]])
    for part, start, size in zip(parts, starts, sizes, strict=True):
        own = np.flatnonzero(owner[start : start + size] == np.arange(start, start + size))
        for low in range(0, len(own), shard_texts):
            rows = own[low : low + shard_texts]
            shard_of[start + rows] = len(plan.shards)
            plan.shards.append(Shard(shard_id(keys[part][rows]), part, rows))
    for part, start, size in zip(parts, starts, sizes, strict=True):
        numbers: Sequence[int] = np.unique(shard_of[owner[start : start + size]]).tolist()
        plan.needs[part] = tuple(plan.shards[number].id for number in numbers)
    return plan
