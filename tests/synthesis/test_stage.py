from pathlib import Path

import pytest

from embedloom.artefacts import MANIFEST_FILE, Artefact, ArtefactWriter
from embedloom.config.data import SynthesisConfig
from embedloom.config.resources import PoolConfig
from embedloom.errors import ConfigError, DataError, StageError
from embedloom.records import content_id, table_from_rows
from embedloom.storage import Place
from embedloom.synthesis.prompt import load_prompt
from embedloom.synthesis.stage import synthesize
from fakes_engines import CrashingEngine, FakeEngine, MuteEngine

POOL = PoolConfig(cpus=1)
WORDS = ("alpha", "beta ramble", "gamma", "delta", "epsilon mumble", "zeta")


def config(**changes) -> SynthesisConfig:
    values = {
        "generators": ({"model": "first", "weight": 3}, {"model": "second", "weight": 1}),
        "documents": 40,
        "shard_rows": 8,
        "max_reject_share": 0.9,
    }
    return SynthesisConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    place = Place(str(tmp_path_factory.mktemp("corpus")))
    writer = ArtefactWriter(place, "corpus", "c", {}, "local")
    rows = [{"id": content_id(str(n)), "text": f"{WORDS[n % 6]} {n}", "source": "s"} for n in range(60)]
    place.write_table("documents/train/part-000000.parquet", table_from_rows("documents", rows[:33]))
    place.write_table("documents/train/part-000001.parquet", table_from_rows("documents", rows[33:]))
    held_out = [{"id": content_id("held out"), "text": "held out", "source": "s"}]
    place.write_table("documents/test/part-000000.parquet", table_from_rows("documents", held_out))
    return writer.commit({"rows": 61})


def run(corpus: Artefact, folder: Path, settings: SynthesisConfig | None = None, **arguments) -> Artefact:
    out = ArtefactWriter(
        Place(str(folder / "out")), "synthesis", "c", {"corpus": corpus.fingerprint}, "local"
    )
    arguments = {"engine_factory": FakeEngine, "pool": POOL} | arguments
    models = {name: folder / name for name in ("first", "second")}
    for model in models.values():
        model.mkdir(parents=True, exist_ok=True)
    return synthesize(settings or config(), 42, corpus, out=out, model_folders=models, **arguments)


def rows(artefact: Artefact) -> list[dict[str, object]]:
    return artefact.place.read_tables("pairs", "pairs").to_pylist()


