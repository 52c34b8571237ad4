"""The gate: what passes, what is refused and why, from made-up evidence with known answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedloom.config.cluster import PoolConfig
from embedloom.config.evaluation import GateConfig, Tolerance
from embedloom.core.model_folder import ModelFolder
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.evaluation.gate import (
    Baseline,
    Contender,
    Evidence,
    _parameters,
    _weight_bytes,
    decide,
    judge,
    store_verdict,
    verdict_text,
)
from embedloom.evaluation.leaderboard import rank_models
from embedloom.evaluation.scoring import SCHEMA
from embedloom.evaluation.statistics import Stratum
from embedloom.pipeline.model_commands import gate_rule, serving_config
from embedloom.serving.schemas import GateVerdict
from fakes_foreign import OLD, make_transformer, save_library_model, with_dense, write_old_layout

RULES = GateConfig(resamples=500)


def strata(values, key="test/default"):
    return [Stratum(key, "mean", tuple(f"q{n}" for n in range(len(values))), np.asarray(values))]


def evidence(**differences):
    """Tasks of 200 queries whose items differ by noise around the given mean."""
    rng = np.random.default_rng(0)
    items, candidate, current = {}, {}, {}
    for task, difference in differences.items():
        base = rng.random(200)
        moved = base + difference + rng.normal(0, 0.05, 200)
        moved += difference - (moved - base).mean()
        items[task] = (strata(moved), strata(base))
        candidate[task], current[task] = float(moved.mean()), float(base.mean())
    return Evidence(candidate, current, items)


def failed(decision):
    return {check.name for check in decision.checks if not check.passed}


def test_a_better_model_passes_and_says_why():
    decision = decide(RULES, evidence(a=0.03, b=0.02, c=0.0))
    assert decision.verdict == "passed" and failed(decision) == set()
    assert [entry.result for entry in decision.tasks] == ["better", "better", "equal"]
    assert decision.mean["low"] > 0
    assert "required: above 0" in decision.reasons[0]


def test_one_significant_loss_refuses_a_model_that_is_better_on_the_whole():
    decision = decide(RULES, evidence(a=0.08, b=0.08, c=-0.03))
    assert decision.verdict == "refused"
    assert failed(decision) == {"no_regression", "significance"}
    assert any("c -0.0300, tolerated -0.0100" in reason for reason in decision.reasons)
    assert any("significantly worse, Holm over 3 tasks: c -0.0300" in reason for reason in decision.reasons)
    allowed = GateConfig(resamples=500, no_regression=(Tolerance(task="c", drop=0.05), Tolerance(drop=0.0)))
    assert failed(decide(allowed, evidence(a=0.08, b=0.08, c=-0.03))) == {"significance"}


def test_an_equal_model_is_not_better_but_not_worse():
    equal = evidence(a=0.0, b=0.0)
    assert failed(decide(RULES, equal)) == {"mean"}
    assert decide(GateConfig(resamples=500, require="not_worse"), equal).verdict == "passed"
    assert failed(decide(GateConfig(resamples=500, require="not_worse"), evidence(a=-0.05))) >= {"mean"}


def test_losses_that_chance_explains_are_forgiven_the_more_tasks_there_are():
    """Twenty tasks of pure noise: uncorrected some would look worse at 5 %, corrected none is."""
    rng = np.random.default_rng(5)
    base = {f"t{n}": rng.random(100) for n in range(20)}
    moved = {task: values + rng.normal(0, 0.1, 100) for task, values in base.items()}
    found = decide(
        GateConfig(resamples=2000, require="not_worse", no_regression=(Tolerance(drop=0.2),)),
        Evidence(
            {task: float(values.mean()) for task, values in moved.items()},
            {task: float(values.mean()) for task, values in base.items()},
            {task: (strata(moved[task]), strata(base[task])) for task in base},
        ),
    )
    assert found.verdict == "passed"
    assert all(entry.result == "equal" for entry in found.tasks)


def test_borda_within_the_pool_counts():
    scores = {
        "candidate": {"a": 0.6, "b": 0.1},
        "current": {"a": 0.5, "b": 0.4},
        "x": {"a": 0.4, "b": 0.3},
        "y": {"a": 0.1, "b": 0.2},
    }
    places = {standing.model: standing for standing in rank_models(scores, {"a": "STS", "b": "STS"})}
    given = evidence(a=0.03, b=0.02)
    judged = Evidence(
        given.candidate, given.current, given.items, (places["candidate"], places["current"]), "four"
    )
    refused = decide(RULES, judged)  # 3 + 0 votes against 2 + 3
    assert failed(refused) == {"borda"}
    assert "Borda -2 votes (rank 2 against 1, pool four)" in refused.reasons[0]
    assert decide(GateConfig(resamples=500, min_borda_gain=-2), judged).verdict == "passed"
    assert decide(GateConfig(resamples=500, min_borda_gain=None), judged).verdict == "passed"


def beside(given, **differences):
    """The evidence with baselines: each one's difference to the candidate, the same for every query of every task."""
    baselines = [
        Baseline(
            name,
            {task: score + difference for task, score in given.candidate.items()},
            {task: strata(items[0][0].values + difference) for task, items in given.items.items()},
        )
        for name, difference in differences.items()
    ]
    return replace(given, baselines=baselines)


