"""Audit figures against hand-worked tables."""

import json

import pyarrow as pa
import pytest

from embedloom.core.text import words_of
from embedloom.errors import DataError
from embedloom.mining.audit import GAP_EDGES, audit_summary, near_duplicate


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        ("A b c, d e f", "a B c d e f!", 1.0),  # case and punctuation aside
        ("a b c d e f g h i j", "a b c d e f g h i x", 5 / 7),  # 6 shingles each, 5 shared
        ("a b c d e", "e d c b a", 0.0),  # the same words in another order
        ("red blue", "blue red red", 1.0),  # short: sets of words
        ("red blue green", "red blue black", 2 / 4),
        ("one two three four five six", "one two three", 3 / 6),  # one of them short
        ("", "", 1.0),
        ("!", "?", 0.0),
        ("", "a", 0.0),
        ("東京都港区", "東京都港区", 1.0),
        ("東京都", "東京", 2 / 3),  # each character is a word
        ("東京、大阪。「京都」", "東京大阪京都", 1.0),  # six words: punctuation is none
        ("東京、大阪。「京都」", "東京大阪", 4 / 5),  # sets: 東 京 大 阪 都
    ],
)
def test_similarity_by_hand(positive, negative, expected):
    assert near_duplicate(positive, negative) == pytest.approx(expected)
    assert near_duplicate(negative, positive) == pytest.approx(expected)


def audit_row(dataset="public", **changes):
    row = {
        "query_id": "q", "dataset": dataset, "task_type": "retrieval", "teacher": "t", "positive_score": 0.8,
        "candidates": 10, "removed_as_positive": 1, "removed_by_margin": 2, "removed_by_rank": 0, "removed_by_floor": 0,
        "selected": 2, "given": False, "naive": 2, "naive_removed": 1, "gaps": [0.11, 0.31], "near_duplicates": 0,
    }  # fmt: skip
    return row | changes


PARTS = [
    [
        audit_row(),
        audit_row("synthetic", removed_by_margin=5, gaps=[0.11], selected=1, naive_removed=2, near_duplicates=1),
    ],
    [
        audit_row(removed_by_rank=3, removed_by_floor=4, gaps=[-0.01, 0.61]),
        audit_row(selected=0, gaps=[], candidates=0, removed_as_positive=0, removed_by_margin=0, naive=0, naive_removed=0),
        audit_row("labels", given=True, gaps=[0.5], selected=1, near_duplicates=1),
    ],
]  # fmt: skip


def tables(parts):
    schema = pa.Table.from_pylist([audit_row()]).schema
    return (pa.Table.from_pylist(part, schema=schema) for part in parts)


def test_summary_by_hand():
    found = audit_summary(tables(PARTS), negatives=2)
    assert json.loads(json.dumps(found)) == found
    assert (found["negatives"], found["gap_edges"]) == (2, list(GAP_EDGES))
    assert list(found["datasets"]) == ["labels", "public", "synthetic"]
    total = found["total"]
    assert (total["queries"], total["given"], total["candidates"], total["selected"]) == (5, 1, 30, 5)
    assert total["removed"] == {
        "positive": {"count": 3, "share": 0.1},
        "margin": {"count": 9, "share": 0.3},
        "rank": {"count": 3, "share": 0.1},
        "floor": {"count": 4, "share": 0.1333},
    }
    assert total["naive"] == {"count": 6, "removed": 4, "share": 0.6667}
    assert total["near_duplicates"] == {"count": 1, "share": 0.2}
    assert total["short"] == {"count": 2, "share": 0.5, "empty": 1}
    gaps = total["gaps"]
    # 0.11 lies in [0.1, 0.125), 0.31 in [0.3, 0.325)
    assert {GAP_EDGES[n]: count for n, count in enumerate(gaps["counts"]) if count} == {0.1: 2, 0.3: 1}
    assert len(gaps["counts"]) == len(GAP_EDGES) - 1
    assert (gaps["below"], gaps["above"]) == (1, 1)
    assert gaps["mean"] == pytest.approx((0.11 + 0.31 + 0.11 - 0.01 + 0.61) / 5, abs=1e-4)
    public = found["datasets"]["public"]
    assert (public["queries"], public["removed"]["margin"]) == (3, {"count": 4, "share": 0.2})
    labels = found["datasets"]["labels"]
    assert (labels["queries"], labels["given"], labels["selected"]) == (1, 1, 0)
    assert labels["naive"] == {"count": 0, "removed": 0, "share": None}
    assert labels["gaps"]["mean"] is None


def test_summary_does_not_depend_on_the_parts():
    rows = [row for part in PARTS for row in part]
    assert audit_summary(tables([[row] for row in rows]), 2) == audit_summary(tables([rows]), 2)


def test_edges_belong_to_the_bin_above():
    counts = audit_summary(tables([[audit_row(gaps=[0.0, 0.5, 0.6], selected=3)]]), 2)["total"]["gaps"]
    assert (counts["counts"][0], counts["counts"][GAP_EDGES.index(0.5)]) == (1, 1)
    assert sum(counts["counts"]) + counts["above"] == 3


def test_no_rows_are_a_summary_too():
    found = audit_summary([], 4)
    assert (found["total"]["queries"], found["datasets"]) == (0, {})
    assert found["total"]["removed"]["margin"] == {"count": 0, "share": None}


def test_odd_tables_are_refused():
    (table,) = tables([[audit_row()]])
    with pytest.raises(DataError, match="audit: column 'removed_by_floor' is missing; found: "):
        audit_summary([table.drop_columns(["removed_by_floor"])], 4)
    with pytest.raises(DataError, match="audit: 1 of 2 gaps are not finite"):
        audit_summary(tables([[audit_row(gaps=[float("nan"), 0.1])]]), 4)


def test_punctuation_between_characters_is_no_word():
    assert words_of("東京、大阪。「京都」") == list("東京大阪京都")
