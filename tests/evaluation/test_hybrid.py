"""The hybrid row: what mteb scores is what the endpoint finds, on corpora, candidates and cut documents."""

import json
from pathlib import Path

import bm25s
import numpy as np
import pytest
import yaml
from mteb.models.models_protocols import SearchProtocol

from embedloom.compute.shards import run_here
from embedloom.config.cluster import PoolConfig
from embedloom.config.embedding import EmbeddingConfig, LexicalConfig
from embedloom.config.run import RunConfig
from embedloom.config.serving import SearchConfig
from embedloom.core.text import search_terms
from embedloom.evaluation.hybrid import HybridSearch
from embedloom.evaluation.retrieval_task import Query, RetrievalData, make_retrieval_task
from embedloom.evaluation.scorers import make_scorers
from embedloom.evaluation.scoring import EncoderModel, run_mteb
from embedloom.retrieval.inputs import open_input
from embedloom.retrieval.ledger import open_ledger
from embedloom.retrieval.lexical import build_lexical
from embedloom.retrieval.vector_files import read_vectors
from embedloom.serving.corpus import load_corpus
from fakes_evaluation import FixedEncoder
from fakes_search import HASH, artefact

DOCUMENTS = {
    f"d{n:02d}": f"text {word} {n % 7}"
    for n, word in enumerate(["ab", "cd", "ef", "gh", "ij", "kl", "mn", "東京都", "op", "qr", "st", "uv"])
}
QUERIES = {"q1": "ab 3", "q2": "東京 text", "q3": "nothing"}


def model_of(texts, queries=QUERIES, seed=0):
    drawn = np.random.default_rng(seed)
    vectors = {text: drawn.standard_normal(6).tolist() for text in [*texts, *queries.values()]}
    return EncoderModel(FixedEncoder(vectors), "test/hybrid", "1"), {
        text: np.asarray(vector) / np.linalg.norm(vector) for text, vector in vectors.items()
    }


def task_of(qrels, candidates=None, owners=None, kind="Retrieval"):
    data = RetrievalData(
        [(key, "", text) for key, text in DOCUMENTS.items()],
        [Query(key, text) for key, text in QUERIES.items() if key in qrels],
        qrels, ("en",), "r", "by hand", candidates, owners or {},
    )  # fmt: skip
    return make_retrieval_task("hand", "test", data, kind)


def by_hand(vectors, query, documents=DOCUMENTS):
    """0.75 of the scaled cosine and 0.25 of the scaled BM25, of all documents."""
    index = bm25s.BM25(method="lucene")
    index.index([search_terms(text) for text in documents.values()], show_progress=False)
    known = [word for word in search_terms(query) if word in index.vocab_dict]
    words = index.get_scores(known) if known else np.zeros(len(documents))
    cosines = np.array([vectors[text] @ vectors[query] for text in documents.values()])
    scores = 0.75 * (cosines + 1) / (cosines.max() + 1) + 0.25 * words / max(words.max(), 1e-9)
    return dict(zip(documents, scores, strict=True))


def searched(search, queries, top_k=10, **options):
    task = task_of({query: {"d00": 1} for query in queries})
    data = task.dataset["default"]["test"]
    common = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
    search.index(data["corpus"], **common)
    return search.search(data["queries"], top_k=top_k, **common, **options)


def test_scores_by_hand():
    model, vectors = model_of(DOCUMENTS.values())
    search = HybridSearch(model)
    assert isinstance(search, SearchProtocol) and search.mteb_model_meta.name == "test/hybrid"
    found = searched(search, QUERIES, top_k=5)
    for query, text in QUERIES.items():
        expected = by_hand(vectors, text)
        best = sorted(expected, key=lambda name: -expected[name])[:5]
        assert list(found[query]) == best
        assert list(found[query].values()) == pytest.approx([expected[name] for name in best], abs=1e-6)


def test_candidates_are_all_ranked_and_nothing_else():
    model, _ = model_of(DOCUMENTS.values())
    candidates = {"q1": ["d03", "d07", "d01"], "q2": ["d07", "d02"], "q3": ["d05"]}
    found = searched(HybridSearch(model), QUERIES, top_ranked=candidates)
    assert {query: set(ranking) for query, ranking in found.items()} == {
        q: set(c) for q, c in candidates.items()
    }
    assert next(iter(found["q2"])) == "d07"


