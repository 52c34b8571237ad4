"""``embedloom.mine`` and ``embedloom.synthesize`` on Ray Datasets: what the stages of a run make of the same rows."""

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import embedloom
from embedloom.config.base import validate
from embedloom.config.cluster import PoolConfig
from embedloom.config.mining import MiningConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.schemas import content_id
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.mining import stage as mining
from embedloom.mining.stage import build_examples, mine, teacher_sources
from embedloom.raydata import stages
from embedloom.synthesis.stage import synthesize
from fakes_engines import FakeEngine
from fakes_mining import make_corpus, pair_row, random_documents
from fakes_without_ray import without_ray

POOL = PoolConfig(cpus=1)
SECTION = {
    "top_k": 12,
    "selection": {"negatives": 3, "margin_ratio": 0.99},
    "max_query_tokens": 96,
    "max_document_tokens": 80,
}


def rows_by_id(dataset):
    return {
        row["id"]: {
            key: value if not hasattr(value, "tolist") else value.tolist() for key, value in row.items()
        }
        for row in dataset.take_all()
    }


def stored(artefact, folder, kind):
    return {row["id"]: row for row in artefact.place.read_tables(folder, kind).to_pylist()}


@pytest.fixture
def tables(tmp_path):
    """60 documents and 40 pairs: a corpus artefact of a run, and Datasets whose columns have other names."""
    documents = [{**row, "lang": "eng"} for row in random_documents(60)]
    pairs = [
        pair_row(
            f"n{n}", " ".join(documents[n]["text"].split()[:3]), documents[n]["id"], instruction="Find it"
        )
        for n in range(40)
    ]
    corpus = make_corpus(tmp_path / "corpus", documents, pairs, cuts=2)
    for part in range(3):
        own = documents[part * 20 : part * 20 + 20]
        pq.write_table(
            pa.table({"key": [row["id"] for row in own], "body": [row["text"] for row in own]}),
            tmp_path / f"d{part}.parquet",
        )
    asked = pa.table(
        {
            "id": [row["id"] for row in pairs],
            "question": [row["query"] for row in pairs],
            "answer": [row["document_id"] for row in pairs],
            "instruction": ["Find it"] * 40,
        }
    )
    pq.write_table(asked, tmp_path / "pairs.parquet")
    return (
        corpus,
        ray.data.read_parquet([str(tmp_path / f"d{part}.parquet") for part in range(3)]),
        ray.data.read_parquet(str(tmp_path / "pairs.parquet")),
    )


COLUMNS = {
    "id_column": "key",
    "text_column": "body",
    "query_column": "question",
    "document_id_column": "answer",
}


