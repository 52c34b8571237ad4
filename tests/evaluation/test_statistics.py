"""Bootstrap statistics against SciPy and scikit-learn, Holm by hand, intervals against the textbook."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from embedloom.evaluation.statistics import (
    Stratum,
    _statistic,
    holm,
    interval,
    observed,
    one_sided_p,
    resampled,
)


def stratum(values, targets=None, statistic="mean", key="test/default"):
    items = tuple(str(number) for number in range(len(values)))
    return Stratum(key, statistic, items, np.asarray(values, float), targets)


@pytest.mark.parametrize("statistic", ["spearman", "average_precision"])
def test_weighted_statistics_equal_those_of_the_drawn_items(statistic):
    rng = np.random.default_rng(1)
    values = np.round(rng.normal(size=40), 1)  # with ties
    grades = np.round(values + rng.normal(size=40))
    targets = grades if statistic == "spearman" else (grades > 0).astype(float)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=15)
    ours = _statistic(stratum(values, targets, statistic), counts.astype(float))
    for row, score in zip(counts, ours, strict=True):
        drawn, wanted = np.repeat(values, row), np.repeat(targets, row)
        theirs = (
            spearmanr(drawn, wanted)[0] if statistic == "spearman" else average_precision_score(wanted, drawn)
        )
        assert score == pytest.approx(theirs, abs=1e-12)


def test_mean_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(2).normal(0.4, 0.2, size=900)
    low, high = interval(resampled([[stratum(values)]], 4000, 7)[0])
    half = 1.96 * values.std() / 30
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=1e-3),
        pytest.approx(values.mean() + half, abs=1e-3),
    )
    assert observed(stratum(values)) == pytest.approx(values.mean())


def test_models_share_their_draws_so_equal_models_never_differ():
    values = np.random.default_rng(3).random(50)
    both = resampled([[stratum(values)], [stratum(values)]], 300, 0)
    assert (both[0] == both[1]).all()
    shifted = resampled([[stratum(values + 0.1)], [stratum(values)]], 300, 0)
    np.testing.assert_allclose(shifted[0] - shifted[1], 0.1)


def test_a_task_score_is_the_mean_over_its_subsets_not_over_items():
    scores = resampled([[stratum([1.0] * 3, key="test/a"), stratum([0.0] * 300, key="test/b")]], 50, 0)
    assert (scores == 0.5).all()


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    values = np.random.default_rng(4).random(80)
    whole = resampled([[stratum(values)]], 100, 5)
    monkeypatch.setattr("embedloom.evaluation.statistics._CHUNK_CELLS", 800)
    np.testing.assert_allclose(resampled([[stratum(values)]], 100, 5), whole, rtol=1e-12)


def test_holm_steps_down():
    # sorted: 0.005*4, 0.01*3, 0.03*2, 0.04*1, each at least the one before
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == {
        "a": pytest.approx(0.03),
        "b": pytest.approx(0.06),
        "c": pytest.approx(0.06),
        "d": pytest.approx(0.02),
    }
    assert holm({"only": 0.7}) == {"only": 0.7}
    assert holm({"x": 0.6, "y": 0.9}) == {"x": 1.0, "y": 1.0}


def test_p_values_are_never_zero_and_one_where_nothing_is_below():
    assert one_sided_p(np.full(99, -0.1)) == pytest.approx(0.01)
    assert one_sided_p(np.zeros(99)) == 1.0
