"""Places, artefacts and a stage on a real S3-compatible server (``storage.py``, ``artefacts.py``)."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import boto3
import pyarrow as pa
import pytest
from moto.s3.models import S3Backend
from s3fs import S3FileSystem

from embedloom.config.corpus import CorpusConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.storage import Place
from embedloom.corpus.stage import build_corpus
from embedloom.errors import DataError
from fakes_corpus import jsonl_source, save_word_tokenizer, sentence, write_jsonl
from fakes_store import s3_server

BUCKET = "runs"
PARTED_BYTES = 100 * 2**20  # from here on an upload goes in parts


@pytest.fixture(scope="module")
def server():
    with s3_server():
        yield


@pytest.fixture
def client(server):
    """A second client, as another process has; the bucket is there and empty."""
    made = boto3.client("s3")
    made.create_bucket(Bucket=BUCKET)
    yield made
    for item in made.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        made.delete_object(Bucket=BUCKET, Key=item["Key"])


@pytest.fixture
def place(client):
    return Place(f"s3://{BUCKET}/quickstart/pairs")


def keys(client):
    return [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def writer(place, config="c1"):
    return ArtefactWriter(place, "pairs", config, {"corpus": "f0"}, "local")


def test_files_come_back_as_they_were_written(place, client, tmp_path):
    table = pa.table({"id": [str(n) for n in range(10)], "n": range(10)})
    place.write_table("parts/part-000001.parquet", table)
    place.write_bytes("parts/part-000000.bin", b"0123456789")
    place.write_json("state.json", {"a": 1})
    assert place.read_table("parts/part-000001.parquet").equals(table)
    assert place.read_range("parts/part-000000.bin", 2, 5) == b"234"
    assert place.read_rows("parts/part-000001.parquet", 3, 5, ["id"])["id"].to_pylist() == ["3", "4"]
    assert place.parquet_footer("parts/part-000001.parquet")[1] == 10
    assert sum(len(part) for part in place.iter_tables("parts/part-000001.parquet", ["n"], 3)) == 10
    assert place.names("parts", ".parquet") == ["parts/part-000001.parquet"]
    assert place.files() == ["parts/part-000000.bin", "parts/part-000001.parquet", "state.json"]
    assert keys(client) == [f"quickstart/pairs/{name}" for name in place.files()]  # no folder markers
    with pytest.raises(DataError, match=r"s3://runs/quickstart/pairs/absent\.parquet: no such file"):
        place.read_table("absent.parquet")


def test_folders_and_files_are_moved_up_and_removed(place, client, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "deep" / "weights").write_text("w")
    place.child("model").upload(tmp_path)
    assert place.child("model").files() == ["config.json", "deep/weights"]
    (tmp_path / "one").write_text("1")
    place.put_file(tmp_path / "one", "model/one")
    assert not (tmp_path / "one").exists()
    assert place.read_bytes("model/one") == b"1"
    before = place.state("model/one")
    place.write_bytes("model/one", b"2")
    assert place.state("model/one") != before
    place.delete("model/one")
    place.child("model").remove()
    assert keys(client) == []
    place.child("model").remove()  # nothing there is fine


def test_what_another_process_writes_is_seen_at_once(place, client):
    place.write_bytes("parts/a", b"a")
    assert place.names("parts") == ["parts/a"]
    assert not place.exists("parts/b")
    client.put_object(Bucket=BUCKET, Key="quickstart/pairs/parts/b", Body=b"b")
    assert place.exists("parts/b")
    assert place.names("parts") == ["parts/a", "parts/b"]
    client.delete_object(Bucket=BUCKET, Key="quickstart/pairs/parts/a")
    assert not place.exists("parts/a")
    assert place.names("parts") == ["parts/b"]


def test_a_misspelt_bucket_is_an_error_and_is_not_made(client):
    with pytest.raises(FileNotFoundError):
        Place("s3://rnus/quickstart").write_bytes("a", b"a")
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == [BUCKET]


def test_an_artefact_is_done_with_its_manifest_and_not_before(place, client):
    out = writer(place)
    place.write_table("pairs/part-000000.parquet", pa.table({"id": ["a"]}))
    with pytest.raises(DataError, match=r"no manifest\.json.*missing or unfinished"):
        Artefact.open(place)
    assert writer(place).resumed
    committed = out.commit({"rows": 1})
    assert Artefact.open(place, "pairs") == committed
    assert keys(client) == ["quickstart/pairs/manifest.json", "quickstart/pairs/pairs/part-000000.parquet"]
    assert not writer(place, "c2").resumed  # another config clears the folder
    assert keys(client) == ["quickstart/pairs/_building.json"]


def test_a_stage_that_fails_uploads_nothing_of_its_local_folder(place, client):
    out = writer(place)
    with pytest.raises(RuntimeError, match="engine"), out.local_folder("model") as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("engine")
    assert place.child("model").files() == []
    with out.local_folder("model") as folder:
        (folder / "config.json").write_text("{}")
    assert place.child("model").files() == ["config.json"]


def test_an_upload_that_fails_in_its_second_part_leaves_nothing(place, client, monkeypatch):
    real = S3FileSystem._call_s3

    async def failing(self, method, *args, **kwargs):
        if method == "upload_part" and kwargs["PartNumber"] == 2:
            raise OSError("connection reset")
        return await real(self, method, *args, **kwargs)

    place.write_bytes("part", b"the old content")
    monkeypatch.setattr(S3FileSystem, "_call_s3", failing)
    with pytest.raises(OSError, match="connection reset"):
        place.write_bytes("part", bytes(PARTED_BYTES))
    assert place.read_bytes("part") == b"the old content"
    assert client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


def test_an_upload_killed_between_its_parts_is_never_taken_for_done(place, client, monkeypatch):
    writer(place)
    arrived, killed = threading.Event(), threading.Event()
    real = S3Backend.upload_part

    def waiting(self, *args, **kwargs):
        arrived.set()
        killed.wait(60)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(S3Backend, "upload_part", waiting)
    code = f"from embedloom.core.storage import Place; Place({place.uri!r}).write_bytes('parts/a', bytes({PARTED_BYTES}))"
    package = str(Path(__file__).parents[2] / "platform")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": package})
    assert arrived.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed.set()
    assert place.names("parts") == []
    assert not place.exists("parts/a")
    assert writer(place).resumed
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Artefact.open(place)


def test_a_corpus_is_the_same_in_a_folder_and_in_a_bucket(client, tmp_path):
    tokenizer = save_word_tokenizer(tmp_path / "words")
    records = [{"text": sentence(number, 30)} for number in range(40)]
    source = jsonl_source(write_jsonl(tmp_path / "in.jsonl", records))
    config = CorpusConfig(
        sources=(source,), chunk_tokens=16, split={"dev": 0.2, "test": 0.2}, min_characters=10
    )
    places = [Place(str(tmp_path / "out")), Place(f"s3://{BUCKET}/run/corpus")]
    # A build that was killed left a part behind.
    ArtefactWriter(places[1], "corpus", "config", {}, "local")
    places[1].write_bytes("documents/train/part-000009.parquet", b"half")
    made = [
        build_corpus(config, 42, tokenizer, ArtefactWriter(place, "corpus", "config", {}, "local"))
        for place in places
    ]
    local, stored = (place.files() for place in places)
    assert stored == local
    assert len(local) > 3
    for name in local:
        if name.endswith(".parquet"):
            assert places[1].read_bytes(name) == places[0].read_bytes(name), name
    assert Artefact.open(places[1], "corpus").counts == made[0].counts
    assert made[0].counts["rows"] == 80  # 30 words in chunks of 16