def test_a_model_is_held_against_the_strongest_baseline_by_name():
    given = beside(evidence(a=0.03, b=0.02), bm25=-0.04, teacher=-0.01)
    (check,) = [check for check in decide(RULES, given).checks if check.name == "baseline"]
    assert check.passed and check.text == (
        "against teacher, the strongest baseline: mean over tasks +0.0100, 95 % interval +0.0100 to +0.0100; nothing required"
    )
    required = GateConfig(resamples=500, require_over_baseline="better")
    assert decide(required, given).verdict == "passed"
    behind = beside(evidence(a=0.03, b=0.02), bm25=0.005, teacher=-0.01)
    refused = decide(required, behind)
    assert failed(refused) == {"baseline"} and "against bm25, the strongest" in refused.reasons[0]
    assert decide(RULES, behind).verdict == "passed"
    forgiving = GateConfig(resamples=500, require_over_baseline="not_worse")  # a hundredth is tolerated
    assert decide(forgiving, behind).verdict == "passed"
    assert failed(decide(forgiving, beside(evidence(a=0.03, b=0.02), bm25=0.02))) == {"baseline"}


def test_a_baseline_that_lacks_a_task_is_none():
    given = beside(evidence(a=0.03, b=0.02), bm25=0.3)
    partial = replace(given.baselines[0], scores={"a": 0.9})
    required = GateConfig(resamples=500, require_over_baseline="better")
    assert decide(RULES, replace(given, baselines=[partial])).verdict == "passed"
    with pytest.raises(
        DataError, match=r"no baseline was scored on all tasks \(evaluation\.baselines: bm25\)"
    ):
        decide(required, replace(given, baselines=[partial]))
    with pytest.raises(DataError, match=r"\(evaluation\.baselines: none\)"):
        decide(required, replace(given, baselines=[]))


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        ({"max_latency_ratio": 2.0}, {"latency"}),
        ({"max_latency_milliseconds": 29.0}, {"latency"}),
        ({"max_latency_ratio": 3.0, "max_latency_milliseconds": 30.0}, set()),
        ({"max_size_ratio": 1.5}, {"size"}),
        ({"max_size_mib": 1.9}, {"size"}),
        ({"max_size_mib": 2.0, "max_size_ratio": 2.0}, set()),
    ],
)
def test_latency_and_size_have_limits(limits, broken):
    given = evidence(a=0.03)
    sizes = (2 * 2**20, 2**20), (2_000_000, 1_000_000)
    judged = Evidence(given.candidate, given.current, given.items, None, "", (30.0, 10.0), *sizes)
    assert failed(decide(GateConfig(resamples=500, **limits), judged)) == broken


def test_a_task_without_items_counts_with_its_score_alone():
    given = evidence(a=0.03)
    decision = decide(
        RULES, Evidence({**given.candidate, "p": 0.5}, {**given.current, "p": 0.45}, given.items)
    )
    assert decision.tasks[1].result == "not tested" and decision.tasks[1].low is None
    assert decision.mean["difference"] == pytest.approx(0.04, abs=1e-6)


