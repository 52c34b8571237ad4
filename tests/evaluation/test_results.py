"""The result tree: mteb's layout, written by one hand, task by task."""

import json

import pytest

from embedloom.config.use import EvaluationTask
from embedloom.evaluation.pool import next_unit
from embedloom.evaluation.results import Outcome, Scorer, Unit, read_scores, save_outcome, score_table
from embedloom.storage import Place

SCORER = Scorer("merged", "models", "embedloom/merged", "abc")
BM25 = Scorer("bm25", "baselines", "mteb/baseline-bm25s", "1")


def unit(scorer, task="first"):
    return Unit(scorer, EvaluationTask(name=task))


def outcome(task, *mains, setting="one"):
    entries = [{"main_score": main, "ndcg_at_10": main, "hf_subset": str(n)} for n, main in enumerate(mains)]
    settings = json.dumps({"task": task, "setting": setting}) + "\n"
    files = {
        f"{task}.json": json.dumps({"scores": {"test": entries}}),
        "model_meta.json": "{}",
        "run_settings.jsonl": settings,
    }
    return Outcome({name: text.encode() for name, text in files.items()}, {"tokens": 5})


def test_scores_are_means_over_subsets_and_stay_apart_by_group(tmp_path):
    place = Place(str(tmp_path))
    save_outcome(place, unit(SCORER), outcome("first", 0.1, 0.30001))
    save_outcome(place, unit(BM25), outcome("first", 0.5))
    assert read_scores(place, unit(SCORER)) == {"main_score": 0.200005, "ndcg_at_10": 0.200005}
    table = score_table(place, [unit(SCORER), unit(BM25)])
    assert table["models"] == {"merged": {"first": 0.200005}}
    assert table["baselines"] == {"bm25": {"first": 0.5}}
    assert unit(SCORER).result_path == "results/embedloom__merged/abc/first.json"


def test_run_settings_keep_one_line_a_task(tmp_path):
    place = Place(str(tmp_path))
    for task, setting in (("second", "one"), ("first", "one"), ("second", "two")):
        save_outcome(place, unit(SCORER, task), outcome(task, 0.1, setting=setting))
    lines = place.read_bytes("results/embedloom__merged/abc/run_settings.jsonl").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"task": "first", "setting": "one"},
        {"task": "second", "setting": "two"},
    ]


def test_result_is_written_last(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Place, "write_bytes", lambda self, name, content: written.append(name))
    save_outcome(Place(str(tmp_path)), unit(SCORER), outcome("first", 0.1))
    assert written[-1] == unit(SCORER).result_path
    assert len(written) == 4


@pytest.mark.parametrize(
    ("loaded", "elsewhere", "expected"),
    [
        ("b", [], ("b", 1)),  # the model it has warm
        (None, ["a"], ("b", 1)),  # a model nobody loads yet
        (None, ["a", "b"], ("a", 1)),  # else help with any
        ("c", [], ("a", 1)),
    ],
)
def test_idle_actor_prefers_its_own_model(loaded, elsewhere, expected):
    scorers = {name: Scorer(name, "models", f"x/{name}", "1") for name in "abc"}
    pending = [Unit(scorers[name], number) for name, number in (("a", 1), ("a", 2), ("b", 1), ("b", 2))]
    chosen = next_unit(pending, scorers.get(loaded), [scorers[name] for name in elsewhere])
    assert (chosen.scorer.name, chosen.task) == expected
