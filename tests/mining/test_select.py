"""The selection rule against hand-worked cases and against sentence-transformers' miner."""

import math

import numpy as np
import pytest

from embedloom.config.mining import SelectionConfig
from embedloom.mining.select import Selection, blend, score_limit, select_negatives


def rules(margin_ratio=0.95, negatives=4, **changes):
    return SelectionConfig(margin_ratio=margin_ratio, negatives=negatives, **changes)


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
    chosen = select_negatives("abcdef", [0.9, 0.41, 0.4, 0.39, 0.3, 0.2], set(), 0.8, rules(0.5, 2))
    assert (chosen.ids, chosen.scores) == (["d", "e"], [0.39, 0.3])
    assert chosen.removed_by_margin == 3
    assert (chosen.naive, chosen.naive_removed) == (("a", "b"), 2)


def test_known_positives_never_become_negatives():
    chosen = select_negatives("pabqc", [0.9, 0.3, 0.2, 0.15, 0.1], {"p", "q", "absent"}, 0.9, rules(0.95, 4))
    assert chosen.ids == ["a", "b", "c"]
    assert chosen.removed_as_positive == 2
    assert chosen.removed_by_margin == 0
    assert (chosen.naive, chosen.naive_removed) == (("a", "b", "c"), 0)


def test_an_id_counts_once():
    chosen = select_negatives("aab", [0.3, 0.3, 0.2], set(), 0.9, rules(0.95, 3))
    assert chosen.ids == ["a", "b"]


def test_lists_are_short_rather_than_padded():
    chosen = select_negatives("abc", [0.5, -math.inf, math.nan], set(), 0.9, rules(0.95, 4))
    assert (chosen.ids, chosen.scores) == (["a"], [0.5])
    nothing = select_negatives([1, 2], [0.9, 0.88], {1}, 0.9, rules(0.95, 4))
    assert (nothing.ids, nothing.removed_by_margin, nothing.naive, nothing.naive_removed) == ([], 1, (2,), 1)


SCORES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]


@pytest.mark.parametrize(
    ("changes", "ids", "removed"),
    [
        ({"method": "naive"}, "ab", (0, 0, 0)),
        ({"method": "abs", "max_score": 0.7}, "de", (3, 0, 0)),  # 0.7 itself is not below 0.7
        ({"method": "margin_pos", "margin": 0.25}, "cd", (2, 0, 0)),  # below 1.0 - 0.25
        ({"method": "shift", "shift": 3}, "de", (0, 3, 0)),
        ({"method": "perc_pos", "margin_ratio": 0.75, "min_score": 0.65}, "c", (2, 0, 3)),
    ],
)
def test_methods_by_hand(changes, ids, removed):
    """NV-Retriever Algorithms 1 to 3; positive 1.0, two negatives wanted."""
    chosen = select_negatives("abcdef", SCORES, set(), 1.0, rules(negatives=2, **changes))
    assert "".join(chosen.ids) == ids
    assert (chosen.removed_by_margin, chosen.removed_by_rank, chosen.removed_by_floor) == removed
    assert chosen.candidates == 6 and chosen.naive == ("a", "b")


def test_draws_follow_the_softmax_and_the_seed():
    """Two of the best four; the share of each as first of one draw is its softmax weight."""
    one = rules(negatives=1, method="naive", sample_from=4, sample_temperature=0.2)
    drawn = [select_negatives("abcdef", SCORES, set(), 1.0, one, seed).ids[0] for seed in range(4000)]
    weights = np.exp(np.array(SCORES[:4]) / 0.2)
    for letter, share in zip("abcd", weights / weights.sum(), strict=True):
        assert drawn.count(letter) / 4000 == pytest.approx(share, abs=0.03)
    assert set(drawn) == set("abcd")
    again = select_negatives("abcdef", SCORES, set(), 1.0, one, 7).ids
    assert again == select_negatives("abcdef", SCORES, set(), 1.0, one, 7).ids
    best = rules(negatives=2, method="naive", sample_from=4, keep_best=True)
    chosen = [select_negatives("abcdef", SCORES, set(), 1.0, best, seed) for seed in range(50)]
    assert {one.ids[0] for one in chosen} == {"a"} and len({one.ids[1] for one in chosen}) == 3
    assert all(one.scores == sorted(one.scores, reverse=True) for one in chosen)


@pytest.mark.parametrize(
    ("how", "ids"),
    [
        ("first", ["a", "b", "c"]),
        ("intra_sample", ["a", "b", "c"]),  # a (1), [a (2) again], b (1), c (2)
        ("intra_sample_duplicates", ["a", "a", "b"]),
    ],
)
def test_blending_two_teachers(how, ids):
    """NV-Retriever §4.4: the next best of each teacher in turn, with or without duplicates."""
    first, second = Selection(["a", "b", "c"], [0.5, 0.4, 0.3]), Selection(["a", "c", "d"], [0.9, 0.8, 0.7])
    assert blend([first, second], rules(negatives=3, blend=how), "q").ids == ids
    lists = {tuple(blend([first, second], rules(blend="cross_sample"), f"q{n}").ids) for n in range(20)}
    assert lists == {("a", "b", "c"), ("a", "c", "d")}


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

    from embedloom.retrieval.search import pair_scores, top_k

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
            found.positions[n].tolist(),
            found.scores[n].tolist(),
            {n},
            float(positive_scores[n]),
            rules(0.95, 4),
        )
        ours[f"query {n}"] = [f"doc {key}" for key in chosen.ids]
    assert len(theirs) > 30
    assert {query: ours[query] for query in theirs} == theirs
