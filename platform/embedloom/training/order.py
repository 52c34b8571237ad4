"""What comes at which step: the example, its rank and micro-batch, and the learning rate."""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedloom.config.training import TrainingConfig, TrainingSource, TrainingStage
from embedloom.core.apportionment import largest_remainder
from embedloom.core.text import hash64
from embedloom.errors import DataError
from embedloom.training.data import ExampleStore, Group, compute_cost

# Which example comes at which step: a function of the sources, the seed and the epoch only.
#
# Never of the number of workers, actors or restarts, so a resumed or resized run sees the very next example.


Indices = np.ndarray[Any, np.dtype[np.int64]]


def quotas(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Split ``total`` by shares; largest remainders first, ties by name, so the parts sum to ``total`` exactly."""
    weight = sum(shares.values())
    names = sorted(shares)
    parts = largest_remainder([total * shares[name] / weight for name in names], total)
    return dict(zip(names, parts, strict=True))


@dataclass(frozen=True, slots=True)
class Share:
    """One source's part of an epoch."""

    name: str
    first_row: int
    rows: int
    weight: float | None = None  # all sources have one, or none
    cap: int | None = None


class ExampleOrder:
    """Rows in training order, epoch after epoch; the next step's rows follow from the number of examples seen.

    An epoch holds a fixed number of rows of every source. With weights, that is the longest pass that keeps the shares
    without using a row twice; else every source's cap, or all its rows. A source goes through its rows in one shuffle
    after another, so none comes again before all were used, across epochs too; an epoch mixes all sources.

    With ``batch``, a batch that spans two epochs holds no row twice: rows of the second that were in the tail of the first
    change places with later ones, where an epoch has at least two batches. Nothing else moves.

    Costs 8 bytes of memory a row of an epoch and of each source, a second for ten million rows.
    """

    def __init__(self, shares: Sequence[Share], seed: int, batch: int | None = None) -> None:
        if not shares:
            raise DataError("training: no source to train on")
        self._shares = sorted(shares, key=lambda share: share.name)
        self._seed = seed
        self._batch = batch
        for share in self._shares:
            if share.rows == 0:
                raise DataError(f"training source {share.name!r} has no example")
            if share.cap is not None and share.cap > share.rows:
                raise DataError(
                    f"training source {share.name!r}: cap is {share.cap:,}, but it has {share.rows:,} examples"
                )
        self._quotas = self._epoch_quotas()
        self.epoch_size = sum(self._quotas.values())
        self._passes: dict[str, tuple[int, Indices]] = {}
        self._epochs: dict[int, Indices] = {}

    def window(self, start: int, stop: int) -> Indices:
        """Rows of the examples number ``start`` to ``stop``, counted from the first of epoch 0; int64 [stop - start]."""
        parts = []
        for epoch in range(start // self.epoch_size, (max(start, stop - 1)) // self.epoch_size + 1):
            offset = epoch * self.epoch_size
            parts.append(self.epoch(epoch)[max(0, start - offset) : max(0, stop - offset)])
        return np.concatenate(parts)

    def epoch(self, number: int) -> Indices:
        """All rows of one epoch: a function of (seed, number) and the sources only; int64 [epoch_size]."""
        if number not in self._epochs:
            order = self._shuffled(number)
            if self._batch is not None and number > 0:
                self._part_from_tail(order, number, self._batch)
            # A batch may span two epochs; older ones never come back.
            self._epochs = {key: value for key, value in self._epochs.items() if key == number - 1}
            self._epochs[number] = order
        return self._epochs[number]

    def _shuffled(self, number: int) -> Indices:
        chosen = [self._draws(share, number) for share in self._shares]
        rng = np.random.default_rng([self._seed, number])
        return rng.permutation(np.concatenate(chosen)).astype(np.int64)

    def _part_from_tail(self, order: Indices, number: int, batch: int) -> None:
        """Move rows out of the first batch of an epoch that began in the one before and has them already."""
        carried = number * self.epoch_size % batch
        needed = batch - carried
        # The last batch of an epoch stays as it is, so what the next one must avoid follows without looking back.
        last = self.epoch_size - batch
        if not carried or last < needed:
            return
        before = self._epochs[number - 1] if number - 1 in self._epochs else self._shuffled(number - 1)
        tail = before[-carried:]
        twice = np.flatnonzero(np.isin(order[:needed], tail))
        fresh = needed + np.flatnonzero(~np.isin(order[needed:last], tail))
        pairs = min(len(twice), len(fresh))
        here, there = twice[:pairs], fresh[:pairs]
        order[here], order[there] = order[there], order[here]

    def drawn(self, examples: int) -> dict[str, int]:
        """How many of the first ``examples`` come from each source."""
        epochs, rest = divmod(examples, self.epoch_size)
        begun = self.epoch(epochs)[:rest] if rest else np.empty(0, dtype=np.int64)
        found = {}
        for share in self._shares:
            inside = (begun >= share.first_row) & (begun < share.first_row + share.rows)
            found[share.name] = epochs * self._quotas[share.name] + int(inside.sum())
        return found

    def _epoch_quotas(self) -> dict[str, int]:
        if self._shares[0].weight is None:
            return {share.name: share.cap or share.rows for share in self._shares}
        weights = {share.name: share.weight or 0.0 for share in self._shares}
        total = sum(weights.values())
        size = max(1, int(min(share.rows * total / weights[share.name] for share in self._shares)))
        return quotas(weights, size)

    def _draws(self, share: Share, epoch: int) -> Indices:
        """The rows of one source in one epoch: the next stretch of its endless series of shuffles."""
        quota = self._quotas[share.name]
        size = share.rows if share.weight is not None else quota
        start, stop = epoch * quota, (epoch + 1) * quota
        parts = [
            self._shuffle(share, number, size)[max(0, start - number * size) : max(0, stop - number * size)]
            for number in range(start // size, -(-stop // size))
        ]
        rows: Indices = np.concatenate([np.empty(0, dtype=np.int64), *parts]) + share.first_row
        return rows

    def _shuffle(self, share: Share, number: int, size: int) -> Indices:
        """Shuffle ``number`` of the source's rows, or of those that its cap leaves."""
        known = self._passes.get(share.name)
        if known is not None and known[0] == number:
            return known[1]
        key = hash64(share.name)
        rows = np.arange(share.rows)
        if size < share.rows:
            rows = np.random.default_rng([self._seed, key]).permutation(share.rows)[:size]
        shuffled: Indices = np.random.default_rng([self._seed, key, number]).permutation(rows)
        self._passes[share.name] = (number, shuffled)
        return shuffled


def balanced_ranks(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Assign positions of a global batch to ranks so that the costs per rank are as even as a greedy pass makes them.

    Longest first to the least loaded rank (ties to the one with fewer positions, then the lower rank), so no
    rank waits for one that drew the long texts. At most 4/3 - 1/(3 ranks) of the best possible (Graham 1969).
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, 0, rank) for rank in range(world_size)]
    for position in sorted(range(len(costs)), key=lambda p: (-costs[p], p)):
        load, count, rank = heapq.heappop(loads)
        ranks[rank].append(position)
        heapq.heappush(loads, (load + costs[position], count + 1, rank))
    return ranks


def imbalance(costs: Sequence[float], ranks: Sequence[Sequence[int]]) -> float:
    """Share of its time that the average rank waits for the slowest: 1 - mean load / largest load, 0 to 1."""
    loads = [sum(costs[position] for position in own) for own in ranks]
    return 1 - sum(loads) / (len(loads) * max(loads)) if max(loads) > 0 else 0.0


def micro_batches(costs: Sequence[float], budget: int, count: int | None = None) -> list[list[int]]:
    """Cut one rank's positions into micro-batches of at most ``budget`` tokens, or into exactly ``count`` of them.

    A single group above the budget gets a micro-batch of its own. With ``count``, the groups are dealt out
    evenly, so ranks agree on the number of backward passes; a micro-batch may then be empty.
    """
    if count is not None:
        return balanced_ranks(costs, count)
    batches: list[list[int]] = []
    load = 0.0
    for position, cost in enumerate(costs):
        if batches and load + cost <= budget:
            batches[-1].append(position)
            load += cost
        else:
            batches.append([position])
            load = cost
    return batches


# How a global batch is shared out: to ranks by cost, then to micro-batches by tokens. Pure functions.


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


# Learning rate as a function of the step.


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str) -> float:
    """Learning rate of optimizer step ``step`` (0-based).

    Linear warm-up over ``warmup_steps``, then ``linear`` or ``cosine`` decay to 0 at ``total_steps``, or
    ``constant`` (arXiv 2511.07025 Table 8: linear, 100 warm-up steps).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_warnings(stage: TrainingStage, steps: int, epoch_size: int) -> list[str]:
    """What a stage's numbers lead to that nobody wants: a peak that is never reached, batches that repeat rows.

    Args:
        stage: its settings.
        steps: optimizer steps that it takes.
        epoch_size: different rows that an epoch has.
    """
    found = []
    if stage.warmup_steps > steps:
        found.append(
            f"warmup_steps is {stage.warmup_steps}, but the stage has {steps} steps, so it ends at "
            f"{steps / stage.warmup_steps:.0%} of learning_rate {stage.learning_rate:g}; give fewer, or more steps"
        )
    if stage.global_batch > epoch_size:
        found.append(
            f"global_batch is {stage.global_batch}, but an epoch has {epoch_size} different rows, so a batch holds rows "
            f"up to {math.ceil(stage.global_batch / epoch_size)} times; no loss compares them with each other"
        )
    return found


def steps_of(stage: TrainingStage, order: ExampleOrder) -> int:
    """Optimizer steps of a stage."""
    return stage.max_steps or max(1, math.ceil(order.epoch_size * stage.epochs / stage.global_batch))


def shares_of(sources: tuple[TrainingSource, ...], store: ExampleStore) -> list[Share]:
    """The sources' parts of an epoch, with the rows they turned out to have."""
    return [Share(s.name, store.first_row(s.name), store.sizes[s.name], s.weight, s.cap) for s in sources]


def order_of(
    config: TrainingConfig,
    stage: TrainingStage,
    sources: tuple[TrainingSource, ...],
    store: ExampleStore,
    seed: int,
) -> ExampleOrder:
    """The order of a stage's examples; where a loss looks at the whole batch, no batch holds a row twice if it need not."""
    batch = None if config.loss == "infonce" else stage.global_batch
    return ExampleOrder(shares_of(sources, store), seed, batch)


# What a worker needs for a step, read while it computes the one before.


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rows of one global batch and what one rank computes of them."""

    rows: list[int]
    lengths: list[list[int]]  # tokens of every text of every row
    plan: BatchPlan
    own: list[list[Group]]  # the rank's groups, by micro-batch
    first: list[Group]  # of the batch's first row, for ranks that have none


class BatchReader:
    """One rank's batches by step; the next one is read in a thread once a step's was handed out.

    Reading maps files and turns pages into lists, which on a network file system took 1 to 2 s of a step. One thread reads
    everything, in the order of asking, so it sees order and store alone.
    """

    def __init__(
        self,
        order: ExampleOrder,
        store: ExampleStore,
        batch: int,
        steps: int,
        rank: int,
        world_size: int,
        micro_batch_tokens: int,
        hidden_size: int,
        seen: Callable[[list[int]], list[int]] = list,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            order: of the stage's examples.
            store: their rows.
            batch: queries of a global batch.
            steps: of the stage; nothing beyond them is read ahead.
            rank: of this worker.
            world_size: workers.
            micro_batch_tokens: tokens a forward may hold.
            hidden_size: of the model, see ``plan_batch``.
            seen: tokens of what the model computes of a row, by those of its texts.
        """
        self._seen = seen
        self._order, self._store = order, store
        self._batch, self._steps = batch, steps
        self._rank, self._world_size = rank, world_size
        self._micro_batch_tokens, self._hidden_size = micro_batch_tokens, hidden_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[StepBatch]] | None = None

    def step(self, number: int) -> StepBatch:
        """The batch of a 0-based step. What went wrong in reading it ahead is raised here."""
        ahead, self._ahead = self._ahead, None
        # Another step than the one after the last: the run goes on from a checkpoint.
        reading = ahead[1] if ahead and ahead[0] == number else self._thread.submit(self._read, number)
        found = reading.result()
        if number + 1 < self._steps:
            self._ahead = number + 1, self._thread.submit(self._read, number + 1)
        return found

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, number: int) -> StepBatch:
        rows = self._order.window(number * self._batch, (number + 1) * self._batch).tolist()
        lengths = [self._seen(own) for own in self._store.lengths(rows)]
        plan = plan_batch(lengths, self._world_size, self._micro_batch_tokens, self._hidden_size)
        own = [self._store.groups([rows[position] for position in part]) for part in plan.ranks[self._rank]]
        return StepBatch(rows, lengths, plan, own, self._store.groups(rows[:1]))
