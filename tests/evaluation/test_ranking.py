"""Borda votes, ranks and means: by hand, against mteb's own code, and on the public leaderboard's scores."""

import math
from pathlib import Path

import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mteb.benchmarks._create_table import _borda_rank_from_long

from embedloom.evaluation.leaderboard import borda_votes, load_pool, rank_models, score_frame

LEADERBOARD = Path(__file__).parents[3] / "shared" / "data" / "leaderboard"
TYPES = {"a": "Retrieval", "b": "Retrieval", "c": "STS"}


def test_ties_share_votes_and_gaps_get_none():
    scores = {
        "one": {"a": 0.9, "b": 0.5, "c": 0.1},
        "two": {"a": 0.7, "b": 0.5, "c": 0.2},
        "three": {"a": 0.7, "b": 0.5},
        "four": {"a": 0.1, "c": 0.3},
    }
    # a: ranks 1, 2.5, 2.5, 4 -> votes 3, 1.5, 1.5, 0.   b: three share rank 2 -> 2 votes each; four has none.
    # c: ranks 3, 2, -, 1 -> votes 1, 2, 0, 3.
    votes = borda_votes(score_frame(scores))
    assert votes.to_dict() == {"one": 6.0, "two": 5.5, "three": 3.5, "four": 3.0}
    ranked = {standing.model: standing for standing in rank_models(scores, TYPES)}
    assert [ranked[name].rank for name in scores] == [1, 2, 3, 4]
    assert ranked["one"].mean_task == pytest.approx(0.5)
    assert ranked["one"].types == {"Retrieval": pytest.approx(0.7), "STS": pytest.approx(0.1)}
    assert ranked["one"].mean_type == pytest.approx(0.4)
    assert ranked["three"].mean_task is None and ranked["three"].mean_type is None
    assert ranked["three"].types == {"Retrieval": pytest.approx(0.6), "STS": None}


def test_equal_votes_share_the_better_rank_and_the_next_rank_is_skipped():
    ranked = rank_models({"x": {"a": 0.5}, "y": {"a": 0.5}, "z": {"a": 0.4}}, TYPES)
    assert [(standing.model, standing.rank, standing.votes) for standing in ranked] == [
        ("x", 1, 1.5),
        ("y", 1, 1.5),
        ("z", 3, 0.0),
    ]


def test_partial_scores_are_ranked_but_kept_out_of_the_means():
    scores = {"whole": {"a": 0.5, "c": 0.5}, "part": {"a": 0.9, "c": 0.1}, "only": {"a": 0.7}}
    partial = {"part": ["a"], "only": ["a"]}
    ranked = {standing.model: standing for standing in rank_models(scores, TYPES, partial)}
    # "only" has nothing whole, so ranks 1 to 3 are subtracted from two models, as mteb does.
    assert {name: standing.votes for name, standing in ranked.items()} == {
        "part": 1.0,
        "only": 0.0,
        "whole": 0.0,
    }
    assert ranked["part"].mean_task is None
    assert rank_models(scores, TYPES, partial, partial_in_means=True)[0].mean_task == pytest.approx(0.5)


@given(
    st.dictionaries(
        st.sampled_from("ABCDEF"),
        st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.1, 0.2, 0.25, 0.3]), min_size=1),
        min_size=1,
    )
)
def test_ranks_are_those_of_mteb(scores):
    rows = [(model, task, score) for model, row in scores.items() for task, score in row.items()]
    table = polars.DataFrame(rows, schema=["model_name", "task_name", "score"], orient="row")
    theirs = dict(_borda_rank_from_long(table).iter_rows())
    assert {standing.model: standing.rank for standing in rank_models(scores, TYPES)} == theirs


@pytest.mark.skipif(not LEADERBOARD.is_dir(), reason="needs the public leaderboard's scores")
@pytest.mark.parametrize(
    ("partial_in_means", "means"),
    [(True, ("mean_task", "mean_type")), (False, ("mean_task_mteb226", "mean_type_mteb226"))],
)
def test_the_public_leaderboard_comes_out_to_the_half_vote(partial_in_means, means):
    import pandas as pd

    expected = pd.read_csv(LEADERBOARD / "results_head_130tasks.csv").set_index("model")
    pool = load_pool(LEADERBOARD / "scores_head.parquet")
    ranked = rank_models(pool.scores, pool.types, pool.partial, partial_in_means=partial_in_means)
    assert {standing.model for standing in ranked} == set(expected.index)
    for standing in ranked:
        row = expected.loc[standing.model]
        assert standing.votes == row["borda_votes"], standing.model
        assert standing.rank == row["borda_rank"] == row["rank_mteb226"]
        found = [(standing.mean_task, row[means[0]]), (standing.mean_type, row[means[1]])]
        if partial_in_means:
            found += [(value, row[kind]) for kind, value in standing.types.items()]
        for ours, theirs in found:
            assert (ours is None) == math.isnan(theirs), standing.model
            if ours is not None:
                assert 100 * ours == pytest.approx(theirs, abs=1e-5)
