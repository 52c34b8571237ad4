"""Pools of scores: Parquet files, mteb results folders, partial and broken ones; places within them."""

import json

import pandas as pd
import pytest

from embedloom.errors import DataError
from embedloom.evaluation.leaderboard import (
    LOCAL_TYPE,
    load_pool,
    ranked_among,
    shown_standings,
    standings,
    task_type,
)


def result(folder, model, task, scores, revision="r1"):
    entries = [{"hf_subset": subset, "main_score": score} for subset, score in scores.items()]
    path = folder / model.replace("/", "__") / revision / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"task_name": task, "dataset_revision": "d", "scores": {"test": entries}}))
    (path.parent / "model_meta.json").write_text("{}")


def test_results_folder_counts_whole_tasks_and_knows_the_partial_ones(tmp_path):
    root = tmp_path / "results"
    result(root, "a/one", "STS12", {"default": 0.8})
    result(root, "a/one", "MyTask", {"x": 0.4, "y": 0.6})
    result(root, "b/two", "MyTask", {"x": 0.9})
    result(root, "b/two", "MyTask", {"x": 0.1}, revision="r0")
    pool = load_pool(tmp_path)
    assert pool.scores == {"a/one": {"STS12": 0.8, "MyTask": 0.5}, "b/two": {"MyTask": 0.9}}
    assert pool.partial == {"b/two": ["MyTask"]}
    assert pool.types == {"STS12": "STS", "MyTask": LOCAL_TYPE}
    assert load_pool(root, {"MyTask": "Retrieval"}).types["MyTask"] == "Retrieval"
    before = pool.fingerprint
    result(root, "b/two", "MyTask", {"x": 0.9, "y": 0.1})
    after = load_pool(root)
    assert after.partial == {} and after.scores["b/two"] == {"MyTask": 0.5}
    assert after.fingerprint != before


def test_of_several_revisions_the_one_with_the_most_tasks_counts(tmp_path):
    result(tmp_path, "a/one", "STS12", {"default": 0.1}, "new")
    result(tmp_path, "a/one", "STS12", {"default": 0.2}, "full")
    result(tmp_path, "a/one", "STS13", {"default": 0.3}, "full")
    assert load_pool(tmp_path).scores == {"a/one": {"STS12": 0.2, "STS13": 0.3}}


def test_parquet_pool_leaves_out_tasks_nobody_has_whole_and_models_off_the_board(tmp_path):
    rows = [
        ("m", "T", "STS", 0.5, 3, 3, True),
        ("n", "T", "STS", 0.6, 2, 3, True),
        ("n", "U", "STS", 0.6, 2, 3, True),
        ("o", "T", "STS", 0.9, 3, 3, False),
    ]
    columns = ["model", "task", "task_type", "score", "n_rows", "n_expected", "on_leaderboard"]
    path = tmp_path / "pool.parquet"
    pd.DataFrame(rows, columns=columns).to_parquet(path)
    pool = load_pool(path)
    assert pool.scores == {"m": {"T": 0.5}, "n": {"T": 0.6}}
    assert pool.partial == {"n": ["T"]} and pool.dropped == ("U",) and pool.types == {"T": "STS"}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), r"holds no <model>/<revision>/<task>\.json"),
        (lambda path: pd.DataFrame({"model": ["m"]}).to_parquet(path), "no column 'task'"),
        (
            lambda path: pd.DataFrame(
                {"model": ["m", "m"], "task": ["t", "t"], "task_type": ["x", "x"], "score": [1.0, 2.0]}
            ).to_parquet(path),
            "model 'm' has two scores on 't'",
        ),
        (
            lambda path: (
                (path / "m" / "r").mkdir(parents=True) or (path / "m" / "r" / "t.json").write_text("[]")
            ),
            r"m/r/t\.json: not an mteb result file",
        ),
    ],
)
def test_pools_that_cannot_be_read_are_named(tmp_path, prepare, message):
    path = tmp_path / "pool"
    prepare(path)
    with pytest.raises(DataError, match=message):
        load_pool(path)


def test_own_models_are_ranked_among_the_pool_on_the_tasks_both_have(tmp_path):
    for number in range(5):
        result(tmp_path, f"p/{number}", "STS12", {"default": 0.1 * (number + 1)})
        result(tmp_path, f"p/{number}", "STS13", {"default": 0.5})
    table = {"models": {"mine": {"STS12": 0.35, "Local": 0.9}}, "baselines": {"bm25": {}}}
    found = standings(table, {"STS12": "STS", "Local": "Retrieval"}, str(tmp_path))
    assert found["tasks"] == ["STS12"] and found["pool_models"] == 6
    assert found["models"]["mine"]["votes"] == 3.0 and found["models"]["mine"]["rank"] == 3
    assert [row["model"] for row in found["shown"] if row["own"]] == ["mine"]
    alone = standings(table, {"STS12": "STS", "Local": "Retrieval"}, None)
    assert alone["tasks"] == ["Local", "STS12"] and alone["pool_fingerprint"] is None
    with pytest.raises(DataError, match="has none of the tasks Local"):
        standings({"models": {"mine": {"Local": 1.0}}, "baselines": {}}, {"Local": "STS"}, str(tmp_path))
    with pytest.raises(DataError, match="has a model named 'p/0'"):
        ranked_among({"p/0": {"STS12": 1.0}}, {"STS12": "STS"}, load_pool(tmp_path))


def test_the_shown_part_of_a_long_board_has_the_top_and_our_neighbours(tmp_path):
    scores = {f"m{number:02}": {"STS12": 1 - number / 100} for number in range(30)}
    ranked, _ = ranked_among(scores, {"STS12": "STS"}, None)
    shown = [standing.rank for standing in shown_standings(ranked, {"m20"}, top=3, around=1)]
    assert shown == [1, 2, 3, 20, 21, 22]


def test_types_of_mtebs_tasks_are_known():
    assert task_type("NFCorpus") == "Retrieval"
    assert task_type("no such task") == LOCAL_TYPE
