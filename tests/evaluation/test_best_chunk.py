"""A cut document counts by its best chunk in held-out scores: by hand, and beside mteb's score of the whole ranking."""

import json
import math

import pytest

from embedloom.config.evaluation import EvaluationTask
from embedloom.core.schemas import table_from_rows
from embedloom.evaluation.retrieval_task import by_best_chunk, read_heldout
from embedloom.evaluation.scoring import EncoderModel, score_subset
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.tasks import build_task
from fakes_evaluation import FixedEncoder, document, make_corpus, pair

# Angles to the query in degrees: the order of a ranking by cosine.
ANGLES = {"a1": 50, "a2": 10, "a3": 70, "b": 20, "c1": 30, "c2": 40}
CUT = {"a1": ("a", 1), "a2": ("a", 2), "a3": ("a", 3), "c1": ("c", 1), "c2": ("c", 2), "elsewhere": ("c", 3)}


def chunked(folder, judged):
    """Documents a (three chunks), b (whole) and c (two here, one in another split); pairs name first chunks."""
    pairs = [pair(name, "which?", f"doc-{name}") for name in judged]
    corpus = make_corpus(folder, pairs=pairs)
    rows = [document(name, f"text {name}") for name in ANGLES]
    corpus.place.write_table("documents/test/part-000000.parquet", table_from_rows("documents", rows))
    chunks = [
        {"id": f"doc-{name}", "document_id": owner, "chunk": number, "chunks": 3}
        for name, (owner, number) in CUT.items()
    ]
    corpus.place.write_table("chunks/part-000000.parquet", table_from_rows("chunks", chunks))
    return corpus


def scores(corpus):
    vectors = {
        f"text {name}": [math.cos(math.radians(a)), math.sin(math.radians(a))] for name, a in ANGLES.items()
    }
    (spec,) = expand_tasks([EvaluationTask(name="own")])
    model = EncoderModel(FixedEncoder({"which?": [1.0, 0.0], **vectors}), "test/fixed", "1")
    task = build_task(spec, corpus)
    files, items = score_subset(model, task)
    (entry,) = json.loads(files["own.json"])["scores"]["test"]
    (item,) = items.to_pylist()
    return entry, item["value"], task.metadata


def test_a_document_stands_where_its_best_chunk_does(tmp_path):
    """Documents rank a (10 degrees), b (20), c (30). With b and c judged: ranks 2 and 3 of an ideal 1 and 2."""
    entry, item, metadata = scores(chunked(tmp_path / "first", ["a1"]))
    assert (entry["ndcg_at_10"], item) == (1.0, 1.0)  # a1 alone would be fifth: .387
    assert "ranks documents by their best chunk" in metadata.description
    entry, item, _ = scores(chunked(tmp_path / "others", ["b", "c1"]))
    expected = (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert item == pytest.approx(expected, abs=1e-9)
    assert entry["recall_at_1"] == 0 and entry["recall_at_3"] == 1  # three documents, whatever their chunks


def test_whole_documents_are_scored_as_ever(tmp_path):
    corpus = make_corpus(tmp_path / "whole")
    data = read_heldout(corpus, "test", "here")
    assert data.owners == {}
    (spec,) = expand_tasks([EvaluationTask(name="own")])
    task = build_task(spec, corpus)
    assert "_evaluate_subset" not in vars(type(task)) and "chunk" not in task.metadata.description


def test_of_a_document_cut_across_splits_the_first_chunk_here_stands_for_it(tmp_path):
    corpus = chunked(tmp_path / "corpus", ["a1"])
    rows = [document(name, f"text {name}") for name in ("a2", "a3", "b")]
    corpus.place.write_table("documents/test/part-000000.parquet", table_from_rows("documents", rows))
    pairs = table_from_rows("pairs", [pair("x", "which?", "doc-a3")])
    corpus.place.write_table("pairs/test/part-000000.parquet", pairs)
    data = read_heldout(corpus, "test", "here")
    assert data.owners == {"doc-a2": "doc-a2", "doc-a3": "doc-a2"}
    assert list(data.qrels.values()) == [{"doc-a2": 1}]


def test_the_highest_score_counts_also_below_zero():
    ranking = {"q": {"a1": -0.9, "a2": -0.2, "b": -0.5}, "none": {}}
    assert by_best_chunk(ranking, {"a1": "a", "a2": "a"}) == {"q": {"a": -0.2, "b": -0.5}, "none": {}}
