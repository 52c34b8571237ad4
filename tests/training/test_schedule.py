import pytest

from embedloom.config.training import TrainingStage
from embedloom.training.order import learning_rate, schedule_warnings


def test_linear_follows_the_hand_worked_line():
    # peak 8, 4 warm-up steps of 12: 2, 4, 6, 8, then 8 * (1 - k/8).
    rates = [learning_rate(step, 12, 4, 8.0, "linear") for step in range(12)]
    assert rates == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1]


def test_cosine_is_half_way_down_in_the_middle():
    assert learning_rate(8, 12, 4, 1.0, "cosine") == pytest.approx(0.5)
    assert learning_rate(12, 12, 4, 1.0, "cosine") == pytest.approx(0.0)


def test_constant_stays_at_the_peak():
    assert {learning_rate(step, 100, 2, 3e-5, "constant") for step in range(2, 100)} == {3e-5}


def stage(**changes):
    values = {"name": "s", "negatives": 1, "global_batch": 8, "learning_rate": 1e-3, **changes}
    return TrainingStage.model_validate(values)


def test_a_warm_up_longer_than_the_stage_is_named_with_what_it_leaves_of_the_peak():
    (warning,) = schedule_warnings(stage(), 16, 1000)
    assert (
        "warmup_steps is 100, but the stage has 16 steps, so it ends at 16% of learning_rate 0.001" in warning
    )
    assert learning_rate(15, 16, 100, 1e-3, "linear") == pytest.approx(0.16e-3)
    assert schedule_warnings(stage(warmup_steps=16), 16, 1000) == []


def test_a_batch_larger_than_an_epoch_is_named_with_its_numbers():
    (warning,) = schedule_warnings(stage(warmup_steps=0), 100, 3)
    assert (
        "global_batch is 8, but an epoch has 3 different rows, so a batch holds rows up to 3 times" in warning
    )
    assert schedule_warnings(stage(warmup_steps=0), 100, 8) == []
