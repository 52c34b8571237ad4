"""The weight of hybrid searches: the best of those tried, by scores of all documents computed beside it."""

import math

import numpy as np
import pytest

from embedloom.compute.shards import run_here
from embedloom.config.cluster import PoolConfig
from embedloom.config.embedding import EmbeddingConfig, LexicalConfig
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.retrieval.fusion import WEIGHTS
from embedloom.retrieval.inputs import open_input
from embedloom.retrieval.ledger import open_ledger
from embedloom.retrieval.lexical import build_lexical, load_lexical
from embedloom.retrieval.tuning import Judged, judged_queries, ndcg, tune
from embedloom.serving.corpus import load_corpus
from fakes_evaluation import pair
from fakes_search import ENCODER, HASH, artefact

TEXTS = [f"text {n} of shelf {n % 5}" + (" twin" if n % 3 == 0 else "") for n in range(60)]


class Source:
    """Opens the fake encoder as an embedder."""

    name = "f00d"

    def open(self):
        return self

    def embed(self, texts, side, task_types, instructions):
        return ENCODER.embed(texts, side), [1] * len(texts)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    place = artefact(folder, TEXTS)
    source = open_input(str(folder / "in.parquet"), EmbeddingConfig(), place)
    ledger = open_ledger(source, place, 8, None)
    build_lexical(
        "embed",
        LexicalConfig(language=None),
        source,
        ledger.parts,
        ledger.rows,
        place,
        PoolConfig(),
        tasks=run_here,
    )
    return place


def judged(count):
    """Queries whose words lead to one text and whose answers are that one and another."""
    numbers = np.random.default_rng(0).choice(60, count, replace=False).tolist()
    answers = [frozenset({f"d{n:02d}", f"d{(n * 7) % 60:02d}"}) for n in numbers]
    return Judged([f"shelf {n % 5} text {n}" for n in numbers], answers)


def by_hand(place, judged):
    """Mean nDCG@10 of each weight, over the scores of all documents; every one of the 60 is a candidate."""
    documents = ENCODER.embed([f"T {text}" for text in TEXTS], "document").astype(np.float64)
    lexical = load_lexical(place)
    found = {}
    for weight in WEIGHTS:
        scores = []
        for query, answers in zip(judged.queries, judged.answers, strict=True):
            cosines = documents @ ENCODER.embed([query], "query")[0].astype(np.float64)
            words = lexical.scores(query).astype(np.float64)
            sums = weight * (cosines + 1) / (cosines.max() + 1) + (1 - weight) * words / max(
                words.max(), 1e-30
            )
            order = sorted(range(60), key=lambda row: (-sums[row], row))[:10]
            gained = sum(
                1 / math.log2(2 + rank) for rank, row in enumerate(order) if f"d{row:02d}" in answers
            )
            scores.append(gained / sum(1 / math.log2(2 + rank) for rank in range(len(answers))))
        found[weight] = sum(scores) / len(scores)
    return found


def test_the_weight_is_the_best_and_is_used(place):
    queries = judged(40)
    facts = tune(queries, place, Source(), EmbeddingConfig(), True)
    means = by_hand(place, queries)
    assert facts["tuned_on"]["ndcg_at_10"] == pytest.approx(max(means.values()), abs=1e-3)
    assert means[facts["weight"]] == pytest.approx(max(means.values()), abs=1e-3)
    assert facts["tuned_on"]["dense"] == pytest.approx(means[1.0], abs=1e-3)
    assert facts["tuned_on"]["lexical"] == pytest.approx(means[0.0], abs=1e-3)
    assert facts["tuned_on"]["queries"] == 40
    assert load_lexical(place).facts == facts == place.read_json("lexical.json")
    assert load_corpus(place, None, HASH, "f00d", True)._weight == facts["weight"]


def test_too_few_queries_tune_nothing(place):
    before = {
        key: value
        for key, value in place.read_json("lexical.json").items()
        if key not in ("weight", "tuned_on")
    }
    place.write_json("lexical.json", before)
    assert tune(judged(19), place, Source(), EmbeddingConfig(), True) == before
    unknown = Judged([f"q{n}" for n in range(40)], [frozenset({"nowhere"})] * 40)
    assert (
        tune(unknown, place, Source(), EmbeddingConfig(), True) == before == place.read_json("lexical.json")
    )


def test_ndcg_by_hand():
    rows = np.array([4, 9, 2, 7])
    assert ndcg(rows, np.array([4])) == 1
    assert ndcg(rows, np.array([2])) == pytest.approx(0.5)
    # Ranks 2 and 4 of two answers: (1/log2(3) + 1/log2(5)) / (1 + 1/log2(3)).
    assert ndcg(rows, np.array([7, 9])) == pytest.approx(0.65092, abs=1e-5)
    assert ndcg(rows, np.array([5])) == ndcg(rows[:0], np.array([5])) == 0


def test_judged_queries_are_retrievals_with_all_chunks_of_their_answers(tmp_path):
    place = Place(str(tmp_path))
    pairs = [
        pair("a", "One?", "doc#1"), pair("b", "one?", "whole"), pair("c", "Two?", "whole"),
        pair("d", "Three?", "whole", task_type="sts"),
    ]  # fmt: skip
    place.write_table("pairs/dev/part-000000.parquet", table_from_rows("pairs", pairs))
    chunks = [{"id": f"doc#{n}", "document_id": "doc", "chunk": n, "chunks": 3} for n in (1, 2, 3)]
    chunks.append({"id": "else#1", "document_id": "else", "chunk": 1, "chunks": 2})
    place.write_table("chunks/part-000000.parquet", table_from_rows("chunks", chunks))
    found = judged_queries(place)
    assert dict(zip(found.queries, found.answers, strict=True)) == {
        "One?": {"doc#1", "doc#2", "doc#3", "whole"}, "Two?": {"whole"},
    }  # fmt: skip
    assert len(judged_queries(place, most=1).queries) == 1
    assert judged_queries(place, "test") == judged_queries(Place(str(tmp_path / "none"))) == Judged([], [])
