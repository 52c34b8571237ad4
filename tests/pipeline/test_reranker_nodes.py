"""A run's reranker: which artefacts it adds and what makes them stale, refusals at start, and the run itself."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from embedloom.cli.root import app
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.encoder.pairs import PairEncoder
from embedloom.errors import ConfigError, DataError
from embedloom.pipeline.commands import execute, load, with_reranker
from embedloom.pipeline.graph import build_missing, fingerprints, graph
from embedloom.pipeline.plan import plan_table
from embedloom.pipeline.preflight import problems
from fakes_mining import make_tiny_cross_encoder
from fakes_pipeline import write_config

CLUSTER = Path(__file__).parents[2] / "cluster" / "cluster.yaml"
NODES = ["reranker/base", "reranker/model", "reranker/evaluation", "reranker/gate"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "model")


def config_of(folder: Path, llama: Path, teacher: Path, base: Path, **changes) -> Path:
    path = write_config(folder, llama, teacher)
    content = yaml.safe_load(path.read_text())
    section = {
        "base": str(base),
        "max_tokens": 100,
        "negatives": 2,
        "global_batch": 4,
        "max_steps": 3,
        "warmup_steps": 1,
    }
    content["reranker"] = section | {"top": 5, "zero_stage": 0} | changes
    path.write_text(yaml.safe_dump(content))
    return path


def test_only_what_a_change_decides_is_built_again(tiny_llama, tiny_model, base, tmp_path):
    path = config_of(tmp_path, tiny_llama, tiny_model, base)

    def prints(*overrides):
        return fingerprints(graph(load(path, "single", CLUSTER, list(overrides))))

    before = prints()
    assert [name for name in before if name.startswith("reranker/")] == NODES
    for override, changed in {
        "reranker.require=not_worse": NODES[3:],
        "reranker.top=6": NODES[2:],
        "reranker.learning_rate=0.1": NODES[1:],
        "reranker.seed=9": NODES,
        "reranker.trackers=[]": [],
    }.items():
        now = prints(override)
        assert [name for name in before if before[name] != now[name]] == changed, override
    without = yaml.safe_load(path.read_text())
    del without["reranker"]
    path.write_text(yaml.safe_dump(without))
    assert {name: value for name, value in before.items() if name not in NODES} == prints()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reranker.negatives=3", r"reranker\.negatives is 3, but mining\.selection\.negatives keeps 2"),
        (
            "reranker.mix={synthetic: 1}",
            r"reranker\.mix\.synthetic is above 0, but the config has no synthesis section",
        ),
        ("reranker.loss=hinge", r"reranker\.loss: .*'infonce' or 'bce'"),
        ("reranker.top=1", r"reranker\.top: .*greater than or equal to 2 \(seen: 1\)"),
        (
            "reranker.distillation={teacher: other}",
            r"reranker\.distillation\.teacher is 'other', but the examples have the scores of .* alone; allowed: null",
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_start(tiny_llama, tiny_model, base, tmp_path, override, message):
    path = config_of(tmp_path, tiny_llama, tiny_model, base)
    with pytest.raises(ConfigError, match=message):
        load(path, "single", CLUSTER, [override])


def test_a_base_that_is_not_there_is_named_before_anything_starts(tiny_llama, tiny_model, base, tmp_path):
    path = config_of(tmp_path, tiny_llama, tiny_model, base)
    run = load(path, "single", CLUSTER, ["reranker.base=minilm-l7"])
    (problem,) = problems(run, {"reranker"})
    assert isinstance(problem, DataError)
    assert str(problem).startswith(
        "reranker.base: 'minilm-l7' is neither a folder nor a name of the registry"
    )


def test_the_plan_has_its_lines_and_a_run_without_one_no_such_command(tiny_llama, tiny_model, base, tmp_path):
    path = config_of(tmp_path, tiny_llama, tiny_model, base)
    text = plan_table(load(path, "single", CLUSTER, []))
    assert "3 steps x 4 queries, 2 negatives, infonce" in text and "1 tasks, best 5" in text
    run = load(path, "single", CLUSTER, [])
    plain = run.config.model_copy(update={"reranker": None})
    with pytest.raises(ConfigError, match="reranker: this run has no such stage"):
        execute(type(run)(plain, run.cluster, run.profile_name), "reranker", dry_run=True)
    assert CliRunner().invoke(app, ["reranker", "--help"]).exit_code == 0


def test_the_runs_own_reranker_is_served_where_it_passed_its_gate(
    tiny_llama, tiny_model, base, tmp_path, capsys
):
    run = load(config_of(tmp_path, tiny_llama, tiny_model, base), "single", CLUSTER, [])
    serving = run.config.serving
    assert with_reranker(run, serving).reranker is None
    assert "reranker/model is not built; /v1/rerank is answered by similarity" in capsys.readouterr().err
    place = run.place.child("reranker/model")
    ArtefactWriter(place, "reranker", "c", {}, "local").commit({})
    shutil.copytree(base, place.local, dirs_exist_ok=True)
    verdict = {"verdict": "refused", "reasons": ["worse"], "weights": ModelFolder(place.local).weights}
    place.write_json("gate.json", verdict)
    assert with_reranker(run, serving).reranker is None
    assert "the reranker is not served" in capsys.readouterr().err
    ungated = serving.model_copy(update={"require_gate": False})
    assert with_reranker(run, ungated).reranker == str(place.local)
    place.write_json("gate.json", {**verdict, "verdict": "passed"})
    assert with_reranker(run, serving).reranker == str(place.local)
    stated = serving.model_copy(update={"reranker": "other"})
    assert with_reranker(run, stated).reranker == "other"


@pytest.mark.ray
def test_a_run_trains_scores_and_judges_its_reranker(ray_local, tiny_llama, tiny_model, base, tmp_path):
    run = load(config_of(tmp_path, tiny_llama, tiny_model, base), "single", CLUSTER, [])
    built = build_missing(run)
    assert [name for name in built if name.startswith("reranker/")] == NODES
    assert build_missing(run) == []
    lines = execute(run, None, dry_run=False).splitlines()
    summary = run.place.read_json("summary.json")
    verdict = summary["reranker"]
    assert summary["stages"]["reranker/model"]["steps"] == 3
    held_out = summary["stages"]["corpus"]["pairs_by_split"]["test"]
    assert held_out and summary["stages"]["reranker/evaluation"]["pairs"] == 5 * held_out
    assert any(line.startswith("heldout: reranked ") for line in lines)
    assert any(
        line.startswith(f"reranker: merged and reranker against merged: {verdict['verdict']}")
        for line in lines
    )
    folder = run.place.child("reranker/model").local
    assert json.loads((folder / "gate.json").read_text())["verdict"] == verdict["verdict"]
    assert PairEncoder.open(folder, dtype="float32").pairs.max_tokens == 100
    assert "reranker/model" in (run.place.local / "report.html").read_text()
