"""Reranking as a model of mteb's: against scores worked out by the library's own predict, and the verdict against scipy-free arithmetic."""

import json
import shutil

import numpy as np
import pytest
import torch

from embedloom.config.cluster import PoolConfig
from embedloom.config.evaluation import EvaluationConfig, EvaluationTask
from embedloom.config.reranker import RerankerConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.encoder.pairs import PairEncoder
from embedloom.errors import ConfigError
from embedloom.evaluation.reranked_search import RerankedSearch, reordered
from embedloom.evaluation.reranking import evaluate_reranker, judge_reranker
from embedloom.evaluation.retrieval_task import Query, RetrievalData, make_retrieval_task
from embedloom.evaluation.scoring import EncoderModel, score_subset
from fakes_evaluation import TOPICS, make_corpus
from fakes_mining import make_tiny_cross_encoder


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return make_tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "model", seed=3)


def test_the_first_ones_are_ordered_by_logit_and_stay_before_all_others():
    scores = {"a": 5.0, "b": 4.0, "c": 3.0, "d": -2.0}
    found = reordered(scores, {"a": -9.0, "b": 0.5})
    assert sorted(found, key=lambda name: -found[name]) == ["b", "a", "c", "d"]
    assert (found["c"], found["d"]) == (3.0, -2.0)
    assert reordered(scores, {}) == scores
    everything = reordered(scores, dict(zip("abcd", [1.0, 2.0, 3.0, 4.0], strict=True)))
    assert sorted(everything, key=lambda name: -everything[name]) == ["d", "c", "b", "a"]


def retrieval_task():
    """Queries in two languages; one has two right answers, of different grades."""
    documents = [(name, "", text) for name, (_, text) in TOPICS.items()] + [
        ("tri", "Sortieren", "eine Liste wird sortiert")
    ]
    queries = [Query(f"q-{name}", text) for name, (text, _) in TOPICS.items()] + [
        Query("q-de", "Liste sortieren")
    ]
    qrels = {f"q-{name}": {name: 1} for name in TOPICS} | {"q-de": {"tri": 2, "sort": 1}}
    data = RetrievalData(documents, queries, qrels, ("eng", "deu"), "1", "a test")
    return documents, queries, qrels, make_retrieval_task("both", "test", data)


def ndcg_at_10(ranked, grades):
    gain = sum(grades.get(name, 0) / np.log2(rank + 2) for rank, name in enumerate(ranked[:10]))
    return gain / sum(
        grade / np.log2(rank + 2) for rank, grade in enumerate(sorted(grades.values(), reverse=True))
    )


@pytest.mark.parametrize("top", [2, 4, 50])
def test_scores_of_reranking_are_those_of_the_librarys_logits(tiny_model, reranker, top):
    from sentence_transformers import CrossEncoder

    documents, queries, qrels, task = retrieval_task()
    encoder = Encoder.load(tiny_model, dtype="float32", device="cpu")
    pairs = PairEncoder.open(reranker, dtype="float32", device="cpu")
    model = RerankedSearch(EncoderModel(encoder, "embedloom/first", "1"), pairs, top)
    _, items = score_subset(model, task)
    found = {row["item"]: row["value"] for row in items.to_pylist()}
    texts = [f"{title} {text}".strip() for _, title, text in documents]
    vectors = encoder.embed(texts, "document")
    library = CrossEncoder(str(reranker), device="cpu", max_length=128, model_kwargs={"dtype": torch.float32})
    for query in queries:
        similarities = vectors @ encoder.embed([query.text], "query", "retrieval")[0]
        order = np.argsort(-similarities, kind="stable").tolist()
        best = order[:top]
        logits = library.predict([(query.text, texts[at]) for at in best], activation_fn=torch.nn.Identity())
        ranked = [best[at] for at in np.argsort(-logits, kind="stable")] + order[top:]
        expected = ndcg_at_10([documents[at][0] for at in ranked], qrels[query.id])
        assert found[query.id] == pytest.approx(expected, abs=1e-5)
    assert model.pairs == len(queries) * min(top, len(documents))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_stage_scores_both_and_the_gate_compares_them_query_by_query(tmp_path, tiny_model, reranker):
    corpus = make_corpus(tmp_path / "corpus")
    folder = shutil.copytree(reranker, tmp_path / "reranker")
    config = EvaluationConfig(tasks=(EvaluationTask(name="heldout"),))

    def run():
        out = ArtefactWriter(Place(str(tmp_path / "evaluation")), "reranker", "config", {}, "local")
        return evaluate_reranker(
            config,
            3,
            corpus,
            tiny_model,
            folder,
            PoolConfig(),
            out,
            "float32",
            Place(str(tmp_path / "vectors")),
        )

    artefact = run()
    scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    assert scores["order"]["models"] == ["merged", "reranker"]
    assert artefact.counts["pairs"] == 3 * artefact.counts["queries"] == 18
    rules = RerankerConfig(base="x").gate
    verdict = judge_reranker(rules, artefact.place, tiny_model, folder)
    entry = verdict["tasks"]["heldout"]
    assert entry["current"] == scores["models"]["merged"]["heldout"]
    assert entry["candidate"] == scores["models"]["reranker"]["heldout"]
    # Its random weights are no better than what it orders.
    assert verdict["verdict"] == "refused" and entry["low"] <= entry["difference"] <= entry["high"]
    assert verdict["weights"] == ModelFolder(folder).weights != verdict["against_weights"]


def test_tasks_without_a_ranking_are_refused(tmp_path, tiny_model, reranker):
    folder = tmp_path / "tasks" / "sts"
    folder.mkdir(parents=True)
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"sentence1": "a", "sentence2": "b", "score": 1.0, "lang": "eng", "split": "test"}] * 3
    pq.write_table(pa.Table.from_pylist(rows), folder / "twins.parquet")
    task = EvaluationTask(name="twins", kind="local", path=str(folder / "twins.parquet"))
    out = ArtefactWriter(Place(str(tmp_path / "evaluation")), "reranker", "config", {}, "local")
    with pytest.raises(ConfigError, match=r"reranker: none of evaluation\.tasks ranks documents"):
        evaluate_reranker(
            EvaluationConfig(tasks=(task,)), 3, make_corpus(tmp_path / "corpus"), tiny_model, reranker, PoolConfig(), out,
            "float32", Place(str(tmp_path / "vectors")),
        )  # fmt: skip
