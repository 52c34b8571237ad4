import numpy as np
import pytest

from embedloom.synthesis.diversity import coverage, distinct, mean_cosine, measure, overlap

RNG = np.random.default_rng(5)


def unit(rows: int, dimensions: int = 8) -> np.ndarray:
    vectors = RNG.normal(size=(rows, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_distinct_counts_word_ngrams():
    texts = ["the cat sat", "The cat ran"]  # the cat sat cat: 6 words, 4 different; 4 bigrams, 3 different
    assert distinct(texts, 1) == pytest.approx(4 / 6)
    assert distinct(texts, 2) == pytest.approx(3 / 4)
    assert distinct(texts, 3) == 1.0
    assert distinct(["too short"], 3) is None


def test_overlap_estimates_the_jaccard_similarity_of_3_grams():
    shared = [f"alpha {n} beta {n} gamma" for n in range(200)]
    left, right = shared + [f"left {n} only {n} here" for n in range(200)], shared
    (pair,) = overlap({"a": left, "b": right})
    grams = [
        {tuple(t.split()[n : n + 3]) for t in texts for n in range(len(t.split()) - 2)}
        for texts in (left, right)
    ]
    true = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    assert (pair["left"], pair["right"]) == ("a", "b")
    assert pair["jaccard"] == pytest.approx(true, abs=4 * 0.0221)
    assert overlap({"a": left, "silent": []}) == []


def test_mean_cosine_is_that_of_all_pairs():
    vectors = unit(40)
    cosines = vectors @ vectors.T
    expected = cosines[np.triu_indices(40, k=1)].mean()
    assert mean_cosine(vectors) == pytest.approx(expected, abs=1e-6)
    assert mean_cosine(np.repeat(vectors[:1], 5, axis=0)) == pytest.approx(1.0, abs=1e-6)
    assert mean_cosine(vectors[:1]) is None


def test_coverage_counts_clusters_with_a_seed():
    centres = np.eye(4, dtype=np.float32)
    corpus = np.repeat(centres, 25, axis=0) + RNG.normal(scale=0.01, size=(100, 4)).astype(np.float32)
    found = coverage(corpus, [0, 3, 60], clusters=4)  # the first and the third cluster
    assert found == {"clusters": 4, "hit": 2, "share": 0.5, "documents": 100}
    assert coverage(corpus, [], clusters=4)["hit"] == 0
    assert coverage(corpus[:30], [1], clusters=100)["clusters"] <= 3  # ten documents a cluster at least


def test_all_measures_of_a_sample():
    texts = {"big": ["one two three four"], "small": ["five six seven", "one two three"]}
    found = measure(texts, unit(3), unit(50), [0, 1])
    assert found["sample"] == {"big": 1, "small": 2}
    assert list(found["distinct"]) == ["big", "small", "all"]
    assert found["distinct"]["all"]["1"] == pytest.approx(7 / 10)
    assert found["coverage"]["documents"] == 50
    assert -1 <= found["mean_cosine"] <= 1
    alone = measure({"only": ["one two three"]})
    assert list(alone["distinct"]) == ["only"]
    assert "mean_cosine" not in alone and "coverage" not in alone
