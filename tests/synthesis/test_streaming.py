"""Rows embedded while others are written: one Ray Data pipeline, and the artefacts of one stage after the other."""

import numpy as np
import pytest

from embedloom.config.cluster import PoolConfig, Profile
from embedloom.config.mining import MiningConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.mining.stage import mine, teacher_sources
from embedloom.retrieval.embed import Ahead, AheadVectors
from fakes_engines import WORDS
from synthesis.test_stage import config, everything, run

POOL = PoolConfig(cpus=1)
FAMILIES = [{"family": "seed_queries", "rows": 24, "queries_per_document": 2}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Artefact:
    """40 documents."""
    writer = ArtefactWriter(Place(str(tmp_path_factory.mktemp("corpus"))), "corpus", "c", {}, "local")
    texts = [
        f"Document {n} tells about {' '.join(WORDS[(7 * n + m) % len(WORDS)] for m in range(12))}."
        for n in range(40)
    ]
    rows = [{"id": content_id(text), "text": text, "source": "s"} for text in texts]
    writer.place.write_table("documents/train/part-000000.parquet", table_from_rows("documents", rows))
    return writer.commit({"rows": 40})


def mined(folder, corpus, synthesis, teacher, ahead=None) -> Artefact:
    settings = MiningConfig(teachers=[teacher], top_k=5, shard_rows=16, max_query_tokens=128)
    writer = ArtefactWriter(Place(str(folder / "mining")), "mining", "c", {}, "local")
    return mine(settings, corpus, [synthesis], teacher_sources(settings), POOL, writer, ahead)


@pytest.mark.ray
def test_streamed_artefacts_are_those_of_stage_after_stage(corpus, tiny_model, tmp_path, ray_local):
    # One generator: every round of every generator starts the teacher's actors anew.
    settings = config(generators=[{"model": "first", "weight": 1}], families=FAMILIES)
    staged = run(corpus, tmp_path / "staged", settings)
    # 128 bytes: the instructions of the families alone take up to 80.
    teacher = MiningConfig(teachers=[str(tiny_model)], max_query_tokens=128)
    ahead = Ahead(Place(str(tmp_path / "ahead")), tuple(teacher_sources(teacher)), POOL)
    streamed = run(corpus, tmp_path / "streamed", settings, ahead=ahead)
    assert everything(streamed) == everything(staged)

    one = mined(tmp_path / "staged", corpus, staged, str(tiny_model))
    other = mined(tmp_path / "streamed", corpus, streamed, str(tiny_model), ahead.place)
    left, right = (artefact.place.read_tables("candidates", "candidates") for artefact in (one, other))
    assert left.drop_columns("scores").equals(right.drop_columns("scores"))
    # Texts beside it in a batch change a vector's last bits.
    scores = [np.array(table.column("scores").to_pylist()) for table in (left, right)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    assert one.counts == other.counts

    columns = ["query", "task_type", "instruction"]
    pairs = streamed.place.read_tables("pairs", "pairs").select(columns).to_pylist()
    asked = [tuple(row[column] for column in columns) for row in pairs]
    source = teacher_sources(teacher)[0]
    known = AheadVectors(ahead.place.child("0")).find(
        asked, left.column("contract_hash")[0].as_py(), source.name
    )
    assert len(known) == len(asked) == streamed.counts["rows"]


@pytest.mark.ray
def test_an_error_of_the_teacher_ends_synthesis_with_its_own_message(corpus, tmp_path, ray_local):
    class Absent:
        name = "absent"

        def open(self):
            raise DataError("absent: no such model folder")

    ahead = Ahead(Place(str(tmp_path / "ahead")), (Absent(),), POOL)
    with pytest.raises(DataError, match="absent: no such model folder"):
        run(corpus, tmp_path, ahead=ahead)


def test_a_streaming_profile_needs_room_for_both_stages_at_once():
    stages = {"synthesis": {"cpus": 2}, "mining": {"cpus": 1}}
    assert Profile(logical_cpus=4, streaming=True, stages=stages).streaming
    Profile(logical_cpus=3, stages=stages)
    with pytest.raises(ValueError, match="together take 4 CPUs of 3 CPUs"):
        Profile(logical_cpus=3, streaming=True, stages=stages)