def test_models_on_other_tasks_or_items_cannot_be_compared():
    given = evidence(a=0.03)
    with pytest.raises(DataError, match="on one side only: b"):
        decide(RULES, Evidence({**given.candidate, "b": 1.0}, given.current, given.items))
    other = {"a": (given.items["a"][0], strata(np.zeros(199)))}
    with pytest.raises(
        DataError, match="task 'a', test/default: the models were not scored on the same items"
    ):
        decide(RULES, Evidence(given.candidate, given.current, other))


def test_items_pair_by_name_whatever_their_order():
    given = evidence(a=0.01)
    ours, (theirs,) = given.items["a"]
    order = np.random.default_rng(1).permutation(200)
    shuffled = Stratum(theirs.key, "mean", tuple(theirs.items[n] for n in order), theirs.values[order])
    again = Evidence(given.candidate, given.current, {"a": (ours, [shuffled])})
    assert decide(RULES, again).as_json() == decide(RULES, given).as_json()


def test_verdict_is_stored_beside_the_weights_and_bound_to_them(tiny_model, tmp_path):
    import shutil

    import pyarrow as pa

    folders = [tmp_path / name for name in ("new", "old")]
    for folder in folders:
        shutil.copytree(tiny_model, folder)
    place = Place(str(tmp_path / "evaluation"))
    rng = np.random.default_rng(0)
    base = rng.random(100)
    values = {"new": base + 0.05 + rng.normal(0, 0.02, 100), "old": base}
    for name, found in values.items():
        rows = [{"split": "test", "subset": "default", "item": f"q{n}", "statistic": "mean", "value": v, "target": None}
                for n, v in enumerate(found)]  # fmt: skip
        place.write_table(
            f"items/models/{name}/docs/default.parquet", pa.Table.from_pylist(rows, schema=SCHEMA)
        )
    weak = [{"split": "test", "subset": "default", "item": f"q{n}", "statistic": "mean", "value": v / 2, "target": None}
            for n, v in enumerate(base)]  # fmt: skip
    place.write_table(
        "items/baselines/teacher/docs/default.parquet", pa.Table.from_pylist(weak, schema=SCHEMA)
    )
    table = {"models": {name: {"docs": float(found.mean())} for name, found in values.items()},
             # Hybrid search has the model in it, and is compared with nothing.
             "baselines": {"teacher": {"docs": float(base.mean() / 2)}, "hybrid": {"docs": 0.99}}, "teacher": "small",
             "types": {"docs": "Retrieval"}}  # fmt: skip
    place.write_json("scores.json", table)
    new, old = (Contender(folder.name, folder) for folder in folders)
    rules = GateConfig(resamples=300, max_size_ratio=1.0, require_over_baseline="better")
    passed = judge(rules, place, (new, old), None, PoolConfig(), "float32")
    refused = judge(rules, place, (old, new), None, PoolConfig(), "float32")
    assert passed["weights"] == ModelFolder(folders[0]).weights
    assert store_verdict(Place(str(folders[0])), passed) == f"{folders[0]}/gate.json"
    store_verdict(Place(str(folders[1])), refused)
    ModelFolder(folders[0]).check_gated()
    results = Place(str(tmp_path / "results"))
    assert store_verdict(Place(str(folders[0])), passed, results) == f"{folders[0]}/gate.json"
    with pytest.raises(DataError, match=r"refused this model \(mean over tasks -0\.0484"):
        ModelFolder(folders[1]).check_gated()
    assert ModelFolder(folders[0]).weights == json.loads((folders[0] / "gate.json").read_text())["weights"]
    text = verdict_text(passed)
    assert text.splitlines()[0] == "gate: new against old: PASSED"
    assert "ok   baseline: against the baseline teacher small: mean over tasks +0." in text
    assert "ok   size" in text and "docs" in text and "better" in text
    assert "FAIL mean" in verdict_text(refused)
    with pytest.raises(DataError, match=r"no scores of 'gone'; it has new, old"):
        judge(rules, place, (Contender("gone", folders[0]), old), None, PoolConfig(), "float32")


