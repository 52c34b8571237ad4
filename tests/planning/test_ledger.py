"""The ledger and what a calibrated plan makes of it, against numbers worked out by hand."""

import pytest

from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.pipeline.commands import load
from embedloom.pipeline.graph import fingerprints, finished, graph, writer_for
from embedloom.pipeline.plan import keep_ledger, keep_plan, plan_table
from embedloom.planning.cost import make_plan
from embedloom.planning.ledger import build_ledger, ledger_lines
from embedloom.planning.work import Known, read_ledger
from fakes_quickstart import CLUSTER, MEASURED, ROOT, finish, quickstart


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A planned, executed and accounted quickstart."""
    run = quickstart(tmp_path_factory.mktemp("measured"))
    nodes = graph(run)
    keep_plan(run, nodes)
    finish(run)
    keep_ledger(run, nodes)
    return run


def predict(run, ledger):
    nodes = graph(run)
    return make_plan(run, nodes, run.rates, Known({}, ledger, fingerprints(nodes)))


def test_the_same_run_is_predicted_to_the_second(measured, tmp_path):
    plan = predict(quickstart(tmp_path), read_ledger(measured.place))
    found = {name: one.seconds for name, one in plan.estimates.items()}
    assert found == pytest.approx({name: seconds for name, (seconds, _) in MEASURED.items()}, rel=1e-6)
    assert plan.unknown == [] and not plan.is_bound


def test_twice_the_steps_take_twice_the_stepping_and_one_start(measured, tmp_path):
    run = quickstart(tmp_path, "training.stages.0.max_steps=1200")
    plan = predict(run, read_ledger(measured.place))
    start = 284.0 - 236.5
    assert plan.estimates["training/alpha/pretrain"].seconds == pytest.approx(start + 2 * 236.5)
    assert plan.estimates["training/alpha/pretrain"].work.tokens == pytest.approx(2 * 591738)
    assert plan.estimates["training/alpha/finetune"].seconds == pytest.approx(266.0)


def test_a_new_candidate_is_predicted_by_the_stage_it_repeats(measured, tmp_path):
    extra = "training.runs=[{name: gamma, seed: 3}]"
    plan = predict(quickstart(tmp_path, extra, "gate.candidate=merged"), read_ledger(measured.place))
    assert plan.estimates["training/gamma/finetune"].seconds == pytest.approx(266.0)
    # Three models and two baselines instead of four and two: 10 s of start, 31 s for six scores.
    assert plan.estimates["evaluation"].seconds == pytest.approx(10 + 31 * 5 / 6)


def test_more_synthetic_rows_mean_more_to_mine(measured, tmp_path):
    run = quickstart(tmp_path, "synthesis.families.0.rows=160")
    plan = predict(run, read_ledger(measured.place))
    assert plan.estimates["mining"].work.rows == 2995 + 80
    assert plan.estimates["examples"].seconds == pytest.approx(10 + 40 * 3075 / 2995)
    assert plan.estimates["synthesis"].seconds == pytest.approx(60 + 96 * 2)


def test_ledger_puts_actual_beside_planned(measured):
    ledger = read_ledger(measured.place)
    planned = measured.place.read_json("plan.json")["stages"]
    assert ledger.entries["vectors"].planned_seconds == planned["vectors"]["seconds"]
    line = next(line for line in ledger_lines(ledger) if line.startswith("training/alpha/pretrain"))
    # By the file: 691,200 tokens at 3,500 a second after 40 s; it took 284 s.
    expected = 40 + 691_200 / 3_500
    assert f"{expected / 60:.1f} min" in line and "4.7 min" in line and f"{284 / expected - 1:+.0%}" in line


def test_mfu_is_of_real_tokens(tmp_path):
    run = load(ROOT / "jobs/configs/nemotron_8b.yaml", "a100x64", CLUSTER, [f"run.output_dir={tmp_path}"])
    nodes = graph(run)
    name = "training/run1/pretrain"
    inputs = dict.fromkeys(nodes[name].inputs, "made up")
    tokens = 5_773 * 2_048 * 3 * 256  # texts of half the limit
    counts = {"rows": 5_773 * 2_048, "steps": 5_773, "tokens": tokens, "step_seconds": 50_000.0}
    done = writer_for(run, nodes, name, inputs).commit(counts, seconds=51_000)
    entry = build_ledger(run, nodes, {name: done}, run.rates).entries[name]
    flops = tokens * (6 * 6_979_321_856 + 12 * 32 * 4096 * 256)
    assert entry.counts["mfu"] == pytest.approx(flops / (64 * 312e12 * 50_000), abs=1e-4)
    assert entry.start_seconds == 1_000 and entry.device == "a100-80gb"


def test_plan_of_a_finished_run_uses_its_own_ledger(measured):
    run = measured
    assert len(finished(run, graph(run))) == 13
    text = plan_table(quickstart(run.place.local.parent, "merging.weights=[3, 1]"))
    assert "prediction by speeds of quickstart:" in text
    assert "9 of 13 artefacts finished" in text


def test_a_run_without_a_ledger_says_how_to_get_one(tmp_path):
    with pytest.raises(DataError, match=r"no ledger\.json; write it with `embedloom ledger"):
        read_ledger(Place(str(tmp_path)))
    (tmp_path / "ledger.json").write_text(
        '{"version": 1, "run": "x", "profile": "local", "stages": {"a": {"b": 1}}}'
    )
    with pytest.raises(DataError, match="not a ledger"):
        read_ledger(Place(str(tmp_path)))
