"""Scores of local folders against BEIR's own evaluator and plain mteb, on folders with one oddity each.

BEIR's loader and evaluator are written down here as they stand in its repository (beir/datasets/data_loader.py,
beir/retrieval/evaluation.py, beir/retrieval/search/dense/exact_search.py), over the same pytrec_eval.
"""

import csv
import json

import numpy as np
import pytest
import pytrec_eval
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from embedloom.config.evaluation import EvaluationTask
from embedloom.encoder.model import Encoder
from embedloom.errors import DataError
from embedloom.evaluation.scoring import EncoderModel, run_mteb, score_subset
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.tasks import build_task

TOPICS = [
    "rivers",
    "Gräben",
    "山",
    "graphs",
    "شجرة",
    "matrices",
    "zebras",
    "ice",
    "wind",
    "salt",
    "stone",
    "moss",
]
K = (1, 3, 5, 10, 100)


def documents(prefix="d", count=12, start=0):
    return [
        {"_id": f"{prefix}{n}", "title": "", "text": f"chapter {n} on {TOPICS[n % len(TOPICS)]}"}
        for n in range(start, start + count)
    ]


def queries(prefix="q", count=6):
    return [{"_id": f"{prefix}{n}", "text": f"{TOPICS[n]}?"} for n in range(count)]


def lines(*rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in (("query-id", "corpus-id", "score"), *rows))


ONE_EACH = [(f"q{n}", f"d{n}", 1) for n in range(6)]
FOLDERS = {
    "plain": (documents(), queries(), lines(*ONE_EACH)),
    # ArguAna, Quora: a query is a document, and nobody judged it.
    "queries are documents": (
        documents("a"), [{"_id": f"a{n}", "text": f"chapter {n} on {TOPICS[n]}"} for n in range(6)],
        lines(*((f"a{n}", f"a{n + 6}", 1) for n in range(6))),
    ),
    "judged as nothing": (
        documents("a"), [{"_id": f"a{n}", "text": f"chapter {n} on {TOPICS[n]}"} for n in range(6)],
        lines(*((f"a{n}", f"a{n + 5}", 1) for n in range(6)), ("a1", "a1", 0), ("a2", "a2", 0)),
    ),
    # FiQA: both are numbered, from different lists.
    "ids alike by chance": (documents(""), queries(""), lines(*((str(n), str(n + 3), 1) for n in range(6)))),
    "grades as floats": (documents(), queries(), lines(*((q, d, "2.0") for q, d, _ in ONE_EACH), ("q0", "d7", "1.0"))),
    "graded": (documents(), queries(), lines(*ONE_EACH, ("q0", "d3", 3), ("q1", "d4", 2), ("q1", "d5", 0))),
    "negative grades": (documents(), queries(), lines(*ONE_EACH, ("q0", "d3", -1), ("q4", "d4", -2))),
    "judged documents absent": (documents(), queries(), lines(*ONE_EACH, ("q0", "gone", 2), ("q3", "lost", 1))),
    "an empty query": (documents(), [*queries(), {"_id": "q9", "text": ""}], lines(*ONE_EACH, ("q9", "d9", 1))),
    "equal documents": (
        [*documents(), *({**one, "_id": f"z{one['_id']}"} for one in documents())], queries(),
        lines(*((q, d, 1) for q, d, _ in ONE_EACH[:3]), *((q, f"z{d}", 1) for q, d, _ in ONE_EACH[3:])),
    ),
    "blank lines": (documents(), queries(), lines(*ONE_EACH[:3]) + "\n  \n\t\t\n" + lines(*ONE_EACH[3:]).split("\n", 1)[1] + "\n"),
    "whole numbers as ids": (
        [{**one, "_id": n + 100} for n, one in enumerate(documents())], [{**one, "_id": n} for n, one in enumerate(queries())],
        lines(*((n, n + 100, 1) for n in range(6))),
    ),
    "several positives": (documents(), queries(), lines(*ONE_EACH, *((f"q{n}", f"d{n + 4}", 1) for n in range(6)))),
    "queries nobody judged": (documents(), queries(count=10), lines(*ONE_EACH[2:])),
    "nothing relevant to a query": (documents(), queries(), lines(*ONE_EACH[:4], ("q4", "d1", 0), ("q5", "d2", 0))),
    "titles alone, and none": (
        [{"_id": "t", "title": "rivers?", "text": ""}, {"_id": "u", "title": "ice?"}, *documents()], queries(),
        lines(*ONE_EACH, ("q0", "t", 1)),
    ),
    "a document said twice": ([*documents(), documents()[3]], queries(), lines(*ONE_EACH)),
    "a judgement said twice": (documents(), queries(), lines(*ONE_EACH, ("q0", "d0", 2), ("q1", "d7", 1), ("q1", "d7", 0))),
    "ids with blanks and marks": (
        [{**one, "_id": f"文 {one['_id']}#é"} for one in documents()], queries(), lines(*((q, f"文 {d}#é", 1) for q, d, _ in ONE_EACH)),
    ),
    "fewer documents than places": (documents(count=3), queries(count=3), lines(*ONE_EACH[:3])),
}  # fmt: skip


