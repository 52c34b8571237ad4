"""Models in an object store: fetched once, linked where nothing changed, refused where they changed under a command."""

import shutil
from pathlib import Path

import boto3
import numpy as np
import pytest

from embedloom.core.model_folder import ModelFolder
from embedloom.core.storage import Place
from embedloom.encoder import stored_models
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import (
    NodeModel,
    check_model_name,
    local_contents,
    local_folder,
    model_at,
    open_model,
)
from embedloom.errors import DataError
from fakes_store import s3_server

BUCKET = "models"


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """The tiny model in a bucket, and a cache of this test's own."""
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path / "cache"))
    with s3_server():
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        there = Place(f"s3://{BUCKET}/runs/tiny")
        there.upload(tiny_model)
        yield there


def fetches(monkeypatch) -> list[str]:
    names: list[str] = []
    real = Place.get_file
    monkeypatch.setattr(
        Place, "get_file", lambda self, name, target: (names.append(name), real(self, name, target))[1]
    )
    return names


def test_a_model_by_its_address_is_the_model(place, tiny_model, monkeypatch):
    names = fetches(monkeypatch)
    check_model_name(place.uri, "MODEL")
    model = open_model(NodeModel.of(place.uri))
    assert model.fingerprint == ModelFolder(tiny_model).fingerprint
    assert model.path.name == "tiny" and isinstance(model.travels, NodeModel)
    assert sorted(names) == sorted(
        path.relative_to(tiny_model).as_posix() for path in tiny_model.rglob("*") if path.is_file()
    )
    texts = ["a text", "ein Satz"]
    here, there = (Encoder.load(folder, dtype="float32") for folder in (tiny_model, model.path))
    assert np.array_equal(here.embed(texts, "document")[0], there.embed(texts, "document")[0])
    names.clear()
    assert local_folder(model_at(place)) == model.path and not names  # from the cache


def test_a_verdict_beside_the_weights_fetches_only_the_verdict(place, monkeypatch):
    before = model_at(place)
    first = local_folder(before)
    weights = (first / "model.safetensors").stat().st_ino
    names = fetches(monkeypatch)
    place.write_json("gate.json", {"verdict": "passed"})
    assert model_at(place) == before  # the same model
    second = local_folder(before)
    assert names == ["gate.json"] and (second / "gate.json").is_file()
    assert (second / "model.safetensors").stat().st_ino == weights
    assert not first.exists()


def test_other_weights_under_a_command_are_refused_and_forgotten(place, tmp_path):
    begun = model_at(place)
    local_folder(begun)
    contents = local_contents(place.uri)
    place.write_bytes("model.safetensors", b"other")
    with pytest.raises(
        DataError, match=r"s3://models/runs/tiny: its files are not those that the command began with"
    ):
        local_folder(begun)
    assert local_contents(place.uri) != contents
    folder = local_folder(model_at(place))
    assert (folder / "model.safetensors").read_bytes() == b"other"
    kept = tmp_path / "cache" / "stored-models"
    assert sum(path.is_file() for path in kept.rglob("files/*")) == sum(
        path.is_file() for path in folder.rglob("*")
    )


def test_a_fetch_that_fails_leaves_no_model(place, monkeypatch, tmp_path):
    def failing(self, name, target):
        Path(target).write_bytes(b"half")
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "get_file", failing)
        with pytest.raises(OSError, match="connection reset"):
            local_folder(model_at(place))
    assert not list((tmp_path / "cache" / "stored-models").rglob("*.safetensors"))
    assert (local_folder(model_at(place)) / "model.safetensors").stat().st_size > 1000


def test_what_is_no_model_is_named(place):
    with pytest.raises(DataError, match=r"encoder\.base: 's3://models/nothing' has no config\.json"):
        check_model_name(f"s3://{BUCKET}/nothing", "encoder.base")
    place.delete("model.safetensors")
    with pytest.raises(DataError, match="holds no weights"):
        check_model_name(place.uri, "encoder.base")
    with pytest.raises(DataError, match="no such folder, or an empty one"):
        stored_models.fetched(Place(f"s3://{BUCKET}/nothing"))


def test_checkpoints_in_the_folder_are_no_part_of_it(place):
    before = stored_models.state_of(place)
    place.write_bytes("_train/run/step/weights", b"x")
    assert stored_models.state_of(place) == before
    shutil.rmtree(local_folder(model_at(place)))
    assert not (local_folder(model_at(place)) / "_train").exists()
