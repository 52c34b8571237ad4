"""One ranking of two: a weighted sum of scores, whose weight can be tuned on judged queries, or reciprocal rank fusion."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from embedloom.retrieval.search import Positions

Scores = np.ndarray[Any, np.dtype[np.float64]]

RANK_CONSTANT = 60  # Cormack, Clarke and Büttcher (SIGIR 2009), who found it to matter little
USUAL_WEIGHT = 0.75  # best mean of the dev splits of three tasks, docs/how-to/search.md
WEIGHTS = tuple(step / 20 for step in range(21))  # that are tried


class Ranked(NamedTuple):
    """Rows of documents, best first, and what each scored: [n] both."""

    rows: Positions
    scores: Any  # any float type


def reciprocal_rank(rankings: Sequence[Ranked], constant: float = RANK_CONSTANT) -> Ranked:
    """Every document by the sum of 1 / (constant + rank) over the rankings it stands in, ranks from 1.

    Source: Cormack, Clarke and Büttcher, Reciprocal Rank Fusion outperforms Condorcet and individual rank learning
    methods, SIGIR 2009. Of equal sums the lower row comes first.

    Args:
        rankings: of one query; scores do not count.
        constant: the larger, the less the first places tell.
    """
    return _summed(
        [ranking.rows for ranking in rankings],
        [1 / (constant + np.arange(1, len(ranking.rows) + 1)) for ranking in rankings],
    )


class Candidates(NamedTuple):
    """Documents that either of two rankings of one query nominates, with both scores of each.

    Attributes:
        rows: ascending: [n].
        dense: scores by vectors: [n].
        lexical: scores by words, 0 where none of the query stands: [n].
        floor: the least that a dense score can be: -1 of cosines.
    """

    rows: Positions
    dense: Any
    lexical: Any
    floor: float

    @classmethod
    def of(
        cls,
        dense: Ranked,
        lexical: Ranked,
        dense_scores: Callable[[Positions], Any],
        lexical_scores: Callable[[Positions], Any],
        floor: float | None = -1.0,
    ) -> "Candidates":
        """The documents of two rankings; what one of them lacks is scored.

        Args:
            dense: by vectors.
            lexical: by words.
            dense_scores: of rows that the dense ranking lacks.
            lexical_scores: of any rows.
            floor: the least that a dense score can be; None, of inner products that have no least: the candidates' least.
        """
        rows = np.union1d(dense.rows, lexical.rows).astype(np.int64)
        scores, known = np.empty(len(rows)), np.isin(rows, dense.rows)
        scores[np.searchsorted(rows, dense.rows)] = dense.scores
        scores[~known] = dense_scores(rows[~known])
        least = float(np.min(scores, initial=np.inf)) if floor is None else floor
        return cls(rows, scores, np.asarray(lexical_scores(rows), np.float64), least)


def weighted_sum(candidates: Candidates, weight: float) -> Ranked:
    """Every candidate by weight x its dense score + (1 - weight) x its lexical one, each scaled to reach 1.

    A scaled score is the share of the way from the least that there can be to the best of this query: TM2C2 of Bruch, Gai and
    Ingber, An Analysis of Fusion Functions for Hybrid Retrieval (ACM TOIS 2023, arXiv 2210.11934), who found it to do better
    than reciprocal ranks, and to need few judged queries to be tuned. Of equal sums the lower row comes first.

    Args:
        candidates: of one query.
        weight: of the dense scores, 0 to 1.
    """
    rows, dense, lexical, floor = candidates
    if not len(rows):
        return Ranked(rows, np.empty(0))
    best = float(np.max(dense))
    near = (dense - floor) / (best - floor) if best > floor else np.ones(len(rows))
    same = lexical / max(float(np.max(lexical)), np.finfo(np.float64).tiny)
    sums = weight * near + (1 - weight) * same
    order = np.lexsort((rows, -sums))
    return Ranked(rows[order], sums[order])


def _summed(rows: Sequence[Positions], scores: Sequence[Scores]) -> Ranked:
    """Rows of all rankings once, by the sum of their scores."""
    found, places = np.unique(np.concatenate([np.empty(0, np.int64), *rows]), return_inverse=True)
    sums = np.bincount(
        places.reshape(-1), weights=np.concatenate([np.empty(0), *scores]), minlength=len(found)
    )
    order = np.lexsort((found, -sums))
    return Ranked(found[order], sums[order])


def tuned_weight(
    queries: Sequence[Candidates],
    score: Callable[[int, Positions], float],
    weights: Sequence[float] = WEIGHTS,
) -> tuple[float, float]:
    """The weight of ``weighted_sum`` that ranks judged queries best, and its mean score.

    Of equally good weights the one nearest to the usual one.

    Args:
        queries: candidates of each.
        score: of a query's number and the rows of its ranking, such as its nDCG@10.
        weights: that are tried.
    """
    means = [
        float(np.mean([score(number, weighted_sum(one, weight).rows) for number, one in enumerate(queries)]))
        for weight in weights
    ]
    best = max(range(len(weights)), key=lambda n: (round(means[n], 9), -abs(weights[n] - USUAL_WEIGHT)))
    return weights[best], means[best]
