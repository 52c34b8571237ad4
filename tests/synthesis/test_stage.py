"""The whole stage with engines that answer at once: quotas, refills, lineage, comparisons with other rows, kills."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import MANIFEST_FILE, Artefact, ArtefactWriter
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError, StageError
from embedloom.mining.queries import pair_files, write_queries
from embedloom.synthesis.families.registry import FAMILIES
from fakes_engines import CrashingEngine, FakeEngine, MumblingEngine, MuteEngine
from fakes_serial import patch_serial
from fakes_synthesis import QUALITY, pairs_of, run_stage, write_corpus

EVERY_FAMILY: list[dict[str, Any]] = [
    {"family": "seed_queries", "rows": 30, "queries_per_document": 2},
    {"family": "short_long", "rows": 6},
    {"family": "long_long", "rows": 6},
    {"family": "short_short", "rows": 6},
    {"family": "classification", "rows": 6},
    {"family": "sts", "rows": 6},
    {"family": "bitext", "rows": 6, "document_languages": {"deu": 1}},
    {"family": "existing_questions", "rows": 3},
    {"family": "translation", "rows": 4, "languages": {"deu": 1}, "pairs": "synthetic"},
]


def config(**changes: Any) -> SynthesisConfig:
    values: dict[str, Any] = {
        "generators": [{"model": "first", "weight": 3}, {"model": "second", "weight": 1}],
        "families": [{"family": "seed_queries", "rows": 40}],
        "tasks": {"count": 8},
        "quality": QUALITY,
        "shard_rows": 8,
    }
    return SynthesisConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run(
    corpus: Artefact, folder: Path, settings: SynthesisConfig | None = None, **arguments: Any
) -> Artefact:
    return run_stage(corpus, folder, settings or config(), **arguments)


rows = pairs_of


def everything(artefact: Artefact) -> dict[str, Any]:
    place = artefact.place
    return {
        name: place.read_table(name).to_pylist()
        for f in ("pairs", "rejects", "tasks")
        for name in place.names(f)
    }


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: seconds less a test."""
    patch_serial(monkeypatch)


