"""``embedloom embed s3://… --out s3://…`` as a command of its own, against an S3 server that is started here."""

import os
import subprocess
import sys

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from embedloom.core.artefacts import Artefact
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.retrieval.index import load_index
from embedloom.retrieval.vector_files import read_vectors

ROWS = 40
TEXTS = [f"Seite {n} über Daten ข้อมูล" for n in range(ROWS)]


@pytest.fixture
def server(monkeypatch):
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield boto3.client("s3")
    started.stop()


def run(folder, *words):
    command = [
        sys.executable,
        "-m",
        "embedloom",
        "embed",
        "s3://docs/in/",
        "--out",
        "s3://docs/vectors",
        *words,
    ]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.ray
def test_from_a_bucket_to_a_bucket_with_an_index_and_again(server, tiny_model, tmp_path):
    server.create_bucket(Bucket="docs")
    for part in range(2):
        rows = slice(part * 20, (part + 1) * 20)
        table = pa.table({"id": [f"d{n}" for n in range(ROWS)][rows], "text": TEXTS[rows]})
        pq.write_table(table, tmp_path / "part.parquet")
        server.upload_file(str(tmp_path / "part.parquet"), "docs", f"in/part-{part}.parquet")
    words = ["--model", str(tiny_model), "--index", "flat", "--set", "shard_rows=16"]
    done = run(tmp_path, *words)
    assert done.stdout.splitlines()[-1] == "s3://docs/vectors"
    place = Place("s3://docs/vectors")
    artefact = Artefact.open(place, "vectors")
    assert artefact.counts["rows"] == ROWS
    ids, vectors = read_vectors(place, "vectors")
    assert ids == [f"d{n}" for n in range(ROWS)]
    encoder = Encoder.load(tiny_model, dtype="float32")
    np.testing.assert_allclose(vectors, encoder.embed(TEXTS, "document"), atol=1e-6)
    (tmp_path / "copy").mkdir()
    for name in ("index.faiss", "index.json", "index_ids.parquet"):
        (tmp_path / "copy" / name).write_bytes(place.read_bytes(name))
    index = load_index(Place(str(tmp_path / "copy")), artefact.manifest["details"]["contract_hash"])
    assert [found for [found] in index.search(vectors, 1)[0]] == ids
    stamps = {key: place.state(key) for key in place.files()}
    assert "finished, skipped" in run(tmp_path, *words).stderr
    assert {key: place.state(key) for key in place.files()} == stamps
