"""Which candidates become hard negatives: TopK-PercPos of NV-Retriever (arXiv 2407.15831). Pure functions."""

import math
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Selection(Generic[Key]):
    """The negatives of one query, best score first, and why the other candidates are not among them."""

    ids: list[Key]
    scores: list[float]
    removed_as_positive: int  # known positives, and documents whose text is a positive's
    removed_by_margin: int  # at or above the limit
    naive: int  # candidates a miner without the margin would have taken, at most ``negatives``
    naive_removed: int  # of these, removed by the margin: the likely false negatives


def score_limit(positive_score: float, margin_ratio: float) -> float:
    """The score a negative must stay below: ``margin_ratio`` x the positive's score.

    Written as ``positive - |positive| (1 - margin_ratio)``, so that a negative positive score tightens the limit
    as a positive one does; the plain product would lift it above the positive itself.
    """
    return positive_score - abs(positive_score) * (1.0 - margin_ratio)


def select_negatives(
    candidate_ids: Iterable[Key],
    candidate_scores: Iterable[float],
    positive_ids: Collection[Key],
    positive_score: float,
    margin_ratio: float,
    negatives: int,
) -> Selection[Key]:
    """The best candidates strictly below the margin that are no positives.

    Args:
        candidate_ids: of one query, best first; one that stands again (documents with one text may share an id)
            is passed over.
        candidate_scores: their scores; one that is not finite marks a place without a candidate.
        positive_ids: all that count as positives: those known for this query's text under any id, and the
            documents whose text equals one of theirs.
        positive_score: the lowest score of this example's positives.
        margin_ratio: see ``score_limit``; 0.95 in the paper.
        negatives: at most this many are selected; fewer if fewer survive, never padded.
    """
    limit = score_limit(positive_score, margin_ratio)
    ids: list[Key] = []
    scores: list[float] = []
    as_positive = by_margin = naive = naive_removed = 0
    seen: set[Key] = set()
    for candidate, score in zip(candidate_ids, candidate_scores, strict=True):
        if candidate in seen or not math.isfinite(score):
            continue
        seen.add(candidate)
        if candidate in positive_ids:
            as_positive += 1
            continue
        naive += 1
        if score >= limit:
            by_margin += 1
            naive_removed += naive <= negatives
        elif len(ids) < negatives:
            ids.append(candidate)
            scores.append(score)
    return Selection(ids, scores, as_positive, by_margin, min(naive, negatives), naive_removed)
