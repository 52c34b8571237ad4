import math
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from embedloom.config.rates import load_rates
from embedloom.core.storage import Place
from embedloom.training.data import compute_cost
from embedloom.training.metrics import (
    PEAK_FLOPS,
    LossWatch,
    StepRecord,
    StepWriter,
    read_metrics,
    training_flops,
)


def record(step, loss=1.0):
    return StepRecord(step, 0, loss, 1e-3, 0.5, 8, 1000, 0.25, 0.125, 0.5, 321, 0.42)


def test_a_line_says_what_a_step_did(capfd, tmp_path):
    writer = StepWriter("train a/b", 10, Place(str(tmp_path)))
    writer.start([])
    for step in range(1, 11):
        writer.add(record(step))
    writer.close()
    last = capfd.readouterr().err.splitlines()[-1]
    for part in ("10/10 steps", "loss 1", "lr 0.001", "grad_norm 0.5", "queries/s 16", "tokens/s 2000"):
        assert part in last
    for part in ("padding 25.0%", "waiting 12.5%", "mfu 42.0%", "memory 321 MiB"):
        assert part in last


def test_metrics_file_of_a_resumed_run_has_every_step_once(tmp_path):
    first = StepWriter("t", 6, Place(str(tmp_path)))
    first.start([])
    for step in range(1, 6):
        first.add(record(step))
    first.close()
    # Killed after step 5; the last checkpoint holds 3.
    second = StepWriter("t", 6, Place(str(tmp_path)))
    second.start(first.records[:3])
    for step in range(4, 7):
        second.add(record(step, loss=2.0))
    second.close()
    found = read_metrics(tmp_path)
    assert [r.step for r in found] == [1, 2, 3, 4, 5, 6]
    assert [r.loss for r in found] == [1, 1, 1, 2, 2, 2]
    assert found == second.records


def events(folder):
    """Events of TensorBoard's files: length, its checksum, the message, its checksum."""
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4


def test_tensorboard_holds_the_loss_of_every_step(tmp_path):
    writer = StepWriter("t", 3, Place(str(tmp_path)))
    writer.start([])
    for step in range(1, 4):
        writer.add(record(step, loss=1 / step))
    writer.close()
    points = {
        event.step: value.simple_value
        for event in events(tmp_path / "_tensorboard")
        for value in event.summary.value
        if value.tag == "train/loss"
    }
    assert points == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})


def test_flops_of_a_step_are_those_of_the_roofline():
    # peers' table C1: 6.98e9 matrix weights, 32 layers of 4096, 512 tokens: 14.23 GFLOP a token forward, 3 times that in all.
    per_token = training_flops(512, 512**2, 6_979_588_096, 32, 4096) / 512
    assert per_token / 3 == pytest.approx(14.23e9, rel=1e-3)


def test_peaks_of_gpus_are_those_of_the_shipped_rates_file():
    for device in load_rates(Path(__file__).parents[2] / "cluster" / "rates.yaml").devices.values():
        if device.accelerator is not None:
            peak = next(
                flops for part, flops in PEAK_FLOPS.items() if part in f"NVIDIA {device.accelerator}-SXM"
            )
            assert peak == device.peak_bf16_tflops.value * 1e12


def test_cost_counts_attention_as_its_share_of_the_flops():
    assert compute_cost([512], 4096) == pytest.approx(512 * (1 + 512 / (6 * 4096)))
    assert compute_cost([10, 20], 10**9) == pytest.approx(30)
    # The closed form against the FLOPs of a layer: 24 h² a token, 4 h n of attention.
    h, n = 576, 300
    assert compute_cost([n], h) * 24 * h * h == pytest.approx(n * (24 * h * h + 4 * h * n))


def test_a_loss_that_is_no_number_stops_the_run_with_its_ids():
    watch = LossWatch()
    assert watch.problem([1.0, 2.0], lambda: ["a/1", "a/2"], 1) is None
    problem = watch.problem([1.0, math.nan], lambda: ["a/3", "b/4"], 2)
    assert problem == "loss is not finite at step 2 for 1 of 2 queries: b/4"


def test_a_diverging_loss_stops_the_run():
    watch = LossWatch(window_steps=4, factor=3.0)
    for step in range(1, 9):
        assert watch.problem([2.0 / step], lambda: ["x"], step) is None
    found = [watch.problem([9.0, 9.0], lambda: ["a/1", "b/2"], step) for step in range(9, 13)]
    stopped = next(problem for problem in found if problem)
    assert "loss has diverged at step 9" in stopped and stopped.endswith("the batch was a/1, b/2")


def test_noise_of_a_small_loss_does_not_stop_the_run():
    watch = LossWatch(window_steps=2, factor=3.0)
    losses = [1.0, 1.0, 1e-4, 1e-4, 0.4, 0.4, 1e-4, 0.9]
    assert [watch.problem([loss], lambda: ["x"], step) for step, loss in enumerate(losses)] == [None] * len(
        losses
    )


def test_a_resumed_watch_remembers_the_steps_before():
    watch = LossWatch(window_steps=2, factor=3.0)
    for loss in (1.0, 1.0, 0.1, 0.1):
        watch.seen(loss)
    assert watch.problem([5.0], lambda: ["x"], 5) is not None
