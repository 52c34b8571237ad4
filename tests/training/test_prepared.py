"""Sources are tokenized once for all who read them alike, and never taken over by who reads them otherwise."""

import json
import shutil

import pytest

from embedloom.compute.shards import run_here, run_tasks
from embedloom.config.training import TrainingSource
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.prompting import PromptContract
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.core.trained_prompts import Prompt, TrainedPrompt, trained_contract
from embedloom.errors import DataError
from embedloom.training import data as data_module
from embedloom.training.data import (
    INDEX_FILE,
    ExampleStore,
    drawn_prompts,
    preparation_counts,
    prepare_sources,
)
from fakes_training import training_config


def write(path, count=6):
    rows = [{"id": f"r{n}", "query": f"q {n}", "pos": [f"p {n}"], "neg": [f"n {n}"]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prepare(tiny_model, tmp_path):
    """Prepares one source; returns the name of its folder."""
    path = write(tmp_path / "a.jsonl")
    data = Place(str(tmp_path / "data"))

    def call(negatives=1, config=None, **changes):
        source = TrainingSource(**{"name": "a", "format": "flagembedding", "path": str(path), **changes})
        found = prepare_sources("t", config or training_config(), negatives, [source], None, tiny_model, data)
        return found[source.name]["folder"]

    call.path, call.data = path, data
    return call


def test_names_weights_and_caps_do_not_matter_and_what_decides_tokens_does(prepare):
    first = prepare()
    assert {prepare(name="b"), prepare(weight=2.0), prepare(cap=3), prepare(license="mit")} == {first}
    skipping = training_config(bad_rows="skip")
    others = [
        prepare(instruction="Find"), prepare(negatives=2), prepare(task_type="sts"), prepare(config=skipping)
    ]  # fmt: skip
    assert len({first, *others}) == 5


def test_a_stage_may_read_less_of_a_document(tiny_model, tmp_path):
    """Its documents are the beginnings of the whole ones, and the queries are the same."""
    words = " ".join(f"w{n}" for n in range(40))
    row = {"id": "r", "query": f"q {words}", "pos": [f"p {words}"], "neg": [f"n {words}"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    source = TrainingSource(name="a", format="flagembedding", path=str(tmp_path / "a.jsonl"))
    data = Place(str(tmp_path / "data"))

    def prepared(limit):
        found = prepare_sources("t", training_config(), 1, [source], None, tiny_model, data, run_here, limit)
        (group,) = ExampleStore(data, {"a": found["a"]["folder"]}, 1).groups([0])
        return found["a"], group

    (whole, of_whole), (short, of_short) = prepared(None), prepared(12)
    assert short["folder"] != whole["folder"] and list(of_short.query) == list(of_whole.query)
    assert [len(ids) for ids in of_short.documents] == [12, 12]
    for beginning, document in zip(of_short.documents, of_whole.documents, strict=True):
        assert len(document) > 12 and list(beginning[:11]) == list(
            document[:11]
        )  # a last one may end the text
    assert short["cut"]["cut"] == 3 and whole["cut"]["read"] > short["cut"]["read"]


def test_a_changed_file_is_read_again(prepare):
    first = prepare()
    write(prepare.path, count=7)
    assert prepare() != first


def test_a_preparation_without_its_index_is_not_taken_for_done(prepare):
    folder = prepare()
    place = prepare.data.child(folder)
    index = place.read_json(INDEX_FILE)
    place.delete(INDEX_FILE)
    assert prepare() == folder and place.read_json(INDEX_FILE) == index


def test_two_names_of_one_source_have_one_folder_and_their_own_counts(tiny_model, tmp_path):
    path = write(tmp_path / "a.jsonl")
    sources = [TrainingSource(name=name, format="flagembedding", path=str(path)) for name in ("a", "b")]
    data = Place(str(tmp_path / "data"))
    found = prepare_sources("t", training_config(), 3, sources, None, tiny_model, data)
    assert found["a"] == found["b"] and len(list((tmp_path / "data").iterdir())) == 1
    # Six rows of one negative each, three wanted.
    assert preparation_counts(found) == {"repeated_negatives": 24, "rejects": {}}


def test_a_cap_is_checked_against_rows_that_were_there_already(prepare):
    prepare()
    with pytest.raises(DataError, match=r"source 'a': cap is 9, but it has 6 usable rows"):
        prepare(cap=9)


def test_prompts_are_counted_by_row_and_weighed_by_what_is_drawn(tiny_model, tmp_path):
    """Six rows without an instruction, three with their own: 40 queries drawn of nine rows each, by thirds."""
    rows = [{"query": f"q {n}", "pos": ["p"], "neg": ["n"]} for n in range(9)]
    for row in rows[:3]:
        row["prompt"] = "Find it"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TrainingSource(name="faq", format="flagembedding", path=str(tmp_path / "a.jsonl"))
    found = prepare_sources(
        "t", training_config(), 1, [source], None, tiny_model, Place(str(tmp_path / "data"))
    )
    prompts = {one.prompt.instruction: one for one in drawn_prompts([source], found, {"faq": 90})}
    own = PromptContract.load(tiny_model).instructions["retrieval"]
    assert {text: (one.name, one.queries) for text, one in prompts.items()} == {
        "Find it": ("faq", 30.0), own: ("faq", 60.0)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task_type", "stated", "expected"),
    [
        ("retrieval", None, ""), ("retrieval", "Keep it", "Keep it"),
        ("sts", None, ""), ("sts", "Alike?", "Alike?"),  # an examples table says it of every row; null: bare
        ("classification", None, ""),
    ],
)  # fmt: skip
def test_what_stood_before_documents_is_counted_too(tiny_model, tmp_path, task_type, stated, expected):
    row = {
        "id": "r", "query": "q", "query_instruction": "Alike?", "positive": "p", "positive_score": 1.0,
        "negatives": ["n"], "negative_scores": [0.1], "document_instruction": stated, "task_type": task_type,
        "dataset": "pairs",
    }  # fmt: skip
    place = Place(str(tmp_path / "own"))
    place.write_table("examples/part-000000.parquet", table_from_rows("examples", [row]))
    source = TrainingSource(name="own", format="examples", path=place.uri)
    found = prepare_sources(
        "t", training_config(), 1, [source], None, tiny_model, Place(str(tmp_path / "data"))
    )
    (one,) = drawn_prompts([source], found, {"own": 5})
    assert one == TrainedPrompt(Prompt(task_type, "Alike?", expected), "pairs", 5.0)


def test_candidates_with_other_mixes_share_the_tokens_of_a_later_stage(tiny_model, tmp_path):
    path = write(tmp_path / "a.jsonl")
    source = TrainingSource(name="a", format="flagembedding", path=str(path))
    folders = set()
    for name, share in (("one", 3.0), ("two", 5.0)):
        model = tmp_path / name
        shutil.copytree(tiny_model, model)
        mix = [
            TrainedPrompt(Prompt("retrieval", "Find", ""), "x", 9.0),
            TrainedPrompt(Prompt("retrieval", "Seek", ""), "y", share),
        ]
        trained_contract(PromptContract.load(model), mix, 9.0 + share).save(model)
        data = Place(str(tmp_path / "data"))
        folders.add(prepare_sources("t", training_config(), 1, [source], None, model, data)["a"]["folder"])
    assert len(folders) == 1


def mined_rows(folder, rows):
    """Mined examples of two datasets in three files, every sixth with too few negatives."""
    writer = ArtefactWriter(Place(str(folder)), "mining", "test", {}, "local")
    found = [
        {
            "id": f"m{n}", "query": f"q {n}", "query_instruction": "Find", "positive": f"p {n}", "positive_score": 0.9,
            "negatives": [f"n {n}"] * (n % 6 > 0), "negative_scores": [0.3] * (n % 6 > 0),
            "document_instruction": None, "task_type": "retrieval", "dataset": "ab"[n % 4 == 0],
        }
        for n in range(rows)
    ]  # fmt: skip
    for number in range(3):
        part = table_from_rows("examples", found[number::3])
        writer.place.write_table(f"examples/part-{number:06d}.parquet", part)
    return writer.commit({"rows": rows})


@pytest.mark.ray
def test_ray_tasks_prepare_what_one_process_prepares(ray_local, tiny_model, tmp_path, monkeypatch):
    """More rows than a range holds, read by range and read once; a relative path, as only the driver is in this folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_module, "_SMALL_BYTES", 0)
    write(tmp_path / "a.jsonl", count=4500)
    mined = mined_rows(tmp_path / "mined", 9000)
    sources = [
        TrainingSource(name="faq", format="flagembedding", path="a.jsonl"),
        TrainingSource(name="b", format="mined", dataset="b"),
    ]
    config = training_config(bad_rows="skip")
    found = {
        name: prepare_sources("t", config, 1, sources, mined, tiny_model, Place(str(tmp_path / name)), tasks)
        for name, tasks in (("here", run_here), ("ray", run_tasks))
    }
    assert found["ray"] == found["here"] and found["here"]["faq"]["parts"] == [4096, 404]
    # 2,250 rows of b have n % 4 == 0, of which those with n % 12 == 0 have no negative.
    assert found["here"]["b"]["parts"] == [1500] and found["here"]["b"]["rejects"] == {"no_negatives": 750}
    here, there = Place(str(tmp_path / "here")), Place(str(tmp_path / "ray"))
    assert here.files() == there.files() and len(here.files()) == 8
    for name in here.files():
        assert here.read_bytes(name) == there.read_bytes(name), name
