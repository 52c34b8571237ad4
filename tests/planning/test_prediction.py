"""The plan: steps, FLOPs, hours, money, critical path and idle GPUs, against numbers worked out by hand."""

import re

import pytest

from embedloom.pipeline.commands import load
from embedloom.pipeline.graph import graph
from embedloom.pipeline.plan import plan_table
from embedloom.planning.cost import Estimate, Plan, Workers, make_plan
from embedloom.planning.work import Known, Work
from fakes_quickstart import CLUSTER, ROOT, quickstart

NEMOTRON = ROOT / "jobs" / "configs" / "nemotron_8b.yaml"
TEXT_FLOPS = 6 * 6_979_321_856 * 512 + 12 * 32 * 4096 * 512**2  # forward and backward of 512 tokens


@pytest.fixture(scope="module")
def nemotron():
    return load(NEMOTRON, "a100x64", CLUSTER, [])


def test_8b_plan_has_the_papers_steps_and_its_hours_beside_ours(nemotron):
    text = plan_table(nemotron)
    assert "pretrain (each of 6 candidates): 5,773 steps x 2,048 queries, 1 negatives, lr 1e-05" in text
    assert "finetune (each of 6 candidates): 33,668 steps x 128 queries, 4 negatives, lr 2e-06" in text
    assert "on 64 workers x 11 CPU + 1 GPU" in text
    assert "published 25.0 + 21.5 = 46.5 h on 64 a100-80gb, 2,976 GPU-hours (arXiv 2511.07025" in text
    ours = re.search(r"both stages of one candidate ([\d.]+) h", text)
    assert ours is not None and float(ours[1]) == pytest.approx(46.5, rel=0.01)


def test_training_time_and_cost_follow_from_flops_and_the_stated_mfu(nemotron):
    nodes = graph(nemotron)
    plan = make_plan(nemotron, nodes, nemotron.rates, Known())
    one = plan.estimates["training/run1/pretrain"]
    assert one.work.flops == pytest.approx(5_773 * 2_048 * 3 * TEXT_FLOPS)
    assert one.work.tokens == 5_773 * 2_048 * 3 * 512
    seconds = 300 + one.work.flops / (64 * 312e12 * 0.401)
    assert one.seconds == pytest.approx(seconds)
    assert plan.cost("training/run1/pretrain") == pytest.approx(seconds / 3600 * 64 * 3.43)
    assert plan.mfu("training/run1/pretrain") == pytest.approx(0.401, abs=0.002)  # less the start


def test_an_unknown_model_is_not_priced_and_said_so(nemotron):
    run = load(NEMOTRON, "a100x64", CLUSTER, ["encoder.base=somebody/new-8b"])
    text = plan_table(run)
    assert "not predicted, and in no sum: training/run1/pretrain" in text
    assert "the shape of somebody/new-8b is not in the rates file" in text


def test_a_corpus_of_unknown_size_is_a_lower_bound(tmp_path):
    text = plan_table(quickstart(tmp_path))
    line = next(line for line in text.splitlines() if line.startswith("vectors  ") and "≥" in line)
    assert "≥ 80" in line
    assert "one stage after another: at least" in text
    assert "sizes: at least those that the synthesis reads" in text


def test_without_a_rates_file_the_plan_says_so(tmp_path):
    copy = tmp_path / "cluster.yaml"
    copy.write_text(CLUSTER.read_text())
    run = load(NEMOTRON, "a100x64", copy, [])
    assert "no rates.yaml beside the cluster config" in plan_table(run)


def _made_up() -> Plan:
    """a (1 h, 8 GPUs) -> b (2 h, no GPU); a -> c (5 h, 4 GPUs); d (unknown)."""

    def one(name, hours, gpus):
        return Estimate(
            Work(name, "embed"), Workers("w", gpus, 2.0), "g", None if hours is None else hours * 3600
        )

    estimates = {"a": one("a", 1, 8), "b": one("b", 2, 0), "c": one("c", 5, 4), "d": one("d", None, 8)}
    return Plan(estimates, {"a": (), "b": ("a",), "c": ("a",), "d": ("b",)}, {"g": 2.0}, "USD", 8, {})


def test_sums_critical_path_and_idle_gpus():
    plan = _made_up()
    assert plan.seconds == 8 * 3600
    assert plan.critical_path() == (["a", "c"], 6 * 3600)
    assert plan.gpu_hours == 1 * 8 + 5 * 4
    assert plan.idle_gpu_hours() == {"b": 16.0, "c": 20.0}
    assert plan.held_gpu_hours == plan.gpu_hours + sum(plan.idle_gpu_hours().values())
    assert plan.total_cost == 2.0 * (8 + 2 * 2 + 20)  # b's two cores are priced as devices too
    assert plan.unknown == ["d"]
