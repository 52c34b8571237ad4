"""Rescored candidates: what is scored, that the rules read it, and that killed runs end with the same files."""

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.config.mining import MiningConfig, SelectionConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.mining.candidates import SCORES_SCHEMA, Mined, part_names
from embedloom.mining.examples import ExampleWorker
from embedloom.mining.queries import pair_files, write_queries
from embedloom.mining.rescore import RescoringWorker, best_ranked, rescore
from embedloom.mining.stage import build_examples, rescoring_source
from fakes_mining import document_row, make_corpus, make_tiny_cross_encoder, pair_row, random_documents


@dataclass(frozen=True)
class TableSource:
    """A scorer that looks each text's score up, whatever the query."""

    scores: dict
    name: str = "table"

    def open(self):
        return TableScorer(self.scores)


class TableScorer:
    contract_hash = "table"

    def __init__(self, scores):
        self.scores = scores
        self.calls = []

    def score(self, queries, documents, task_types, instructions):
        self.calls.append(list(zip(queries, documents, strict=True)))
        return np.array([self.scores[text] for text in documents], dtype=np.float32)


def make_mined(folder, corpus, teachers, shard_rows=100):
    """A mining artefact of {query id: [(document ids, positive's score) of every teacher]}, scores 0.9, 0.8, ..."""
    out = ArtefactWriter(Place(str(folder)), "mining", "config", {}, "local")
    queries = write_queries(pair_files(corpus, []), (corpus.place, "documents/train"), out.place, shard_rows)
    parts = part_names(queries)
    count = len(next(iter(teachers.values())))
    for number, part in enumerate(parts):
        rows = out.place.read_table(f"queries/{part}").to_pylist()
        for teacher in range(count):
            candidates, scores = [], []
            for row in rows:
                ids, positive = teachers.get(row["id"], [([], 0.5)] * count)[teacher]
                common = {"query_id": row["id"], "teacher": f"t{teacher}"}
                ranked = [0.9 - 0.1 * rank for rank in range(len(ids))]
                candidates.append({**common, "document_ids": ids, "scores": ranked, "contract_hash": "c"})
                given = [0.1] * len(row["negatives"] or [])
                scores.append(
                    {**common, "positive_score": positive, "lowest_score": positive, "given_scores": given}
                )
            name = f"part-{teacher * len(parts) + number:06d}.parquet"
            out.place.write_table(
                f"positive_scores/{name}", pa.Table.from_pylist(scores, schema=SCORES_SCHEMA)
            )
            out.place.write_table(f"candidates/{name}", table_from_rows("candidates", candidates))
    details = {
        "teachers": [f"t{n}" for n in range(count)],
        "parts": queries["parts"],
        "given": queries["given"],
    }
    return out.commit({"rows": queries["rows"]}, details)


def test_every_teachers_best_in_turn_and_each_id_once():
    assert best_ranked([["a", "b", "c"], ["b", "d"]], 10) == ["a", "b", "d", "c"]
    assert best_ranked([["a", "b", "c"], ["b", "d"]], 3) == ["a", "b", "d"]
    assert best_ranked([["a", "b", "c"]], 2) == ["a", "b"]
    assert best_ranked([[]], 2) == []


@pytest.fixture
def by_hand(tmp_path):
    """Documents named by their texts; one query with two known positives, one whose negatives are given."""
    corpus = make_corpus(
        tmp_path / "corpus",
        [document_row(name, f"text {name}") for name in ("p", "p2", "a", "b", "c", "d", "e")],
        [
            pair_row("q", "one question", "p"),
            pair_row("q2", "one question", "p2"),
            pair_row(
                "label", "a fine day", "nowhere", positive="joy", negatives=["anger", " ", "fear"],
                task_type="classification",
            ),
        ],
    )  # fmt: skip
    teachers = {
        "q": [(["a", "p", "b", "c"], 0.8), (["d", "a", "e"], 0.8)],
        "q2": [(["a", "p", "b", "c"], 0.8), (["d", "a", "e"], 0.8)],
    }
    return corpus, make_mined(tmp_path / "mining", corpus, teachers)


SCORES = {
    "text p": 0.9, "text p2": 0.8, "text a": 0.77, "text b": 0.5, "text d": 0.7, "text e": 0.5,
    "joy": 0.6, "anger": 0.2, "fear": 0.3,
}  # fmt: skip


def rescored_by_hand(by_hand, folder, top):
    corpus, mined = by_hand
    worker = RescoringWorker(TableSource(SCORES), Mined.of(mined, corpus), top)
    tables = worker(mined.place.read_tables("queries"))
    assert list(tables)[-1] == "candidates"
    out = ArtefactWriter(Place(str(folder)), "rescoring", "config", {}, "local")
    for name, table in tables.items():
        out.place.write_table(f"{name}/part-000000.parquet", table)
    return out.commit({"rows": 3}, {"model": "table"}), worker._scorer.calls


