"""Searches by vectors, by words and by both over the in-process app, against scores computed beside it."""

import bm25s
import numpy as np
import pytest

from embedloom.config.serving import SearchConfig, ServingConfig
from embedloom.core.storage import Place
from embedloom.core.text import search_terms
from embedloom.errors import ConfigError, DataError
from embedloom.serving.corpus import load_corpus
from embedloom.serving.schemas import ModelCard, SearchResponse
from fakes_search import ENCODER, HASH, artefact, with_words
from fakes_serving import client_of, refused

TEXTS = [
    *(f"document number {number} of the shelf" for number in range(20)),
    "Wo liegt die Katze?", "東京都に住む猫", "กรุงเทพมหานคร", "the cat, the cat", "shelf shelf cat",
]  # fmt: skip


def place_with_words(folder, index=None) -> Place:
    return with_words(folder, TEXTS, index)


def load(place, documents=None, **search):
    return load_corpus(place, documents, HASH, "f00d", True, SearchConfig(**search))


@pytest.fixture
def place(tmp_path):
    return place_with_words(tmp_path)


def asked(corpus, query="shelf cat", status=200, **fields):
    with client_of(ENCODER, corpus=corpus) as client:
        reply = client.post("/v1/search", json={"query": query, "top_k": 30, **fields})
    if status != 200:
        return refused(reply, status)
    return SearchResponse.model_validate(reply.json())


def dense_scores(query="shelf cat"):
    return ENCODER.embed([f"T {text}" for text in TEXTS], "document") @ ENCODER.embed([query], "query")[0]


def lexical_scores(*words):
    """By bm25s itself; every text has the title T."""
    index = bm25s.BM25(method="lucene")
    index.index([search_terms(f"T {text}") for text in TEXTS], show_progress=False)
    return index.get_scores(list(words))


def by_hand(dense, lexical, depth, weight):
    near, found = np.argsort(-dense)[:depth], [r for r in np.argsort(-lexical)[:depth] if lexical[r] > 0]
    rows = sorted({*near, *found})
    best = dense.max()
    return {
        f"d{row:02d}": weight * (dense[row] + 1) / (best + 1) + (1 - weight) * lexical[row] / lexical.max()
        for row in rows
    }


def test_the_answer_says_which_mode_answered(place):
    corpus = load(place)
    answers = {mode: asked(corpus, mode=mode) for mode in ("dense", "lexical", "hybrid", None)}
    assert {mode: answer.mode for mode, answer in answers.items()} == {
        "dense": "dense", "lexical": "lexical", "hybrid": "hybrid", None: "dense",
    }  # fmt: skip
    assert asked(load(place, mode="hybrid")).mode == "hybrid"
    assert answers[None].results == answers["dense"].results
    with client_of(ENCODER, corpus=load(place, mode="lexical")) as client:
        (card,) = client.get("/v1/models").json()["data"]
    found = ModelCard.model_validate(card).corpus
    assert (found.modes, found.mode) == (["dense", "lexical", "hybrid"], "lexical")


def test_lexical_hits_are_bm25s_and_need_no_model(place):
    documents = str(place.local.parent / "in.parquet")
    answer = asked(load(place, documents), mode="lexical")
    scores = lexical_scores("shelf", "cat")
    order = sorted(np.flatnonzero(scores), key=lambda row: (-scores[row], row))
    assert [hit.id for hit in answer.results] == [f"d{row:02d}" for row in order]
    assert [hit.score for hit in answer.results] == [float(scores[row]) for row in order]
    assert answer.usage.total_tokens == 0 and answer.contract_hash == HASH
    assert answer.results[0].text == TEXTS[int(order[0])]
    assert asked(load(place), "nowhere", mode="lexical").results == []


