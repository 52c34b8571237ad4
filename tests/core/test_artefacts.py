import json

import pyarrow as pa
import pytest

from embedloom.core.artefacts import Artefact, ArtefactWriter, fingerprint
from embedloom.core.storage import Place
from embedloom.errors import DataError


def writer(place: Place, config: str = "c1") -> ArtefactWriter:
    return ArtefactWriter(place, "pairs", config, {"corpus": "f0"}, "local")


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    uri = str(tmp_path / "artefact") if request.param == "local" else f"memory://{tmp_path.name}/artefact"
    yield Place(uri)
    Place(uri).remove()


def test_artefact_exists_only_after_commit(place):
    out = writer(place)
    place.write_table("pairs/part-000000.parquet", pa.table({"id": ["a"]}))
    with pytest.raises(DataError, match=r"no manifest\.json.*missing or unfinished"):
        Artefact.open(place)
    committed = out.commit({"rows": 1})
    assert Artefact.open(place, "pairs") == committed
    assert committed.counts == {"rows": 1}
    assert not place.exists("_building.json")


def test_same_fingerprint_continues_and_another_starts_empty(place):
    writer(place)
    place.write_bytes("part", b"whole")
    assert writer(place).resumed and place.exists("part")
    assert not writer(place, "c2").resumed
    assert not place.exists("part")


def test_find_compares_fingerprints(place):
    done = writer(place).commit({"rows": 0})
    assert Artefact.find(place, done.fingerprint) == done
    assert Artefact.find(place, "other") is None
    assert Artefact.find(place.child("nothing"), done.fingerprint) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{half", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "corrupt, key"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_corrupt_manifest_is_an_error_and_never_done(place, content, message):
    writer(place).commit({"rows": 1})
    place.write_bytes("manifest.json", content)
    with pytest.raises(DataError, match=message):
        Artefact.open(place)
    with pytest.raises(DataError, match=message):
        Artefact.find(place, "any")


def test_other_kind_and_other_schema_version_are_refused(place):
    writer(place).commit({"rows": 1})
    with pytest.raises(DataError, match="is a 'pairs' artefact, expected 'corpus'"):
        Artefact.open(place, "corpus")
    manifest = json.loads(place.read_bytes("manifest.json"))
    place.write_json("manifest.json", {**manifest, "schema_version": 99})
    with pytest.raises(DataError, match="schema_version 99"):
        Artefact.open(place)


def test_unreadable_parquet_names_the_file(place):
    place.write_bytes("pairs/part-000000.parquet", b"PAR1 not really")
    with pytest.raises(DataError, match=r"part-000000\.parquet: not readable as Parquet"):
        place.read_tables("pairs")
    with pytest.raises(DataError, match="no Parquet file"):
        place.read_tables("elsewhere")


def test_interrupted_write_leaves_no_visible_file(tmp_path, monkeypatch):
    place = Place(str(tmp_path))
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        place.write_bytes("part", b"content")
    assert place.names() == []
    assert not place.exists("part")


def test_local_folder_becomes_part_of_the_artefact(place):
    out = writer(place)
    with out.local_folder("model") as folder:
        (folder / "weights").write_bytes(b"w")
    out.commit({})
    assert place.read_bytes("model/weights") == b"w"


def test_fingerprint_ignores_key_order_only():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


def test_a_cut_parquet_file_is_refused_at_the_end_of_a_build(tmp_path):
    out = ArtefactWriter(Place(str(tmp_path / "a")), "corpus", "c", {}, "local")
    out.place.write_table("parts/part-000000.parquet", pa.table({"n": [1, 2, 3]}))
    path = tmp_path / "a" / "parts" / "part-000000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"parts/part-000000\.parquet: cut"):
        out.commit({})
    assert Artefact.find(out.place, out.fingerprint) is None
    path.write_bytes(whole)
    assert out.commit({"rows": 3}).counts == {"rows": 3}


def test_folders_of_work_go_with_the_manifest_and_are_swept_later_if_the_build_ended_there(
    place, monkeypatch
):
    out = writer(place)
    place.write_bytes("steps/one", b"work")
    place.write_bytes("pairs", b"result")
    monkeypatch.setattr(Artefact, "tidy", lambda self: None)  # the process is gone right after the manifest
    out.commit({"rows": 1}, scratch=("steps",))
    monkeypatch.undo()
    assert place.exists("steps/one") and place.exists("_building.json")
    Artefact.open(place).tidy()
    assert place.files() == ["manifest.json", "pairs"]