@pytest.fixture(scope="module")
def every_family(corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    with pytest.MonkeyPatch.context() as patched:
        patch_serial(patched)
        return run(corpus, tmp_path_factory.mktemp("every"), config(families=EVERY_FAMILY))


def test_every_family_fills_its_quota_and_the_shares_follow_the_weights(every_family: Artefact):
    counts = every_family.counts
    assert counts["families"] == {section["family"]: section["rows"] for section in EVERY_FAMILY}
    written = counts["rows"] - 3  # the existing questions have no generator
    assert counts["generators"]["first"] / written == pytest.approx(0.75, abs=0.01)
    assert counts["generators"]["first"] + counts["generators"]["second"] == written
    found = rows(every_family)
    assert len(found) == counts["rows"] == 73
    ids = [row["id"] for row in found] + every_family.place.read_tables("rejects").column("id").to_pylist()
    assert len(set(ids)) == len(ids)
    assert Counter(row["generator"] for row in found) == {**counts["generators"], None: 3}


def test_rows_say_where_they_come_from(every_family: Artefact, corpus: Artefact):
    train = set(corpus.place.read_tables("documents/train").column("id").to_pylist())
    hashes = every_family.manifest["details"]["prompts"]["rows"]
    tasks = {row["text"]: row for row in every_family.place.read_tables("tasks").to_pylist()}
    found = rows(every_family)
    for row in found:
        if row["generator"] is None:
            assert row["origin"] == "public"
            continue
        assert row["origin"] == "synthetic"
        assert row["prompt_hash"] in hashes[row["generator"]].values()
        if row["task_type"] == "retrieval" and row["positive"] is None:
            assert row["document_id"] in train
        if row["task_type"] == "classification":
            assert row["negatives"], "misleading labels are the negatives"
            assert tasks[row["instruction"]]["generator"] != row["generator"], "tasks are another generator's"
    assert {row["task_type"] for row in found} == {family.task_type for family in FAMILIES.values()}
    # Translations: the query is German, document and task type are those of an English row of this stage.
    translated = [row for row in found if row["lang"] == "deu"]
    assert len(translated) == 4
    originals = {row["document_id"] for row in found if row["lang"] != "deu"}
    assert {row["document_id"] for row in translated} <= originals


def test_mining_takes_every_row(every_family: Artefact, corpus: Artefact, tmp_path: Path):
    files = pair_files(corpus, [every_family])
    counts = write_queries(files, (corpus.place, "documents/train"), Place(str(tmp_path)), 16)
    assert counts["rows"] == 73
    assert counts["rejects"] == {}
    assert counts["pairs"] == {"public": 3, "synthetic": 70}


def test_intermediate_files_are_gone_and_every_count_adds_up(every_family: Artefact):
    place = every_family.place
    assert not place.exists("steps")
    details = every_family.manifest["details"]
    for cell in [*details["cells"], *details["task_cells"]]:
        if cell["generator"]:
            assert cell["rows"] + cell["surplus"] + sum(cell["rejects"].values()) == cell["asked"]
    counts = every_family.counts
    assert sum(counts["rejects"].values()) == place.read_tables("rejects").num_rows
    assert counts["output_tokens"] == 5 * sum(
        cell["attempts"] for cell in [*details["cells"], *details["task_cells"]] if cell["generator"]
    )
    assert counts["tokens"] == counts["prompt_tokens"] + counts["output_tokens"]
    assert set(details["engines"]) == {"first", "second"}


@pytest.fixture(scope="module")
def undisturbed(corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """Three of ten answers are mumbled."""
    with pytest.MonkeyPatch.context() as patched:
        patch_serial(patched)
        return run(corpus, tmp_path_factory.mktemp("undisturbed"), engine_factory=MumblingEngine)


def test_rejects_are_refilled_until_the_quota_and_the_shares_are_met(undisturbed: Artefact):
    counts = undisturbed.counts
    assert counts["generators"] == {"first": 30, "second": 10}
    assert counts["rejects"]["invalid_json"] >= 5
    assert undisturbed.manifest["details"]["rounds"]["rows"] >= 2
    assert counts["attempts"] > 40


class FailingSecond(MumblingEngine):
    """Fails for the second generator."""

    def generate(self, requests):
        if self.folder.name == "second":
            raise RuntimeError("engine lost")
        return super().generate(requests)


class CrashingMumbler(CrashingEngine, MumblingEngine):
    """Takes its process with it once, and mumbles."""


@pytest.mark.ray
def test_on_ray_an_interrupted_run_continues_to_the_same_rows(
    undisturbed: Artefact, corpus: Artefact, tmp_path: Path, ray_local: None
):
    with pytest.raises(StageError, match=r"second: a worker failed: RuntimeError: engine lost$"):
        run(corpus, tmp_path, engine_factory=FailingSecond)
    place = Place(str(tmp_path / "out"))
    assert not place.exists(MANIFEST_FILE)
    done = place.names("steps/rows/round-000/rows")
    assert len(done) == 4, "what the first generator finished stays"
    Path(place.uri, done[2]).unlink()
    again = run(corpus, tmp_path, engine_factory=CrashingMumbler)
    assert (tmp_path / "first/crashed").exists()
    assert everything(again) == everything(undisturbed)
    assert again.counts == undisturbed.counts


def test_a_generator_that_is_always_refused_stops_at_the_limit(
    corpus: Artefact, tmp_path: Path, serial: None
):
    settings = config(families=[{"family": "sts", "rows": 4}], max_attempts_per_row=2)
    with pytest.raises(StageError) as caught:
        run(corpus, tmp_path, settings, engine_factory=MuteEngine)
    assert str(caught.value) == (
        "synthesize: first, family sts, language eng: 0 of 3 rows kept of 6 asked for (refused: invalid_json 6); "
        "synthesis.max_attempts_per_row allows to ask for 2 times the rows"
    )
    assert not Place(str(tmp_path / "out")).exists(MANIFEST_FILE)


def test_more_existing_questions_than_there_are_stop_with_their_number(
    corpus: Artefact, tmp_path: Path, serial: None
):
    with pytest.raises(StageError, match=r"5 of 9 rows kept .*lower the family's rows to 5"):
        run(corpus, tmp_path, config(families=[{"family": "existing_questions", "rows": 9}]))


def test_an_unknown_prompt_is_refused_before_anything_is_written(corpus: Artefact, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^synthesis.families.seed_queries.prompt: 'haiku' is unknown"):
        run(corpus, tmp_path, config(families=[{"family": "seed_queries", "rows": 1, "prompt": "haiku"}]))
    assert not Place(str(tmp_path / "out")).exists("steps")


def test_a_corpus_without_train_documents_is_refused(tmp_path: Path):
    empty = ArtefactWriter(Place(str(tmp_path / "corpus")), "corpus", "c", {}, "local").commit({"rows": 0})
    with pytest.raises(DataError, match="documents/train: no Parquet file"):
        run(empty, tmp_path)


class CountingMumbler(MumblingEngine):
    """Mumbles three answers of ten, and notes every request by its id."""

    def generate(self, requests):
        with (self.folder / "asked.txt").open("a") as notes:
            notes.writelines(f"{request.id}\n" for request in requests)
        return super().generate(requests)


def asked(folder: Path) -> list[str]:
    return [
        line for name in ("first", "second") for line in (folder / name / "asked.txt").read_text().split()
    ]


@pytest.fixture
def stopped(corpus: Artefact, tmp_path: Path, serial: None) -> Path:
    """A stage that its limit stopped: 1.2 attempts a row, and three of ten are refused."""
    with pytest.raises(StageError, match=r"max_attempts_per_row allows to ask for 1\.2 times the rows"):
        run(corpus, tmp_path, config(max_attempts_per_row=1.2), engine_factory=CountingMumbler)
    assert len(asked(tmp_path)) == 48
    return tmp_path


def test_a_raised_limit_goes_on_with_the_rows_already_paid_for(corpus: Artefact, stopped: Path):
    before = set(asked(stopped))
    artefact = run(corpus, stopped, config(max_attempts_per_row=4), engine_factory=CountingMumbler)
    every = asked(stopped)
    assert artefact.counts["rows"] == 40
    assert len(set(every)) == len(every) == artefact.counts["attempts"] < 70, "nothing was asked twice"
    assert before < set(every)
    assert sum(artefact.counts["rejects"].values()) + artefact.counts["surplus"] + 40 == len(every)


@pytest.mark.parametrize("wanted", [20, 90])
def test_other_numbers_of_rows_go_on_with_the_rows_already_paid_for(
    corpus: Artefact, stopped: Path, wanted: int
):
    grown = config(families=[{"family": "seed_queries", "rows": wanted}])
    artefact = run(corpus, stopped, grown, engine_factory=CountingMumbler)
    every = asked(stopped)
    assert artefact.counts["rows"] == wanted
    assert artefact.counts["generators"] == {
        "first": wanted * 3 // 4 + wanted % 4 // 2,
        "second": wanted // 4,
    }
    assert len(set(every)) == len(every) == artefact.counts["attempts"]
    assert (len(every) == 48) == (wanted == 20), "fewer rows than there are ask nothing"
    found = rows(artefact)
    assert len({row["query"] for row in found}) == len({row["id"] for row in found}) == wanted


def test_a_family_whose_rows_are_lowered_to_fewer_than_the_generators_drops_a_cell(
    corpus: Artefact, stopped: Path
):
    lowered = config(families=[{"family": "seed_queries", "rows": 1}])
    artefact = run(corpus, stopped, lowered, engine_factory=CountingMumbler)
    assert (artefact.counts["rows"], artefact.counts["generators"]) == (1, {"first": 1, "second": 0})
    assert len(asked(stopped)) == 48


class RepeatingEngine(FakeEngine):
    """Knows 150 texts."""

    def _answer(self, request):
        return super()._answer(replace(request, seed=request.seed % 150))


def test_rows_written_before_refuse_their_duplicates_after_keys_are_sorted_anew(
    corpus: Artefact, tmp_path: Path, serial: None, monkeypatch: pytest.MonkeyPatch
):
    """As when a quota grows so far that more buckets are needed."""
    with pytest.raises(StageError, match="refused: duplicate"):
        run(corpus, tmp_path, config(max_attempts_per_row=1), engine_factory=RepeatingEngine)
    assert Place(str(tmp_path / "out")).names("steps/rows/round-000/keys/of-0001/0000")
    monkeypatch.setattr("embedloom.synthesis.rounds.bucket_count", lambda rows: 3)
    grown = config(families=[{"family": "seed_queries", "rows": 60}])
    found = run(corpus, tmp_path, grown, engine_factory=RepeatingEngine)
    queries = [row["query"] for row in rows(found)]
    assert len(set(queries)) == len(queries) == 60


@pytest.fixture
def ended(corpus: Artefact, tmp_path: Path, serial: None) -> Artefact:
    """A finished artefact, moved aside; every family that asks an LLM."""
    families = [family for family in EVERY_FAMILY if family["family"] != "existing_questions"]
    artefact = run(
        corpus, tmp_path, config(families=families, max_attempts_per_row=99), engine_factory=CountingMumbler
    )
    artefact.place.move_to(Place(str(tmp_path / "out.previous")))
    return Artefact.open(Place(str(tmp_path / "out.previous")))


def test_a_finished_artefacts_rows_count_for_larger_numbers_of_them(
    corpus: Artefact, ended: Artefact, tmp_path: Path
):
    families = [{**family, "rows": 3 * family["rows"]} for family in EVERY_FAMILY]
    families = [family for family in families if family["family"] != "existing_questions"]
    before, kept = asked(tmp_path), rows(ended)
    grown = run(
        corpus,
        tmp_path,
        config(families=families, max_attempts_per_row=99),
        engine_factory=CountingMumbler,
        previous=ended,
    )
    every, found = asked(tmp_path), rows(grown)
    assert len(set(every)) == len(every), "nothing is asked twice"
    assert {row["id"] for row in kept} <= {row["id"] for row in found}
    assert {row["query"] for row in kept} <= {row["query"] for row in found}
    assert grown.counts["families"] == {family["family"]: family["rows"] for family in families}
    ids = [row["id"] for row in found] + grown.place.read_tables("rejects").column("id").to_pylist()
    assert len(set(ids)) == len(ids)
    details = grown.manifest["details"]
    for cell in [*details["cells"], *details["task_cells"]]:
        assert cell["rows"] + cell["surplus"] + sum(cell["rejects"].values()) == cell["asked"]
    assert sum(cell["attempts"] for cell in [*details["cells"], *details["task_cells"]]) == len(every)
    assert sum(grown.counts["rejects"].values()) == grown.place.read_tables("rejects").num_rows
    assert len(before) < len(every)
    # And once more: what was carried can be carried on.
    grown.place.move_to(Place(str(tmp_path / "again")))
    again = Artefact.open(Place(str(tmp_path / "again")))
    fewer = [{**family, "rows": 1 + family["rows"] // 2} for family in families]
    last = run(
        corpus,
        tmp_path,
        config(families=fewer, max_attempts_per_row=99),
        engine_factory=CountingMumbler,
        previous=again,
    )
    assert asked(tmp_path) == every, "fewer rows than there are ask nothing"
    assert {row["id"] for row in rows(last)} < {row["id"] for row in found}
    assert last.counts["families"] == {family["family"]: family["rows"] for family in fewer}


def test_an_artefact_of_an_earlier_version_is_written_anew(corpus: Artefact, ended: Artefact, tmp_path: Path):
    manifest = ended.manifest
    manifest["details"].pop("phases")
    once = len(asked(tmp_path))
    families = [family for family in EVERY_FAMILY if family["family"] != "existing_questions"]
    run(
        corpus,
        tmp_path,
        config(families=families, max_attempts_per_row=99),
        engine_factory=CountingMumbler,
        previous=ended,
    )
    assert len(asked(tmp_path)) == 2 * once