def test_mteb_scores_it_with_cut_documents_too():
    model, vectors = model_of(DOCUMENTS.values())
    qrels = {"q1": {"d00": 1}, "q2": {"d07": 1}, "q3": {"d04": 1}}
    for owners in ({}, {"d00": "whole", "d01": "whole"}):
        judged = {"q1": {"whole": 1}, **{q: qrels[q] for q in ("q2", "q3")}} if owners else qrels
        files = run_mteb(HybridSearch(model), task_of(judged, owners=owners))
        score = json.loads(files["hand.json"])["scores"]["test"][0]["mrr_at_10"]
        ranks = []
        for query, right in judged.items():
            scores: dict[str, float] = {}
            for name, value in by_hand(vectors, QUERIES[query]).items():
                owner = owners.get(name, name)
                scores[owner] = max(value, scores.get(owner, value))
            order = sorted(scores, key=lambda name: -scores[name])
            ranks.append(1 + order.index(next(iter(right))))
        assert score == pytest.approx(np.mean([1 / rank if rank <= 10 else 0 for rank in ranks]), abs=1e-5)


def test_it_finds_what_the_endpoint_finds(tmp_path):
    place = artefact(tmp_path, list(DOCUMENTS.values()))
    source = open_input(str(tmp_path / "in.parquet"), EmbeddingConfig(), place)
    ledger = open_ledger(source, place, 8, None)
    build_lexical(
        "embed", LexicalConfig(), source, ledger.parts, ledger.rows, place, PoolConfig(), tasks=run_here
    )
    _, stored = read_vectors(place, "vectors", HASH)
    corpus = load_corpus(place, None, HASH, "f00d", True, SearchConfig(mode="hybrid"))
    titled = {f"T {text}": stored[row].tolist() for row, text in enumerate(DOCUMENTS.values())}
    asked = {text: np.random.default_rng(len(text)).standard_normal(8).tolist() for text in QUERIES.values()}
    model = EncoderModel(FixedEncoder({**titled, **asked}), "t/h", "1")
    data = RetrievalData(
        [(key, "T", text) for key, text in DOCUMENTS.items()],
        [Query(key, text) for key, text in QUERIES.items()],
        {query: {"d00": 1} for query in QUERIES}, ("en",), "r", "by hand",
    )  # fmt: skip
    task = make_retrieval_task("hand", "test", data)
    parts = task.dataset["default"]["test"]
    common = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
    search = HybridSearch(model)
    search.index(parts["corpus"], **common)
    found = search.search(parts["queries"], top_k=10, **common)
    for query, text in QUERIES.items():
        hits = corpus.search(np.asarray(asked[text], np.float32), 10, False, corpus.match_words(text))
        assert [hit.id for hit in hits] == list(found[query])
        assert [hit.score for hit in hits] == pytest.approx(list(found[query].values()), abs=1e-5)


def test_the_row_is_of_the_last_model_under_its_own_name(tiny_model):
    scorers, contracts = make_scorers({"base": tiny_model, "merged": tiny_model}, ("bm25", "hybrid"), None)
    last = scorers[-1]
    assert [one.name for one in scorers] == ["base", "merged", "bm25", "hybrid"]
    assert (last.group, last.mteb_name, last.folder, last.fused) == (
        "baselines",
        "embedloom/hybrid",
        scorers[1].folder,
        True,
    )
    assert last.revision == scorers[1].revision and last.contract_hash in contracts
    assert [one.only_ranks for one in scorers] == [False, False, True, True]


def test_hybrid_is_no_baseline_that_a_gate_can_require():
    content = yaml.safe_load((Path(__file__).parents[2] / "jobs/configs/quickstart.yaml").read_text())
    content["evaluation"]["baselines"] = ["bm25", "hybrid"]
    assert RunConfig.model_validate(content).gate.require_over_baseline == "better"
    content["evaluation"]["baselines"] = ["hybrid"]
    with pytest.raises(ValueError, match="names hybrid alone"):
        RunConfig.model_validate(content)
