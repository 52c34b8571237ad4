"""Which candidates become hard negatives: the methods of NV-Retriever (arXiv 2407.15831). Pure functions."""

import math
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from embedloom.config.mining import SelectionConfig
from embedloom.core.text import hash64

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Selection(Generic[Key]):
    """The negatives of one query, and why the other candidates are not among them."""

    ids: list[Key]
    scores: list[float]
    candidates: int = 0  # different ones looked at
    removed_as_positive: int = 0  # known positives, and documents whose text is a positive's
    removed_by_margin: int = 0  # at or above the limit
    removed_by_rank: int = 0  # method shift: too good a rank
    removed_by_floor: int = 0  # below min_score
    naive: tuple[Key, ...] = ()  # what a miner without rules would have taken
    naive_removed: int = 0  # of these, removed by rank or margin: the likely false negatives


def score_limit(positive_score: float, margin_ratio: float) -> float:
    """The score a negative must stay below: ``margin_ratio`` x the positive's score.

    Written as ``positive - |positive| (1 - margin_ratio)``, so that a negative positive score tightens the limit
    as a positive one does; the plain product would lift it above the positive itself.
    """
    return positive_score - abs(positive_score) * (1.0 - margin_ratio)


def method_limit(rules: SelectionConfig, positive_score: float) -> float:
    """The score a negative must stay below by the rules' method; infinite where the method sets none."""
    return {
        "perc_pos": score_limit(positive_score, rules.margin_ratio),
        "margin_pos": positive_score - rules.margin,
        "abs": rules.max_score,
    }.get(rules.method, math.inf)


def select_negatives(
    candidate_ids: Iterable[Key],
    candidate_scores: Iterable[float],
    positive_ids: Collection[Key],
    positive_score: float,
    rules: SelectionConfig,
    draw: int = 0,
) -> Selection[Key]:
    """The candidates that the rules make negatives of one query.

    Args:
        candidate_ids: of one query, best first; one that stands again (documents with one text may share an id)
            is passed over.
        candidate_scores: their scores; one that is not finite marks a place without a candidate.
        positive_ids: all that count as positives: those known for this query's text under any id, and the
            documents whose text equals one of theirs.
        positive_score: the lowest score of this query's known positives.
        rules: the method and its numbers; at most ``rules.negatives`` are selected, never padded.
        draw: seed of the draw if ``rules.sample_from`` is set, see ``query_seed``.
    """
    limit = method_limit(rules, positive_score)
    skipped = rules.shift if rules.method == "shift" else 0
    floor = -math.inf if rules.min_score is None else rules.min_score
    survivors: list[tuple[Key, float]] = []
    naive: list[Key] = []
    as_positive = by_margin = by_rank = by_floor = naive_removed = rank = 0
    seen: set[Key] = set()
    for candidate, score in zip(candidate_ids, candidate_scores, strict=True):
        if candidate in seen or not math.isfinite(score):
            continue
        seen.add(candidate)
        if candidate in positive_ids:
            as_positive += 1
            continue
        rank += 1
        early = rank <= rules.negatives
        if early:
            naive.append(candidate)
        if rank <= skipped:
            by_rank += 1
            naive_removed += early
        elif score >= limit:
            by_margin += 1
            naive_removed += early
        elif score < floor:
            by_floor += 1
        else:
            survivors.append((candidate, score))
    chosen = _choose(survivors, rules, draw)
    return Selection(
        [key for key, _ in chosen], [score for _, score in chosen], len(seen), as_positive, by_margin, by_rank,
        by_floor, tuple(naive), naive_removed,
    )  # fmt: skip


def _choose(survivors: list[tuple[Key, float]], rules: SelectionConfig, draw: int) -> list[tuple[Key, float]]:
    """The best, or a draw without replacement by softmax of the scores (the Gumbel top-k trick)."""
    if rules.sample_from is None:
        return survivors[: rules.negatives]
    pool = survivors[: rules.sample_from]
    logits = np.array([score for _, score in pool]) / rules.sample_temperature
    keys = logits + np.random.default_rng(draw).gumbel(size=len(pool))
    if rules.keep_best and len(pool):
        keys[0] = np.inf
    return [pool[number] for number in sorted(np.argsort(-keys, kind="stable")[: rules.negatives])]


def query_seed(query_id: str, purpose: str) -> int:
    """Seed that depends on the query alone, so that order and shards change nothing."""
    return hash64(f"{purpose}\0{query_id}")


def blend(selections: list[Selection[Key]], rules: SelectionConfig, query_id: str) -> Selection[Key]:
    """One list of negatives out of several teachers' (NV-Retriever §4.4).

    ``cross_sample``: the list of one teacher, drawn per query. ``intra_sample``: in turn the next best of every
    teacher, each document once; ``intra_sample_duplicates`` keeps those that several teachers chose. The counts are
    the first (or drawn) teacher's.
    """
    if rules.blend == "first" or len(selections) == 1:
        return selections[0]
    if rules.blend == "cross_sample":
        return selections[query_seed(query_id, "teacher") % len(selections)]
    ids: list[Key] = []
    scores: list[float] = []
    for rank in range(rules.negatives):
        for one in selections:
            fresh = rank < len(one.ids) and (
                rules.blend == "intra_sample_duplicates" or one.ids[rank] not in ids
            )
            if fresh and len(ids) < rules.negatives:
                ids.append(one.ids[rank])
                scores.append(one.scores[rank])
    first = selections[0]
    return Selection(
        ids, scores, first.candidates, first.removed_as_positive, first.removed_by_margin, first.removed_by_rank,
        first.removed_by_floor, first.naive, first.naive_removed,
    )  # fmt: skip
