import pytest

from embedloom.training.schedule import learning_rate


def test_linear_follows_the_hand_worked_line():
    # peak 8, 4 warm-up steps of 12: 2, 4, 6, 8, then 8 * (1 - k/8).
    rates = [learning_rate(step, 12, 4, 8.0, "linear") for step in range(12)]
    assert rates == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1]


def test_cosine_is_half_way_down_in_the_middle():
    assert learning_rate(8, 12, 4, 1.0, "cosine") == pytest.approx(0.5)
    assert learning_rate(12, 12, 4, 1.0, "cosine") == pytest.approx(0.0)


def test_constant_stays_at_the_peak():
    assert {learning_rate(step, 100, 2, 3e-5, "constant") for step in range(2, 100)} == {3e-5}
