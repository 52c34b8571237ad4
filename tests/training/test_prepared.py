"""Sources are tokenized once for all who read them alike, and never taken over by who reads them otherwise."""

import json

import pytest

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.storage import Place
from embedloom.training.prepare import INDEX_FILE
from embedloom.training.prepared import preparation_counts, prepare_sources
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
