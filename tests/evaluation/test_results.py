"""The result tree: mteb's layout, written by one hand, task by task and subset by subset."""

import json

import pytest

from embedloom.core.storage import Place
from embedloom.evaluation.evaluator import next_job
from embedloom.evaluation.jobs import Job, Outcome, Scorer, Survey, Unit
from embedloom.evaluation.results import finish_task, missing_parts, read_scores, save_outcome, score_table
from embedloom.evaluation.specs import TaskSpec

SCORER = Scorer("merged", "models", "embedloom/merged", "abc")
BM25 = Scorer("bm25", "baselines", "mteb/baseline-bm25s", "1")


def unit(scorer, task="first", subset=None):
    return Unit(scorer, TaskSpec(task), subset)


def outcome(task, scores, setting="one", revision="r1"):
    entries = [
        {"main_score": score, "ndcg_at_10": score, "hf_subset": name, "languages": ["eng-Latn"]}
        for name, score in scores.items()
    ]
    result = {
        "dataset_revision": revision, "task_name": task, "mteb_version": "2.26.0", "evaluation_time": 1.5,
        "scores": {"test": entries},
    }  # fmt: skip
    settings = (
        json.dumps({"task": task, "splits": ["test"], "setting": setting, "subsets": list(scores)}) + "\n"
    )
    files = {f"{task}.json": json.dumps(result), "model_meta.json": "{}", "run_settings.jsonl": settings}
    return Outcome(
        {name: text.encode() for name, text in files.items()},
        {"tokens": 5, "padded_tokens": 6, "queries": 2, "seconds": 1},
    )


def survey(*parts, revision="r1"):
    subsets = tuple(part for part in parts if part is not None) or ("x", "y")
    return Survey("Retrieval", "ndcg_at_10", revision, ("test",), subsets, parts, True, {})


def test_scores_are_means_over_subsets_and_stay_apart_by_group(tmp_path):
    place = Place(str(tmp_path))
    save_outcome(place, unit(SCORER), outcome("first", {"x": 0.1, "y": 0.30001}))
    save_outcome(place, unit(BM25), outcome("first", {"x": 0.5}))
    assert read_scores(place, unit(SCORER)) == {"main_score": 0.200005, "ndcg_at_10": 0.200005}
    table = score_table(place, [unit(SCORER), unit(BM25)])
    assert table["models"] == {"merged": {"first": 0.200005}}
    assert table["baselines"] == {"bm25": {"first": 0.5}}
    assert table["subsets"]["models"] == {"merged": {"first": {"x": 0.1, "y": 0.30001}}}
    assert unit(SCORER).result_path == "results/embedloom__merged/abc/first.json"


def test_subsets_merge_into_one_file_whatever_their_order(tmp_path):
    parts = {"deu": 0.25, "eng": 0.5, "zho": 0.75}
    files = []
    for folder, order in (("a", ["deu", "eng", "zho"]), ("b", ["zho", "deu", "eng"])):
        place = Place(str(tmp_path / folder))
        for subset in order:
            left = missing_parts(place, unit(SCORER), survey(*parts))
            assert subset in left
            save_outcome(
                place, unit(SCORER, subset=subset), outcome("first", {subset: parts[subset]}), list(parts)
            )
        assert missing_parts(place, unit(SCORER), survey(*parts)) == []
        files.append(
            {path.name: path.read_bytes() for path in (tmp_path / folder / "results").rglob("*.json*")}
        )
    assert files[0] == files[1]
    assert json.loads(files[0]["first.json"])["evaluation_time"] == 4.5
    assert json.loads(files[0]["run_settings.jsonl"])["subsets"] == ["deu", "eng", "zho"]
    finish_task(place, unit(SCORER), survey(*parts), tokens=100, padded=110)
    assert place.read_json(unit(SCORER).figures_path) == {
        "tokens": 115, "padded_tokens": 128, "seconds": 3, "queries": 6, "type": "Retrieval", "metric": "ndcg_at_10",
    }  # fmt: skip


def test_a_result_on_other_data_counts_as_missing(tmp_path):
    place = Place(str(tmp_path))
    save_outcome(place, unit(SCORER, subset="x"), outcome("first", {"x": 0.5}))
    assert missing_parts(place, unit(SCORER), survey("x", "y")) == ["y"]
    assert missing_parts(place, unit(SCORER), survey("x", "y", revision="r2")) == ["x", "y"]
    save_outcome(place, unit(SCORER, subset="y"), outcome("first", {"y": 0.1}, revision="r2"))
    assert missing_parts(place, unit(SCORER), survey("x", "y", revision="r2")) == ["x"]


def test_a_task_scored_in_one_go_is_missing_until_every_subset_is_there(tmp_path):
    place = Place(str(tmp_path))
    save_outcome(place, unit(SCORER), outcome("first", {"x": 0.5}))
    assert missing_parts(place, unit(SCORER), survey(None)) == [None]
    save_outcome(place, unit(SCORER), outcome("first", {"x": 0.5, "y": 0.5}))
    assert missing_parts(place, unit(SCORER), survey(None)) == []


def test_run_settings_keep_one_line_a_task(tmp_path):
    place = Place(str(tmp_path))
    for task, setting in (("second", "one"), ("first", "one"), ("second", "two")):
        save_outcome(place, unit(SCORER, task), outcome(task, {"x": 0.1}, setting=setting))
    lines = place.read_bytes("results/embedloom__merged/abc/run_settings.jsonl").splitlines()
    assert [(entry["task"], entry["setting"]) for entry in map(json.loads, lines)] == [
        ("first", "one"),
        ("second", "two"),
    ]


def test_result_is_written_last(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Place, "write_bytes", lambda self, name, content: written.append(name))
    save_outcome(Place(str(tmp_path)), unit(SCORER), outcome("first", {"x": 0.1}))
    assert written[-1] == unit(SCORER).result_path
    assert len(written) == 4


@pytest.mark.parametrize(
    ("loaded", "elsewhere", "expected"),
    [
        ("b", [], "b1"),  # the model it has warm
        (None, ["a"], "b1"),  # a model nobody loads yet
        (None, ["a", "b"], "a1"),  # else help with any
        ("c", [], "a1"),
    ],
)
def test_idle_actor_prefers_its_own_model(loaded, elsewhere, expected):
    scorers = {name: Scorer(name, "models", f"x/{name}", "1") for name in "abc"}
    ready = [
        Job(f"{name}{number}", scorers[name]) for name, number in (("a", 1), ("a", 2), ("b", 1), ("b", 2))
    ]
    assert next_job(ready, scorers.get(loaded), [scorers[name] for name in elsewhere]).label == expected
