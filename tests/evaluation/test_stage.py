"""The evaluation stage on a real Ray: scores, resume, failures."""

import json
from pathlib import Path

import pytest
from mteb.cache import ResultCache

from embedloom.config.cluster import PoolConfig
from embedloom.config.evaluation import EvaluationConfig, EvaluationTask
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError, StageError
from embedloom.evaluation.evaluator import ScoringPool
from embedloom.evaluation.jobs import Job
from embedloom.evaluation.stage import evaluate
from fakes_evaluation import DyingActor, make_beir, make_corpus

POOL = PoolConfig()


def writer(folder: Path) -> ArtefactWriter:
    return ArtefactWriter(Place(str(folder)), "evaluation", "config", {}, "local")


def result_files(folder: Path) -> dict[str, int]:
    found = [path for path in (folder / "results").rglob("*.json") if path.name != "model_meta.json"]
    return {str(path.relative_to(folder / "results")): path.stat().st_mtime_ns for path in found}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_failed_task_is_named_the_rest_is_kept_and_a_rerun_computes_only_what_is_missing(
    tmp_path, tiny_model
):
    corpus = make_corpus(tmp_path / "corpus")
    beir = make_beir(tmp_path / "beir")
    qrels = beir / "qrels" / "test.tsv"
    good = qrels.read_text()
    qrels.write_text("query-id\tcorpus-id\tscore\nnobody\tdoc-zip\t1\n")
    config = EvaluationConfig(
        tasks=(EvaluationTask(name="heldout"), EvaluationTask(name="folder", kind="beir", path=str(beir)))
    )
    models = {"merged": tiny_model, "base": tiny_model}
    out = tmp_path / "evaluation"

    with pytest.raises(
        StageError, match=r"1 tasks or scores failed.*folder: DataError.*'nobody' is not in queries"
    ):
        evaluate(config, corpus, models, ("org/teacher", tiny_model), POOL, writer(out), "float32")
    assert not (out / "manifest.json").exists()
    kept = result_files(out)
    assert {Path(name).name for name in kept} == {"heldout.json"}
    assert len(kept) == 4

    qrels.write_text(good)
    artefact = evaluate(config, corpus, models, ("org/teacher", tiny_model), POOL, writer(out), "float32")
    files = result_files(out)
    assert len(files) == 8
    assert {name: files[name] for name in kept} == kept  # untouched

    scores = json.loads((out / "scores.json").read_text())
    assert scores["order"] == {
        "models": ["merged", "base"],
        "baselines": ["bm25", "teacher"],
        "tasks": ["heldout", "folder"],
    }
    assert scores["models"]["base"] == scores["models"]["merged"] == scores["baselines"]["teacher"]
    assert scores["teacher"] == "org/teacher"
    assert scores["baselines"]["bm25"]["heldout"] == 1.0
    assert set(scores["metrics"]["models"]["base"]["heldout"]) == {
        "main_score",
        "ndcg_at_10",
        "recall_at_100",
        "mrr_at_10",
    }
    assert artefact.counts["rows"] == 12
    assert artefact.counts["tasks"] == 2
    assert artefact.counts["tokens"] > 0
    assert artefact.manifest["details"]["tasks"]["folder"]["documents"] == 6

    # mteb's own cache reads the folder as one it wrote itself.
    stored = ResultCache(out).load_task_result("heldout", "embedloom/base", ModelFolder(tiny_model).revision)
    assert stored.get_score() == pytest.approx(scores["models"]["base"]["heldout"], abs=1e-6)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_job_whose_actor_dies_is_tried_again_once_and_takes_its_dependants_with_it(tmp_path):
    always, once, other = (Job(label) for label in ("always", "once", "other"))
    after = Job("after", needs=(always,))
    last = Job("last", needs=(once, other))
    saved = []
    actors = ScoringPool(DyingActor, (tmp_path / "died",), PoolConfig(max_actors=2), 5)
    try:
        failures = actors.run(
            [after, last, always, once, other],
            lambda job, outcome: saved.append((job.label, outcome.figures["tokens"])),
        )
        again = actors.run([Job("second call")], lambda job, outcome: saved.append((job.label, 2)))
    finally:
        actors.close()
    assert sorted(saved[:3]) == [("last", 1), ("once", 1), ("other", 1)]
    assert saved[2] == ("last", 1)
    assert saved[3:] == [("second call", 2)] and not again
    assert {job.label for job in failures} == {"always", "after"}
    assert "needs always, which failed" in failures[after]


@pytest.mark.parametrize(
    ("config", "teacher", "error", "message"),
    [
        ({"baselines": ("teacher",)}, None, ConfigError, "evaluation.baselines: names 'teacher'"),
        ({"tasks": (EvaluationTask(name="heldout", split="dev"),)}, None, DataError, "documents/dev"),
        (
            {"tasks": (EvaluationTask(name="gone", kind="beir", path="/nowhere"),)},
            None,
            DataError,
            "/nowhere/corpus.jsonl is missing",
        ),
        ({"baselines": ("teacher",)}, ("t", Path("/nowhere")), DataError, "/nowhere: no .*safetensors"),
        ({"baselines": ("bm25",), "pool": "/nowhere"}, None, DataError, "pool: /nowhere does not exist"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_any_actor_starts(tmp_path, config, teacher, error, message):
    with pytest.raises(error, match=message):
        evaluate(
            EvaluationConfig(**config),
            make_corpus(tmp_path / "c"),
            {},
            teacher,
            POOL,
            writer(tmp_path / "e"),
            "float32",
        )


def test_revision_follows_the_manifest_or_else_the_content(tmp_path, tiny_model):
    plain = ModelFolder(tiny_model).revision
    assert plain == ModelFolder(tiny_model).revision
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_model.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    assert ModelFolder(copy).revision == plain
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert ModelFolder(copy).revision != plain
    out = ArtefactWriter(Place(str(tmp_path / "model")), "model", "config", {}, "local")
    assert out.commit({}).fingerprint == ModelFolder(tmp_path / "model").revision