@pytest.mark.parametrize(
    "where", ["modell", "lib/python3.11/site-packages/pkg/model", "hub/models--org--m/snapshots/1f"]
)
def test_a_foreign_models_folder_is_left_as_it_is(tiny_model, tmp_path, where):
    """Its verdict lies with the gate's results; whoever serves the model names it."""
    import shutil

    folder = shutil.copytree(tiny_model, tmp_path / where)
    if where == "modell":  # as others save models; in a package or a hub's cache it may be one of ours
        (folder / "contract.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    identity = ModelFolder(folder).id, ModelFolder(folder).revision
    weights = ModelFolder(folder).weights
    content = {"verdict": "passed", "weights": weights, "reasons": [], "candidate": "m-1"}
    results = Place(str(tmp_path / "results"))
    stored = store_verdict(Place(str(folder)), content, results)
    assert stored == f"{results.uri}/verdicts/m-1.json"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(DataError, match=r"name the verdict that it writes as serving\.verdict"):
        ModelFolder(folder).check_gated()
    ModelFolder(folder).check_gated(stored)
    assert GateVerdict.of(ModelFolder(folder), stored).verdict == "passed"
    store_verdict(Place(str(folder)), {**content, "verdict": "refused", "reasons": ["sts -0.1"]}, results)
    with pytest.raises(DataError, match=r"refused this model \(sts -0\.1\)"):
        ModelFolder(folder).check_gated(stored)
    with pytest.raises(DataError, match=r"serving\.verdict: '.*gone' does not exist"):
        ModelFolder(folder).check_gated(str(tmp_path / "gone"))
    (folder / "gate.json").write_text("{}")  # as an earlier version left it
    (folder / "int8.json").write_text("{}")  # as `embedloom serve` leaves it
    assert (ModelFolder(folder).id, ModelFolder(folder).revision) == identity


def test_a_verdict_that_is_named_is_asked_for(tiny_model, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_model, tmp_path / "m")
    stated = serving_config({"model": str(folder)}, ["verdict=out/verdicts/m.json"])
    assert gate_rule(stated, ModelFolder(folder)).require_gate


def test_a_verdict_covers_all_that_a_foreign_model_is_read_from(tmp_path):
    bert = make_transformer(tmp_path / "bert", limit=300)
    folder = save_library_model(tmp_path / "model", bert, later=with_dense, prompts={"query": "query : "})
    seen = {ModelFolder(folder).weights}
    dense = folder / "2_Dense/model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(dense).items()}, dense)
    seen.add(ModelFolder(folder).weights)
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(settings.read_text().replace("query : ", "search : "))
    seen.add(ModelFolder(folder).weights)
    modules = folder / "modules.json"
    modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    seen.add(ModelFolder(folder).weights)
    assert len(seen) == 4 and {len(found) for found in seen} == {16}
    for name in ("gate.json", "int8.json", "README.md"):
        (folder / name).write_text("{}")
    assert ModelFolder(folder).weights in seen


def test_a_model_is_no_larger_for_the_type_of_its_files(tmp_path):
    """A base stored in bfloat16, and what was trained from it in float32."""
    tensors = {"a": torch.ones(3, 5), "b": torch.ones(7)}
    for name, dtype in (("base", torch.bfloat16), ("trained", torch.float32)):
        (tmp_path / name).mkdir()
        save_file(
            {key: tensor.to(dtype) for key, tensor in tensors.items()}, tmp_path / name / "model.safetensors"
        )
    base, trained = tmp_path / "base", tmp_path / "trained"
    assert _parameters(base) == _parameters(trained) == 22 and _weight_bytes(trained) > _weight_bytes(base)
    given = evidence(a=0.03)
    sizes = (_weight_bytes(trained), _weight_bytes(base)), (_parameters(trained), _parameters(base))
    judged = Evidence(given.candidate, given.current, given.items, None, "", None, *sizes)
    assert decide(GateConfig(resamples=500, max_size_ratio=1.0), judged).verdict == "passed"


def test_a_foreign_transformer_in_a_folder_of_its_own_has_weights(tmp_path):
    folder = write_old_layout(tmp_path / "model", make_transformer(tmp_path / "bert"), **OLD["0_Transformer"])
    weights = folder / "0_Transformer/model.safetensors"
    before = ModelFolder(folder).weights
    assert _weight_bytes(folder) == weights.stat().st_size
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    assert ModelFolder(folder).weights != before
    weights.unlink()
    with pytest.raises(DataError, match="not a model folder with weights"):
        _ = ModelFolder(folder).weights
