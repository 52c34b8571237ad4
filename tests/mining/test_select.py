"""The selection rule against hand-worked cases and against sentence-transformers' miner."""

import math

import numpy as np
import pytest

from embedloom.mining.select import score_limit, select_negatives


def test_limit_is_the_share_of_the_positive():
    """TopK-PercPos 0.95 (arXiv 2511.07025 §4.4): 0.8 x 0.95 = 0.76."""
    assert score_limit(0.8, 0.95) == pytest.approx(0.76)
    assert score_limit(0.8, 1.0) == 0.8
    assert score_limit(0.0, 0.95) == 0.0


def test_negative_positive_score_tightens_the_limit():
    """-0.2 x 0.95 = -0.19 would admit negatives above the positive; -0.2 - 0.2 x 0.05 = -0.21 does not."""
    assert score_limit(-0.2, 0.95) == pytest.approx(-0.21)


def test_keeps_the_best_strictly_below_the_limit():
    # positive 0.8, limit 0.4 (exact in floats): 0.41 and the tie at 0.4 go, the two best below stay
    chosen = select_negatives("abcdef", [0.9, 0.41, 0.4, 0.39, 0.3, 0.2], set(), 0.8, 0.5, 2)
    assert (chosen.ids, chosen.scores) == (["d", "e"], [0.39, 0.3])
    assert chosen.removed_by_margin == 3
    assert (chosen.naive, chosen.naive_removed) == (2, 2)


def test_known_positives_never_become_negatives():
    chosen = select_negatives("pabqc", [0.9, 0.3, 0.2, 0.15, 0.1], {"p", "q", "absent"}, 0.9, 0.95, 4)
    assert chosen.ids == ["a", "b", "c"]
    assert chosen.removed_as_positive == 2
    assert chosen.removed_by_margin == 0
    assert (chosen.naive, chosen.naive_removed) == (3, 0)


def test_an_id_counts_once():
    chosen = select_negatives("aab", [0.3, 0.3, 0.2], set(), 0.9, 0.95, 3)
    assert chosen.ids == ["a", "b"]


def test_lists_are_short_rather_than_padded():
    chosen = select_negatives("abc", [0.5, -math.inf, math.nan], set(), 0.9, 0.95, 4)
    assert (chosen.ids, chosen.scores) == (["a"], [0.5])
    nothing = select_negatives([1, 2], [0.9, 0.88], {1}, 0.9, 0.95, 4)
    assert (nothing.ids, nothing.removed_by_margin, nothing.naive, nothing.naive_removed) == ([], 1, 1, 1)


class LookupModel:
    """What sentence-transformers' miner needs of a model: fixed vectors by text."""

    def __init__(self, vectors):
        self.vectors = vectors
        self.tokenizer = None
        self.prompts = {}
        self.device = "cpu"

    def encode(self, texts, **_):
        return np.stack([self.vectors[text] for text in texts])

    encode_query = encode_document = encode

    def similarity(self, left, right):
        from sentence_transformers.util import cos_sim

        return cos_sim(left, right)

    def similarity_pairwise(self, left, right):
        from sentence_transformers.util import pairwise_cos_sim

        return pairwise_cos_sim(left, right)


def test_equals_the_sentence_transformers_miner():
    """200 documents, 40 queries, 5 % margin, top 4: the same negatives in the same order."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    from embedloom.retrieval.exact import pair_scores
    from embedloom.retrieval.search import top_k

    generator = np.random.default_rng(11)
    documents = generator.standard_normal((200, 8)).astype(np.float32)
    queries = documents[:40] + generator.standard_normal((40, 8)).astype(np.float32) * 0.7
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    vectors = {f"doc {n}": documents[n] for n in range(200)} | {f"query {n}": queries[n] for n in range(40)}
    mined = mine_hard_negatives(
        Dataset.from_dict(
            {"query": [f"query {n}" for n in range(40)], "document": [f"doc {n}" for n in range(40)]}
        ),
        LookupModel(vectors),
        corpus=[f"doc {n}" for n in range(200)],
        relative_margin=0.05,
        num_negatives=4,
        range_max=50,
        sampling_strategy="top",
        output_format="n-tuple",
        verbose=False,
    )
    theirs = {row["query"]: [row[f"negative_{n}"] for n in range(1, 5)] for row in mined}
    found = top_k(queries, documents, 51)
    positive_scores = pair_scores(queries, documents[:40])
    ours = {}
    for n in range(40):
        chosen = select_negatives(
            found.positions[n].tolist(), found.scores[n].tolist(), {n}, float(positive_scores[n]), 0.95, 4
        )
        ours[f"query {n}"] = [f"doc {key}" for key in chosen.ids]
    assert len(theirs) > 30
    assert {query: ours[query] for query in theirs} == theirs
