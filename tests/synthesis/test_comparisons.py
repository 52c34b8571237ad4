"""Rows held against other rows, the teacher and the judge, each checked against brute force."""

import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedloom.compute.generation import GenerationResult
from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.retrieval.embedder import EncoderSource
from embedloom.synthesis.duplicates import bucket_count, short_signature, short_similarity, signature
from embedloom.synthesis.stage import synthesize
from fakes_engines import WORDS, FakeEngine
from fakes_serial import patch_serial

POOL = PoolConfig(cpus=1)
OFF: dict[str, Any] = {
    "language": None, "contamination": None, "near_duplicates": None, "exact_duplicates": False,
}  # fmt: skip


class RepeatingEngine(FakeEngine):
    """Writes one of twelve questions, some of them with one word changed, and says them in other cases."""

    def _answer(self, request):
        draw = random.Random(request.seed)
        first = 11 * draw.randrange(12)
        words = [WORDS[(first + n) % len(WORDS)] for n in range(14)]
        if draw.random() < 0.5:
            words[draw.randrange(14)] = draw.choice(WORDS)
        text = " ".join(words)
        text = text.upper() if draw.random() < 0.3 else text
        return GenerationResult(request.id, json.dumps({"queries": [text]}), "stop", 7, 5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    place = Place(str(tmp_path_factory.mktemp("corpus")))
    writer = ArtefactWriter(place, "corpus", "c", {}, "local")
    rows = [
        {"id": content_id(str(n)), "text": " ".join(WORDS[(5 * n + m) % len(WORDS)] for m in range(8)), "source": "s"}
        for n in range(40)
    ]  # fmt: skip
    place.write_table("documents/train/part-000000.parquet", table_from_rows("documents", rows))
    return writer.commit({"rows": 40})


def similarity(left, right):
    return np.mean(np.frombuffer(left, "<u4") == np.frombuffer(right, "<u4"))


def run(corpus: Artefact, folder: Path, quality: dict[str, Any], rows: int, **arguments: Any) -> Artefact:
    section = SynthesisConfig.model_validate(
        {
            "generators": [{"model": "first"}, {"model": "second"}],
            "families": [{"family": "seed_queries", "rows": rows}],
            "quality": {**OFF, **quality},
            "max_attempts_per_row": 40,
            "shard_rows": 8,
        }
    )
    out = ArtefactWriter(Place(str(folder / "out")), "synthesis", "c", {}, "local")
    models = {name: lambda: folder for name in ("first", "second", "judge")}
    arguments = {"engine_factory": FakeEngine} | arguments
    return synthesize(section, 3, corpus, POOL, out, models, **arguments)


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: seconds less a test."""
    patch_serial(monkeypatch)


@pytest.mark.parametrize("scope", ["all", "generator"])
def test_no_two_rows_are_nearly_the_same(corpus: Artefact, tmp_path: Path, serial: None, scope: str):
    quality = {"exact_duplicates": scope == "all", "near_duplicates": {"threshold": 0.7, "scope": scope}}
    artefact = run(corpus, tmp_path, quality, 12, engine_factory=RepeatingEngine)
    rows = artefact.place.read_tables("pairs", "pairs").to_pylist()
    assert Counter(row["generator"] for row in rows) == {"first": 6, "second": 6}
    # The search works on a byte of each number; pairs within its error of the threshold may go either way.
    alike = [
        (a["generator"], b["generator"])
        for a, b in combinations(rows, 2)
        if similarity(signature(a), signature(b)) >= 0.75
    ]
    if scope == "all":
        assert alike == []
        assert set(artefact.counts["rejects"]) == {"duplicate", "near_duplicate"}
    else:
        assert alike and all(a != b for a, b in alike), "the other generator may say the same"
    rejects = artefact.place.read_tables("rejects").to_pylist()
    known = {row["id"] for row in [*rows, *rejects]}
    assert rejects and all(row["detail"].rsplit(" ", 1)[1] in known for row in rejects)


def test_short_signatures_estimate_what_whole_ones_do():
    draw = random.Random(5)
    for changed in range(0, 14, 2):
        words = draw.sample(WORDS, 14)
        other = [*words[changed:], *draw.sample(WORDS, changed)]
        left, right = (signature({"query": " ".join(text)}) for text in (words, other))
        short = short_similarity(short_signature(left), short_signature(right))
        assert short == pytest.approx(similarity(left, right), abs=0.02)


@pytest.mark.parametrize(("rows", "buckets"), [(1, 1), (39_999, 1), (40_000, 2), (10**9, 512)])
def test_buckets_hold_what_a_task_can(rows: int, buckets: int):
    assert bucket_count(rows) == buckets


@pytest.mark.ray
def test_the_round_trip_keeps_exactly_the_queries_whose_document_the_teacher_finds(
    corpus: Artefact, tmp_path: Path, ray_local: None, tiny_model: Path
):
    artefact = run(
        corpus, tmp_path, {"round_trip": {"top_k": 15}}, 16,
        teacher=EncoderSource("tiny", tiny_model), teacher_pool=POOL,
    )  # fmt: skip
    embedder = EncoderSource("tiny", tiny_model).open()
    documents = corpus.place.read_tables("documents/train").to_pylist()
    count = len(documents)
    vectors, _ = embedder.embed(
        [row["text"] for row in documents], "document", ["retrieval"] * count, [None] * count
    )
    places = {row["id"]: n for n, row in enumerate(documents)}
    rows = artefact.place.read_tables("pairs", "pairs").to_pylist()
    for row in rows:
        query, _ = embedder.embed([row["query"]], "query", ["retrieval"], [row["instruction"]])
        scores = vectors @ query[0]
        better = scores > scores[places[row["document_id"]]] + 1e-5  # products round differently in company
        assert int(better.sum()) < 15
    assert len(rows) == 16
    assert artefact.counts["rejects"]["round_trip"] >= 8, "a random encoder finds about 15 of 40"


def test_the_judge_refuses_grades_below_the_threshold(corpus: Artefact, tmp_path: Path, serial: None):
    artefact = run(corpus, tmp_path, {"judge": {"model": "judge", "threshold": 8}}, 16)
    rejects = artefact.place.read_tables("rejects").to_pylist()
    grades = [float(row["detail"].split()[1].rstrip(",")) for row in rejects]
    assert {row["reason"] for row in rejects} == {"judge"}
    assert grades and all(grade < 8 for grade in grades)
    assert artefact.place.read_tables("pairs").num_rows == 16