@pytest.mark.parametrize("index", [None, "flat", "hnsw"])
@pytest.mark.parametrize(("depth", "weight"), [(30, None), (30, 0.8), (4, 0.3)])
def test_hybrid_hits_are_the_weighted_sum(tmp_path, index, depth, weight):
    corpus = load(place_with_words(tmp_path, index), mode="hybrid", weight=weight, depth=depth)
    hits = corpus.search(ENCODER.embed(["shelf cat"], "query")[0], 4, False, corpus.match_words("shelf cat"))
    expected = by_hand(
        dense_scores(), lexical_scores("shelf", "cat"), depth, 0.75 if weight is None else weight
    )
    best = sorted(expected, key=lambda name: -expected[name])[:4]
    assert [hit.score for hit in hits] == pytest.approx([expected[name] for name in best], abs=1e-4)
    assert {hit.id for hit in hits} == set(best)


def test_hybrid_hits_by_rank(place):
    answer = asked(load(place, mode="hybrid", fusion="reciprocal_rank", rank_constant=10))
    ranks = [np.argsort(-dense_scores(), kind="stable")]
    scores = lexical_scores("shelf", "cat")
    ranks.append(sorted(np.flatnonzero(scores), key=lambda row: (-scores[row], row)))
    sums = np.zeros(len(TEXTS))
    for order in ranks:
        for rank, row in enumerate(order, start=1):
            sums[row] += 1 / (10 + rank)
    assert [hit.score for hit in answer.results] == pytest.approx(sorted(sums, reverse=True))


def test_a_tuned_weight_holds_unless_one_is_stated(place):
    place.write_json("lexical.json", {**place.read_json("lexical.json"), "weight": 0.9})
    tuned, stated = load(place, mode="hybrid"), load(place, mode="hybrid", weight=0.5)
    scores = dense_scores(), lexical_scores("shelf", "cat")
    for corpus, weight in ((tuned, 0.9), (stated, 0.5)):
        expected = by_hand(*scores, 100, weight)
        found = {hit.id: hit.score for hit in asked(corpus).results}
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("query", "best"), [("katze", "d20"), ("東京", "d21"), ("กรุงเทพ", "d22")])
def test_words_of_other_scripts(place, query, best):
    assert asked(load(place), query, mode="lexical").results[0].id == best


def test_a_mode_that_was_not_embedded_for_is_refused(tmp_path):
    place = artefact(tmp_path, TEXTS)
    corpus = load(place)
    error = asked(corpus, status=400, mode="hybrid")
    assert (error["param"], error["code"]) == ("mode", "mode_not_available")
    assert "allowed here: dense" in error["message"] and "--lexical" in error["message"]
    assert asked(corpus, mode="dense").mode == "dense"
    assert "'dense', 'lexical' or 'hybrid'" in asked(corpus, status=400, mode="bm25")["message"]
    with pytest.raises(
        ConfigError, match=r"serving\.search\.mode: 'lexical'.*allowed here: dense.*--lexical"
    ):
        load(place, mode="lexical")


def test_an_index_of_other_rows_is_refused(tmp_path, place):
    other = place_with_words(tmp_path / "other")
    for name in other.names("lexical"):
        place.write_bytes(name, other.read_bytes(name))
    facts = other.read_json("lexical.json")
    assert len(load(place)._ids) == facts["rows"]
    place.child("vectors").remove()
    for name in artefact(tmp_path / "short", TEXTS[:9]).names("vectors"):
        place.write_bytes(name, Place(str(tmp_path / "short/vectors")).read_bytes(name))
    with pytest.raises(DataError, match="9 vectors, its index of words has 25 rows"):
        load(place)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"mode": "bm25"}, "mode"),
        ({"weight": 1.2}, "weight"),
        ({"fusion": "reciprocal_rank", "weight": 0.5}, "weight is set with fusion reciprocal_rank"),
        ({"rank_constant": 10}, "rank_constant is set with fusion weighted_sum"),
    ],
)
def test_settings_that_do_not_fit_are_refused(search, said):
    with pytest.raises(ValueError, match=said):
        SearchConfig(**search)


def test_search_settings_need_a_corpus():
    with pytest.raises(ValueError, match="search is set without corpus"):
        ServingConfig(search={"mode": "hybrid"})
    assert "search" not in ServingConfig().model_dump()