@pytest.fixture(scope="module")
def undisturbed(corpus: Artefact, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return run(corpus, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.ray
def test_the_mix_is_exact_and_the_counts_add_up(undisturbed: Artefact):
    pairs = undisturbed.place.read_tables("pairs", "pairs")
    rejects = undisturbed.place.read_tables("rejects", "rejects")
    counts = undisturbed.counts
    assert counts["documents"] == 40
    assert pairs.num_rows == counts["rows"] == counts["generators"]["first"] + counts["generators"]["second"]
    assert sum(counts["rejects"].values()) == rejects.num_rows == 40 - pairs.num_rows
    assert set(counts["rejects"]) == {"truncated", "invalid_json"}
    ids = pairs.column("id").to_pylist() + rejects.column("id").to_pylist()
    assert len(set(ids)) == 40

    # Three to one of 40 documents, told apart by the folder each was written to.
    assert [undisturbed.place.read_tables(f"work/{n}").num_rows for n in (0, 1)] == [30, 10]
    # 30 documents make four shards of eight, 10 make two more.
    assert undisturbed.place.names("pairs") == [f"pairs/part-{n:06d}.parquet" for n in range(6)]
    assert undisturbed.place.names("rejects") == [f"rejects/part-{n:06d}.parquet" for n in range(6)]

    # The fake reads 7 tokens a prompt; it writes 5 a good answer, 3 a mumble, 64 (all it may) a ramble.
    mumbles, rambles = counts["rejects"]["invalid_json"], counts["rejects"]["truncated"]
    assert counts["prompt_tokens"] == 7 * 40
    assert counts["output_tokens"] == 5 * pairs.num_rows + 3 * mumbles + 64 * rambles
    assert counts["tokens"] == counts["prompt_tokens"] + counts["output_tokens"]


@pytest.mark.ray
def test_pairs_point_at_train_documents_and_say_where_they_come_from(undisturbed: Artefact, corpus: Artefact):
    train = set(corpus.place.read_tables("documents/train").column("id").to_pylist())
    prompt = load_prompt("seed_query")
    for row in rows(undisturbed):
        assert row["document_id"] in train
        assert row["id"] == content_id(str(row["document_id"]), str(row["generator"]), prompt.hash, "0")
        assert (row["origin"], row["prompt_hash"]) == ("synthetic", prompt.hash)
    assert undisturbed.manifest["details"]["prompt_hash"] == prompt.hash


class FailingSecond(FakeEngine):
    """Fails for the second generator."""

    def generate(self, requests):
        if self.folder.name == "second":
            raise RuntimeError("engine lost")
        return super().generate(requests)


@pytest.mark.ray
def test_an_interrupted_run_continues_to_the_same_rows(
    undisturbed: Artefact, corpus: Artefact, tmp_path: Path
):
    with pytest.raises(StageError, match=r"^synthesize second: a worker failed: RuntimeError: engine lost$"):
        run(corpus, tmp_path, engine_factory=FailingSecond)
    place = Place(str(tmp_path / "out"))
    assert not place.exists(MANIFEST_FILE)
    assert len(place.names("pairs")) == 4, "what the first generator finished stays"
    for name in ("pairs/part-000001.parquet", "rejects/part-000002.parquet", "pairs/part-000002.parquet"):
        (tmp_path / "out" / name).unlink()
    again = run(corpus, tmp_path)
    assert rows(again) == rows(undisturbed)
    assert again.counts == undisturbed.counts
    assert again.place.read_tables("rejects").equals(undisturbed.place.read_tables("rejects"))


@pytest.mark.ray
def test_a_dying_engine_loses_and_repeats_nothing(undisturbed: Artefact, corpus: Artefact, tmp_path: Path):
    crashed = run(corpus, tmp_path, engine_factory=CrashingEngine)
    assert (tmp_path / "first/crashed").exists()
    assert rows(crashed) == rows(undisturbed)


@pytest.mark.ray
def test_too_many_rejects_fail_the_stage_with_the_counts(corpus: Artefact, tmp_path: Path, ray_local: None):
    settings = config(max_reject_share=0.5, documents=12)
    with pytest.raises(StageError) as caught:
        run(corpus, tmp_path, settings, engine_factory=MuteEngine)
    assert str(caught.value) == (
        "synthesize: first had 9 of 9 queries refused (invalid_json 9); synthesis.max_reject_share allows a share of 0.5"
    )
    assert not Place(str(tmp_path / "out")).exists(MANIFEST_FILE)


def test_a_generator_given_twice_is_refused(corpus: Artefact, tmp_path: Path):
    settings = config(generators=({"model": "first"}, {"model": "first"}))
    with pytest.raises(ConfigError, match=r"^synthesis.generators: 'first' stands 2 times"):
        run(corpus, tmp_path, settings)


def test_an_unknown_prompt_is_refused_before_anything_is_written(corpus: Artefact, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^synthesis.prompt: 'haiku' is unknown"):
        run(corpus, tmp_path, config(prompt="haiku"))
    assert not Place(str(tmp_path / "out")).exists("work")


def test_a_corpus_without_train_documents_is_refused(tmp_path: Path):
    empty = ArtefactWriter(Place(str(tmp_path / "corpus")), "corpus", "c", {}, "local").commit({"rows": 0})
    with pytest.raises(DataError, match="documents/train: no Parquet file"):
        run(empty, tmp_path)