def write(folder, content):
    corpus, asked, judged = content
    for name, rows in (("corpus.jsonl", corpus), ("queries.jsonl", asked)):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_text(judged, encoding="utf-8")
    return folder


def read_as_beir(folder):
    """GenericDataLoader.load; its ``int(row[2])`` refuses "1.0", which is read as the number it is."""
    corpus, asked, qrels = {}, {}, {}
    for line in (folder / "corpus.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        corpus[str(row["_id"])] = (row.get("title") or "", row.get("text") or "")
    for line in (folder / "queries.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        asked[str(row["_id"])] = row["text"]
    with (folder / "qrels/test.tsv").open(encoding="utf-8") as stream:
        reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_MINIMAL)
        next(reader)
        for row in reader:
            if any(field.strip() for field in row):
                # Below 0 is "not relevant" as well; pytrec_eval 0.5 ends in a segmentation fault there.
                qrels.setdefault(row[0], {})[row[1]] = max(0, int(float(row[2])))
    return corpus, {key: asked[key] for key in qrels}, qrels


def rank(encoder, corpus, asked):
    """Every document's similarity to every query, as float32 sums would give them."""
    texts = [f"{title} {text}".strip() for title, text in corpus.values()]
    found = encoder.embed(list(asked.values()), "query") @ encoder.embed(texts, "document").T
    return {
        query: {document: float(score) for document, score in zip(corpus, scores, strict=True)}
        for query, scores in zip(asked, found, strict=True)
    }


def evaluate_as_beir(qrels, results, ignore_identical_ids=True):
    """EvaluateRetrieval.evaluate, its means not rounded; and each query's nDCG@10."""
    if ignore_identical_ids:
        results = {
            query: {document: score for document, score in found.items() if document != query}
            for query, found in results.items()
        }
    measures = {f"{name}.{','.join(map(str, K))}" for name in ("ndcg_cut", "map_cut", "recall", "P")}
    scores = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(results)
    names = {"ndcg_at": "ndcg_cut", "map_at": "map_cut", "recall_at": "recall", "precision_at": "P"}
    means = {
        f"{ours}_{k}": float(np.mean([found[f"{theirs}_{k}"] for found in scores.values()]))
        for ours, theirs in names.items()
        for k in K
    }
    return means, {query: found["ndcg_cut_10"] for query, found in scores.items()}


def plain_mteb_task(corpus, asked, qrels, ignore_identical_ids):
    metadata = TaskMetadata(
        name="Plain", description="-", dataset={"path": "local/plain", "revision": "1"}, type="Retrieval", category="t2t",
        eval_splits=["test"], eval_langs=["und-Zyyy"], main_score="ndcg_at_10", is_public=False,
    )  # fmt: skip
    members = {"metadata": metadata, "ignore_identical_ids": ignore_identical_ids}
    task = type("Plain", (AbsTaskRetrieval,), members)()
    titles, texts = zip(*corpus.values(), strict=True)
    split = {
        "corpus": Dataset.from_dict({"id": list(corpus), "title": list(titles), "text": list(texts)}),
        "queries": Dataset.from_dict({"id": list(asked), "text": list(asked.values())}),
        "relevant_docs": qrels,
        "top_ranked": None,
    }
    task.dataset, task.data_loaded = {"default": {"test": split}}, True
    return task


@pytest.fixture(scope="module")
def model(tiny_model):
    return EncoderModel(Encoder.load(tiny_model, threads=1, dtype="float32"), "test/tiny", "1")


def scored(model, folder, **task):
    (spec,) = expand_tasks([EvaluationTask(name="mine", kind="beir", path=str(folder), **task)])
    files, items = score_subset(model, build_task(spec, None))
    (entry,) = json.loads(files["mine.json"])["scores"]["test"]
    return entry, {row["item"]: row["value"] for row in items.to_pylist()}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_odd_folder_scores_as_in_beir_and_mteb(tmp_path, model, name):
    folder = write(tmp_path / "in", FOLDERS[name])
    entry, items = scored(model, folder)
    corpus, asked, qrels = read_as_beir(folder)
    means, by_query = evaluate_as_beir(qrels, rank(model.encoder, corpus, asked))
    assert items == pytest.approx(by_query, abs=1e-9)
    assert float(np.mean(list(items.values()))) == pytest.approx(means["ndcg_at_10"], abs=1e-9)
    assert {key: entry[key] for key in means} == pytest.approx(
        means, abs=5.1e-6
    )  # mteb rounds to five places
    files = run_mteb(model, plain_mteb_task(corpus, asked, qrels, True))
    (theirs,) = json.loads(files["Plain.json"])["scores"]["test"]
    numbers = {
        key: value for key, value in theirs.items() if isinstance(value, float) and not np.isnan(value)
    }
    assert {key: entry[key] for key in numbers} == pytest.approx(numbers, abs=1e-9)
    assert len(numbers) > 30


def test_judgements_of_absent_documents_are_counted_and_said(tmp_path, capsys):
    folder = write(tmp_path / "in", FOLDERS["judged documents absent"])
    (spec,) = expand_tasks([EvaluationTask(name="mine", kind="beir", path=str(folder))])
    said = "2 relevant judgements name documents that the corpus lacks; they count as not found"
    assert said in build_task(spec, None).metadata.description
    assert said in capsys.readouterr().err


def test_a_perfect_ranking_of_queries_that_are_documents_scores_one(tmp_path, model):
    """By hand: with itself at the top of the ranking the query's right document is second, 1 / log2(3)."""
    texts = {"near": ("", "ملح وحجر"), "far": ("", "zebras")}
    scores = rank(model.encoder, texts, {"q": "ملح"})["q"]
    itself, right = sorted(scores, key=scores.__getitem__, reverse=True)
    corpus = [{"_id": "q", "text": texts[itself][1]}, {"_id": "right", "text": texts[right][1]}]
    folder = write(tmp_path / "in", (corpus, [{"_id": "q", "text": "ملح"}], lines(("q", "right", 1))))
    assert scored(model, folder)[0]["ndcg_at_10"] == 1.0
    kept = scored(model, folder, ignore_identical_ids=False)[0]["ndcg_at_10"]
    assert kept == pytest.approx(1 / np.log2(3), abs=5.1e-6)


def test_a_table_that_numbers_questions_and_answers_alike_keeps_its_answers(tmp_path, model):
    """A document judged relevant to the query of its id is no query: BEIR's evaluator would leave every answer out."""
    content = (documents(""), queries(""), lines(*((str(n), str(n), 1) for n in range(6))))
    folder = write(tmp_path / "in", content)
    entry, items = scored(model, folder)
    corpus, asked, qrels = read_as_beir(folder)
    results = rank(model.encoder, corpus, asked)
    means, by_query = evaluate_as_beir(qrels, results, ignore_identical_ids=False)
    assert items == pytest.approx(by_query, abs=1e-9) and entry["ndcg_at_10"] > 0
    left_out = scored(model, folder, ignore_identical_ids=True)[0]
    assert left_out["ndcg_at_10"] == evaluate_as_beir(qrels, results)[0]["ndcg_at_10"] == 0
    assert means["recall_at_100"] == entry["recall_at_100"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qrels/test.tsv", lines(("q0", "d0", 0.5)), r"test\.tsv: q0, d0: 0\.5 is no whole-number score \(1 or 1\.0\)"),
        ("qrels/test.tsv", lines(("q0", "d0")), r"test\.tsv: line 2 .*; expected query-id"),
        ("qrels/test.tsv", lines(("q0", "d0", "nan")), r"test\.tsv: line 2 .*; expected"),
        ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": "d0", "text": "b"}\n', r"'d0' stands twice"),
        ("corpus.jsonl", '{"_id": "d0"}\n', r"corpus\.jsonl: line 1 has no key 'text'"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_named(tmp_path, model, name, content, message):
    folder = write(tmp_path / "in", FOLDERS["plain"])
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        scored(model, folder)


def test_only_local_rankings_take_the_switch():
    with pytest.raises(ValueError, match="kind mteb takes no ignore_identical_ids; allowed: beir, local"):
        EvaluationTask(name="STS12", kind="mteb", ignore_identical_ids=True)
    assert "ignore_identical_ids" not in EvaluationTask(name="heldout").model_dump(mode="json")