def test_the_best_of_both_teachers_positives_and_given_negatives_are_scored_once(by_hand, tmp_path):
    artefact, calls = rescored_by_hand(by_hand, tmp_path / "out", top=5)
    # a, d, p, b, e: c is the sixth best; p is a candidate and a positive; q and q2 ask the same
    assert [sorted(call) for call in calls] == [
        sorted(
            [("one question", f"text {name}") for name in ("p", "p2", "a", "b", "d", "e")]
            + [("a fine day", text) for text in ("joy", "anger", "fear")]
        )
    ]
    rows = {
        row["query_id"]: row for row in artefact.place.read_tables("candidates", "candidates").to_pylist()
    }
    assert rows["q"]["document_ids"] == ["p", "a", "d", "b", "e"]  # b and e tie
    assert rows["q"]["scores"] == pytest.approx([0.9, 0.77, 0.7, 0.5, 0.5])
    assert (rows["q"]["teacher"], rows["q"]["contract_hash"]) == ("table", "table")
    assert rows["label"]["document_ids"] == []
    scores = {row["query_id"]: row for row in artefact.place.read_tables("positive_scores").to_pylist()}
    assert scores["q"]["positive_score"] == pytest.approx(0.9)
    assert scores["q2"]["positive_score"] == pytest.approx(0.8)
    assert scores["q"]["lowest_score"] == scores["q2"]["lowest_score"] == pytest.approx(0.8)
    assert scores["label"]["given_scores"] == pytest.approx([0.2, 0.3])


def test_the_rules_read_the_rescored_scores(by_hand, tmp_path):
    corpus, mined = by_hand
    rules = SelectionConfig(negatives=2, margin_ratio=0.95)
    queries = mined.place.read_tables("queries")

    def examples(source):
        rows = ExampleWorker(rules, source)(queries)["examples"].to_pylist()
        return {row["id"]: row for row in rows}

    # the first teacher: limit 0.76, so a (0.9) falls, p is a positive, b (0.7) and c (0.6) stay
    assert examples(Mined.of(mined, corpus))["q"]["negatives"] == ["text b", "text c"]
    artefact, _ = rescored_by_hand(by_hand, tmp_path / "out", top=5)
    found = examples(Mined.of(mined, corpus).rescored(artefact))
    # rescored: limit 0.95 x 0.8 = 0.76, a (0.77) falls, then d (0.7) and, of the tie, b
    assert found["q"]["negatives"] == ["text d", "text b"]
    assert found["q"]["negative_scores"] == pytest.approx([0.7, 0.5])
    assert found["q"]["positive_score"] == pytest.approx(0.9)
    assert found["label"]["negatives"] == ["anger", "fear"]
    assert found["label"]["negative_scores"] == pytest.approx([0.2, 0.3])


def test_a_candidate_the_corpus_lacks_is_named(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", [document_row("p", "text p")], [pair_row("q", "one", "p")])
    mined = make_mined(tmp_path / "mining", corpus, {"q": [(["gone"], 0.8)]})
    worker = RescoringWorker(TableSource(SCORES), Mined.of(mined, corpus), 5)
    with pytest.raises(DataError, match="candidate 'gone' is no document of the corpus"):
        worker(mined.place.read_tables("queries"))


@pytest.mark.ray
def test_actors_and_kills_change_no_file_and_scores_are_the_librarys(ray_local, tmp_path):
    from sentence_transformers import CrossEncoder

    documents = random_documents(24)
    texts = {row["id"]: row["text"] for row in documents}
    pairs = [pair_row(f"n{n:02d}", f"query {n}", documents[n]["id"]) for n in range(20)]
    corpus = make_corpus(tmp_path / "corpus", documents, pairs, cuts=2)
    found = {f"n{n:02d}": [([f"d{(n + step) % 24:04d}" for step in range(1, 9)], 0.8)] for n in range(20)}
    mined = make_mined(tmp_path / "mining", corpus, found, shard_rows=6)
    model = make_tiny_cross_encoder(tmp_path / "model")
    section = {"model": str(model), "top": 6, "max_tokens": 128, "dtype": "float32"}
    selection = {"negatives": 2, "margin_ratio": 1.0}
    config = MiningConfig(teachers=["t0"], top_k=8, rescoring=section, selection=selection)

    def run(folder, actors):
        writer = ArtefactWriter(Place(str(folder)), "rescoring", "config", {}, "local")
        pool = PoolConfig(min_actors=actors, max_actors=actors)
        return rescore(config, mined, corpus, rescoring_source(config), pool, writer)

    one = run(tmp_path / "one", 1)
    assert one.counts == {"rows": 20, "candidates": 120, "top": 6}
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "manifest.json").unlink()
    (tmp_path / "two" / "_building.json").write_text(
        json.dumps({"kind": "rescoring", "fingerprint": one.fingerprint})
    )
    for name in ("candidates/part-000000", "candidates/part-000002", "positive_scores/part-000002"):
        (tmp_path / "two" / f"{name}.parquet").unlink()
    run(tmp_path / "two", 2)
    for path in (tmp_path / "one").rglob("*.parquet"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()

    library = CrossEncoder(str(model), max_length=128, device="cpu")
    for row in one.place.read_tables("candidates", "candidates").to_pylist():
        query = f"query {int(row['query_id'][1:])}"
        expected = library.predict([(query, texts[name]) for name in row["document_ids"]])
        np.testing.assert_allclose(row["scores"], expected, atol=1e-6)
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert sorted(row["document_ids"]) == sorted(found[row["query_id"]][0][0][:6])

    writer = ArtefactWriter(Place(str(tmp_path / "examples")), "examples", "config", {}, "local")
    built = build_examples(config, mined, corpus, None, PoolConfig(), writer, one)
    scored = {row["query_id"]: row for row in one.place.read_tables("candidates").to_pylist()}
    assert built.manifest["details"]["scored_by"] == [str(model)]
    for row in built.place.read_tables("examples", "examples").to_pylist():
        below = [
            texts[name]
            for name, score in zip(
                scored[row["id"]]["document_ids"], scored[row["id"]]["scores"], strict=True
            )
            if score < row["positive_score"]
        ]
        assert row["negatives"] == below[:2]
