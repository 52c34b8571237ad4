"""Fusion of two rankings: numbers worked by hand, a peer's formula, and the tuned weight against every weight tried."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.retrieval.fusion import (
    WEIGHTS,
    Candidates,
    Ranked,
    reciprocal_rank,
    tuned_weight,
    weighted_sum,
)


def ranked(*rows, scores=None):
    given_scores = range(len(rows), 0, -1) if scores is None else scores
    return Ranked(np.array(rows, np.int64), np.array(list(given_scores), np.float32))


def test_reciprocal_rank_by_hand():
    fused = reciprocal_rank([ranked(7, 4, 9), ranked(9, 7)])
    assert fused.rows.tolist() == [7, 9, 4]
    assert fused.scores.tolist() == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62])
    assert reciprocal_rank([ranked(1, 2), ranked(2, 1)]).rows.tolist() == [1, 2]  # equal: the lower row
    assert reciprocal_rank([ranked(), ranked()]).rows.tolist() == []


def haystacks(rankings, k=61):
    """Haystack 2's DocumentJoiner._reciprocal_rank_fusion: ranks from 0, hence k of 61; equal weights, scaled to 1."""
    found = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking):
            found[row] = found.get(row, 0) + (len(rankings) / len(rankings)) / (k + rank)
    return {row: score / (len(rankings) / k) for row, score in found.items()}


@given(st.lists(st.permutations(range(12)).map(lambda p: p[:8]), min_size=1, max_size=4))
def test_reciprocal_rank_is_haystacks(rankings):
    fused = reciprocal_rank([ranked(*rows) for rows in rankings])
    peer = haystacks(rankings)
    scaled = {int(row): score * 61 / len(rankings) for row, score in zip(*fused, strict=True)}
    assert scaled == pytest.approx(peer)
    assert [peer[int(row)] for row in fused.rows] == pytest.approx(sorted(peer.values(), reverse=True))


def candidates(dense, lexical, depth=2, floor=-1.0):
    """Of all documents' scores, as a corpus makes them of its two rankings."""
    dense, lexical = np.asarray(dense, float), np.asarray(lexical, float)
    orders = [np.argsort(-scores, kind="stable")[:depth] for scores in (dense, lexical)]
    lists = [Ranked(order, scores[order]) for order, scores in zip(orders, (dense, lexical), strict=True)]
    return Candidates.of(*lists, lambda rows: dense[rows], lambda rows: lexical[rows], floor)


def test_a_weighted_sum_by_hand():
    one = candidates(dense=[0.9, 0.7, 0.1, 0.6], lexical=[1, 0, 8, 4])
    assert one.rows.tolist() == [0, 1, 2, 3]
    fused = weighted_sum(one, 0.6)
    # 0.6 x (cosine + 1) / 1.9 + 0.4 x BM25 / 8
    assert dict(zip(fused.rows.tolist(), fused.scores.tolist(), strict=True)) == pytest.approx(
        {
            0: 0.6 + 0.4 / 8,
            1: 0.6 * 1.7 / 1.9,
            2: 0.6 * 1.1 / 1.9 + 0.4,
            3: 0.6 * 1.6 / 1.9 + 0.4 / 2,
        }
    )
    assert fused.rows.tolist() == [2, 3, 0, 1]


def test_inner_products_are_scaled_from_the_least_there_is():
    fused = weighted_sum(candidates([20, 14, 8], [0, 0, 4], depth=3, floor=None), 0.5)
    assert dict(zip(fused.rows.tolist(), fused.scores.tolist(), strict=True)) == {0: 0.5, 1: 0.25, 2: 0.5}
    assert fused.rows.tolist() == [0, 2, 1]


@pytest.mark.parametrize(("weight", "order"), [(1.0, [0, 1, 3, 2]), (0.0, [2, 3, 0, 1])])
def test_the_ends_are_the_rankings_themselves(weight, order):
    assert weighted_sum(candidates([0.9, 0.7, 0.1, 0.6], [1, 0, 8, 4]), weight).rows.tolist() == order


def test_what_cannot_be_scaled_still_ranks():
    assert weighted_sum(candidates([0.5, 0.5], [0, 0]), 0.5).rows.tolist() == [0, 1]
    assert weighted_sum(candidates([0.5, 0.5], [0, 3]), 0.5).rows.tolist() == [1, 0]
    none = Candidates.of(ranked(), ranked(), lambda rows: rows, lambda rows: rows)
    assert weighted_sum(none, 0.5).rows.tolist() == []


@given(st.integers(0, 2**32 - 1), st.sampled_from(WEIGHTS), st.floats(0.1, 9), st.floats(-3, 3))
def test_neither_scale_counts_where_none_has_a_least(seed, weight, factor, shift):
    drawn = np.random.default_rng(seed)
    dense, lexical = drawn.random(20), drawn.random(20)
    fused = weighted_sum(candidates(dense, lexical, 5, None), weight)
    other = weighted_sum(candidates(dense * factor + shift, lexical * factor, 5, None), weight)
    np.testing.assert_allclose(fused.scores, other.scores, atol=1e-9)


def test_the_tuned_weight_is_the_best_of_those_tried():
    drawn = np.random.default_rng(3)
    right = drawn.integers(0, 30, 40)
    queries = []
    for answer in right:
        dense, lexical = drawn.random(30), drawn.random(30)
        dense[answer] += 0.3
        lexical[answer] += 0.6
        queries.append(candidates(dense, lexical, 10))

    def reciprocal(number, rows):
        place = np.flatnonzero(rows == right[number])
        return 1 / (1 + place[0]) if len(place) else 0.0

    weight, score = tuned_weight(queries, reciprocal)
    means = {
        w: np.mean([reciprocal(n, weighted_sum(q, w).rows) for n, q in enumerate(queries)]) for w in WEIGHTS
    }
    assert score == pytest.approx(max(means.values())) == pytest.approx(means[weight])
    assert 0 < weight < 1 and score > max(means[0.0], means[1.0])


def test_equally_good_weights_give_the_usual_one():
    assert tuned_weight([candidates([0.9, 0.1], [5, 1])], lambda _, rows: float(rows[0] == 0))[0] == 0.75