@pytest.mark.ray
def test_examples_are_the_commands(ray_local, tables, tiny_model, tmp_path):
    corpus, documents, pairs = tables
    found = embedloom.mine(
        documents, pairs, teachers=str(tiny_model), out=str(tmp_path / "out"), pool=POOL, **COLUMNS, **SECTION
    )
    config = MiningConfig.model_validate({"teachers": [str(tiny_model)], **SECTION})
    writers = [
        ArtefactWriter(Place(str(tmp_path / name)), name, "c", {}, "local") for name in ("mining", "examples")
    ]
    mined = mine(config, corpus, [], teacher_sources(config), POOL, writers[0])
    built = build_examples(config, mined, corpus, None, POOL, writers[1])
    expected = stored(built, "examples", "examples")
    assert len(expected) > 10
    assert rows_by_id(found) == expected

    # The same rows again: nothing is mined anew, and nothing is left over.
    before = sorted(
        (path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    again = embedloom.mine(
        documents, pairs, teachers=str(tiny_model), out=str(tmp_path / "out"), pool=POOL, **COLUMNS, **SECTION
    )
    assert rows_by_id(again) == expected
    assert (
        sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*") if path.is_file())
        == before
    )
    # Other rules choose from the same candidates; another pair is other rows.
    fewer = {**SECTION, "selection": {"negatives": 1, "margin_ratio": 0.99}}
    other = embedloom.mine(
        documents, pairs, teachers=str(tiny_model), out=str(tmp_path / "out"), pool=POOL, **COLUMNS, **fewer
    )
    assert {len(row["negatives"]) for row in rows_by_id(other).values()} == {1}
    assert (
        tmp_path / "out/mining/manifest.json",
        dict(before)[tmp_path / "out/mining/manifest.json"],
    ) in before
    half = embedloom.mine(
        documents,
        pairs.limit(20),
        teachers=str(tiny_model),
        out=str(tmp_path / "out"),
        pool=POOL,
        **COLUMNS,
        **SECTION,
    )
    assert 0 < len(rows_by_id(half)) <= 20


@pytest.mark.ray
def test_what_does_not_fit_is_named(ray_local, tables, tiny_model, tmp_path):
    _, documents, pairs = tables
    with pytest.raises(ConfigError, match="top_kk: unknown key; the nearest valid key is 'top_k'"):
        embedloom.mine(documents, pairs, teachers=str(tiny_model), out=str(tmp_path / "out"), top_kk=3)
    with pytest.raises(Exception, match=r"no column 'text'; columns found: \['key', 'body'\]"):
        embedloom.mine(documents, pairs, teachers=str(tiny_model), out=str(tmp_path / "out"), id_column="key")
    with pytest.raises(DataError, match="the dataset has no row"):
        embedloom.mine(
            documents.limit(0), pairs, teachers=str(tiny_model), out=str(tmp_path / "out"), **COLUMNS
        )
    with pytest.raises(ConfigError, match="rescoring is a stage of its own"):
        embedloom.mine(documents, pairs, teachers="minilm-l6", out="x", rescoring={"model": "m", "top": 10})
    with pytest.raises(ConfigError, match="round_trip checks with the first mining teacher"):
        embedloom.synthesize(
            documents,
            generators="smollm2-135m",
            families=[{"family": "seed_queries", "rows": 3}],
            out="x",
            quality={"round_trip": {"top_k": 3}},
        )


@pytest.mark.ray
def test_written_rows_are_the_commands(ray_local, tables, tiny_llama, tmp_path):
    corpus, documents, _ = tables
    families = [{"family": "seed_queries", "rows": 12, "queries_per_document": 1}]
    quality = {"language": None, "near_duplicates": None, "contamination": None}
    found = embedloom.synthesize(
        documents, generators=str(tiny_llama), families=families, out=str(tmp_path / "out"), seed=7, id_column="key", text_column="body",
        pool=POOL, engine_factory=FakeEngine, quality=quality, shard_rows=4,
    )  # fmt: skip
    section = {
        "generators": [{"model": str(tiny_llama)}],
        "families": families,
        "quality": quality,
        "shard_rows": 4,
    }
    config = validate(SynthesisConfig, section, "test")
    writer = ArtefactWriter(Place(str(tmp_path / "command")), "synthesis", "c", {}, "local")
    from embedloom.synthesis.stage import model_sources

    expected = stored(
        synthesize(config, 7, corpus, POOL, writer, model_sources(config), engine_factory=FakeEngine),
        "pairs",
        "pairs",
    )
    assert len(expected) == 12
    assert json.dumps(rows_by_id(found), sort_keys=True) == json.dumps(expected, sort_keys=True)


class Batches:
    """A Dataset of tables in this process, as far as the stages ask for one."""

    def __init__(self, tables):
        self.tables = tables
        self.context = SimpleNamespace(execution_options=SimpleNamespace(preserve_order=False))

    def map_batches(self, function, *, batch_size, batch_format):
        return Batches([function(table) for table in self.tables])

    def iter_rows(self):
        return (row for table in self.tables for row in table.to_pylist())


def test_examples_are_the_stage_s_for_the_same_rows(tiny_model, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    monkeypatch.setattr(stages, "_read", lambda place, folder: place.read_tables(folder, "examples"))
    documents = [{**row, "lang": "eng"} for row in random_documents(60)]
    pairs = [
        pair_row(f"n{n}", " ".join(documents[n]["text"].split()[:3]), documents[n]["id"]) for n in range(40)
    ]
    given = [
        Batches([pa.table({"key": [row["id"] for row in own], "body": [row["text"] for row in own]}) for own in (documents[:25], documents[25:])]),
        Batches([pa.Table.from_pylist([{"id": row["id"], "question": row["query"], "answer": row["document_id"], "instruction": row["instruction"]} for row in pairs])]),
    ]  # fmt: skip
    found, again = (
        embedloom.mine(
            *given, teachers=str(tiny_model), out=str(tmp_path / "out"), pool=POOL, **COLUMNS, **SECTION
        )
        for _ in range(2)
    )
    corpus, config = (
        make_corpus(tmp_path / "corpus", documents, pairs),
        MiningConfig.model_validate({"teachers": [str(tiny_model)], **SECTION}),
    )
    writers = [
        ArtefactWriter(Place(str(tmp_path / name)), name, "c", {}, "local") for name in ("mining", "examples")
    ]
    mined = mining.mine(config, corpus, [], teacher_sources(config), POOL, writers[0])
    built = mining.build_examples(config, mined, corpus, None, POOL, writers[1])
    expected = stored(built, "examples", "examples")
    assert len(expected) > 10 and {row["id"]: row for row in found.to_pylist()} == expected
    assert again.equals(found) and len(list((tmp_path / "out" / "rows").iterdir())) == 1


def test_rows_without_a_text_s_id_are_named():
    with pytest.raises(
        DataError, match=r"column 'key' holds None \(row 1 of a batch\); every row needs an id"
    ):
        stages._Documents("key", "body", None)(pa.table({"key": ["a", None], "body": ["x", "y"]}))
    (pair,) = stages._Pairs("q", "d")(
        pa.table({"q": ["what?"], "d": ["d1"], "positive": ["its own"]})
    ).to_pylist()
    assert (
        pair["id"] == content_id("what?", "d1")
        and pair["positive"] == "its own"
        and pair["task_type"] == "retrieval"
    )
