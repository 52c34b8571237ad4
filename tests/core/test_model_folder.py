"""A model folder's identities, recorded in artefacts of earlier versions, and what is read of it, and when."""

import hashlib
import json

import pytest

from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder import gguf
from embedloom.encoder.registry import open_model, resolve_model
from embedloom.errors import DataError
from embedloom.merging.checks import model_state


@pytest.fixture
def own(tmp_path):
    """A folder of ours, with verdicts beside the weights."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("gate.json", "int8.json"):
        (folder / name).write_text("{}")
    PromptContract().save(folder)
    return folder


@pytest.fixture
def foreign(tmp_path):
    """A folder of another library: transformer and layers after the pooling in folders of their own."""
    folder = tmp_path / "foreign"
    for name in ("0_Transformer", "2_Dense", "onnx"):
        (folder / name).mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    (folder / "0_Transformer/model.safetensors").write_bytes(b"layers")
    (folder / "0_Transformer/config.json").write_text("{}")
    (folder / "2_Dense/model.safetensors").write_bytes(b"dense")
    (folder / "2_Dense/pytorch_model.bin").write_bytes(b"old")
    (folder / "onnx/model.safetensors").write_bytes(b"no")
    (folder / "README.md").write_text("x")
    (folder / "gate.json").write_text("{}")
    return folder


def blake(folder, names):
    found = hashlib.blake2b(digest_size=8)
    for name in names:
        found.update(name.encode() + (folder / name).read_bytes())
    return found.hexdigest()


def sha(folder, names):
    """sha256 of the canonical JSON of each file's sha256, both cut as artefacts have them."""
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:32] for name in sorted(names)}
    return [
        hashlib.sha256(text.encode()).hexdigest()[:16]
        for text in (
            json.dumps(hashes, separators=(",", ":")),
            json.dumps([hashes], separators=(",", ":")),
        )
    ]


def test_identities_of_our_own_folder_are_those_of_earlier_versions(own):
    model = ModelFolder(own)
    assert model.weights == blake(own, ["config.json", "contract.json", "model.safetensors"])
    configs = ["config.json", "contract.json", "tokenizer.json"]
    assert model.revision == blake(own, [*configs, "model.safetensors"])
    whole, listed = sha(own, [*configs, "model.safetensors"])
    assert (model.fingerprint, model.id, model_state(Place(str(own)))) == (whole, f"own@{whole}", listed)
    assert (model.weights, model.revision, whole, listed) == (
        "36f4021180d1824f", "6377ddf23e48bfa3", "5aaeba102f06078c", "51d7dd67960ec4b8",
    )  # fmt: skip


def test_identities_of_a_foreign_folder_are_those_of_earlier_versions(foreign):
    model = ModelFolder(foreign)
    weights = ["0_Transformer/model.safetensors", "2_Dense/model.safetensors"]
    whole, listed = sha(foreign, ["modules.json", "0_Transformer/config.json", *weights])
    assert (model.weights, model.fingerprint, model.id) == (whole, whole, f"foreign@{whole}")
    assert model_state(Place(str(foreign))) == listed
    everything = [
        weights[0],
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "onnx/model.safetensors",
    ]
    assert model.revision == blake(foreign, ["modules.json", *everything])
    assert (model.revision, whole, listed) == ("ce483b44d92e2341", "884c7c547f9c2bb1", "0f7a11c41d5a9b7e")


def test_an_artefact_is_known_by_its_fingerprint(own):
    done = ArtefactWriter(Place(str(own)), "model", "config", {}, "local").commit({})
    assert not (own / "model.safetensors").exists()  # an artefact begins empty
    model = ModelFolder(own)
    assert {model.id, model.revision, model_state(Place(str(own)))} == {done.fingerprint}
    ArtefactWriter(Place(str(own)), "corpus", "config", {}, "local").commit({})
    with pytest.raises(DataError, match="is a 'corpus' artefact, expected 'model'"):
        _ = ModelFolder(own).id


def test_everything_is_read_once_and_only_when_it_is_asked_for(own, foreign):
    model = ModelFolder(own)
    for path in (own / "model.safetensors", own / "tokenizer.json"):
        path.unlink()
    assert model.contract == PromptContract() and model.layout is None and model.transformer == own
    before = model.contract
    (own / "contract.json").unlink()
    assert model.contract is before

    read = []
    opened = ModelFolder(foreign, lambda path: read.append(path) or Layout)
    assert opened.id and read == []
    assert opened.beyond == "odd" and opened.scored_contract == PromptContract(template="{text}")
    with pytest.raises(DataError, match="our encoder would compute other vectors than its authors': odd"):
        _ = opened.contract
    assert read == [foreign]


class Layout:
    """Of a model that only its own library computes."""

    beyond = "odd"

    @staticmethod
    def prompts_only():
        return PromptContract(template="{text}")


def test_without_a_reader_a_foreign_folder_has_no_contract(foreign):
    with pytest.raises(DataError, match=r"contract\.json: missing; every embedloom model folder"):
        _ = ModelFolder(foreign).contract


def test_a_foreign_folder_is_read_by_transformers_only_when_its_layout_is_asked_for(foreign):
    model = open_model(foreign)
    assert model.id.startswith("foreign@") and not model.is_artefact
    assert "its modules are []" in str(model.beyond)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json, so this is not a model folder"),
        ("model.safetensors", r"no weights \(\*.safetensors\) in this model folder"),
    ],
)
def test_what_cannot_be_served_is_refused_by_what_it_lacks(own, missing, message):
    ModelFolder(own).check_servable()
    (own / missing).unlink()
    with pytest.raises(DataError, match=message):
        ModelFolder(own).check_servable()


def test_gguf_files_with_the_same_beginning_and_size_are_converted_apart(tmp_path, monkeypatch):
    """A hash of the first MiB took two tunings of one model for the same."""
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "convert_once", lambda path, folder: folder)
    folders = set()
    for number in range(2):
        path = tmp_path / str(number) / "model.gguf"
        path.parent.mkdir()
        path.write_bytes(bytes(2**20) + bytes([number]))
        folders.add(resolve_model(str(path)))
    copy = tmp_path / "copy/model.gguf"
    copy.parent.mkdir()
    copy.write_bytes(bytes(2**20) + b"\0")
    assert len(folders) == 2 and resolve_model(str(copy)) in folders
