"""explain from a model folder, a copied one, and an endpoint."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from embedloom.core.artefacts import Artefact
from embedloom.core.storage import Place
from embedloom.errors import DataError, ServeError
from embedloom.pipeline.lineage import explain_subject
from fakes_run import begin, make_run


@pytest.fixture
def run(tmp_path) -> Place:
    return make_run(tmp_path / "runs" / "quick")


@pytest.fixture
def endpoint():
    """Answers /v1/models with whatever is put into ``cards``."""
    cards: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"object": "list", "data": cards}).encode()
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", cards
    server.shutdown()
    server.server_close()


def test_a_models_folder_leads_back_from_that_model(run):
    text = explain_subject(f"{run.uri}/training/b/finetune", None, Place("nowhere"))
    assert text.startswith(
        f"training/b/finetune  {Artefact.open(run.child('training/b/finetune')).fingerprint}"
    )
    assert "training/b/pretrain" in text and "training/a" not in text and "corpus" in text


def test_a_copied_model_is_found_by_its_fingerprint(run, tmp_path):
    shutil.copytree(run.child("merged").local, tmp_path / "elsewhere")
    text = explain_subject(str(tmp_path / "elsewhere"), None, Place(str(tmp_path / "runs")))
    assert text.startswith("merged  ")
    with pytest.raises(DataError, match=r"is of no run below nowhere; give the folder of runs with --runs"):
        explain_subject(str(tmp_path / "elsewhere"), None, Place("nowhere"))


def test_an_endpoint_leads_to_the_run_it_serves(run, endpoint, tmp_path):
    url, cards = endpoint
    merged = Artefact.open(run.child("merged"))
    lineage = {
        "kind": "model",
        "fingerprint": merged.fingerprint,
        "inputs": {"training/a/finetune": "f1"},
        "created": "then",
    }
    cards.append(
        {
            "id": "quick",
            "fingerprint": merged.fingerprint,
            "contract_hash": "c1",
            "lineage": lineage,
            "gate": None,
        }
    )
    for address in (url, f"{url}/v1", f"{url}/v1/models"):
        lines = explain_subject(address, None, Place(str(tmp_path / "runs"))).splitlines()
        assert lines[0] == f"endpoint  {address}  model quick, fingerprint {merged.fingerprint}, contract c1"
        assert lines[1] == "    built then from training/a/finetune f1"
        assert lines[2].startswith(f"merged  {merged.fingerprint}")
    cards[0]["fingerprint"] = "another"
    with pytest.raises(DataError, match="serves another, which is of no run"):
        explain_subject(url, None, Place(str(tmp_path / "runs")))
    cards.clear()
    with pytest.raises(ServeError, match="none of ours"):
        explain_subject(url, None, Place(str(tmp_path / "runs")))


def test_an_endpoint_that_is_not_there_is_a_serve_error(tmp_path):
    with pytest.raises(ServeError, match="did not answer"):
        explain_subject("http://127.0.0.1:9", None, Place(str(tmp_path)))


def test_a_served_vector_leads_back_to_its_document_model_and_prompts(run):
    merged, corpus = (Artefact.open(run.child(name)) for name in ("merged", "corpus"))
    out = begin(run, "vectors", "vectors", corpus=corpus, merged=merged)
    rows = [{"id": name, "vector": [0.6, 0.8]} for name in ("doc-sort", "doc-zip")]
    out.place.write_table("vectors/part-000000.parquet", pa.Table.from_pylist(rows))
    out.commit({"rows": 2}, {"model_id": merged.fingerprint, "contract_hash": "c77"})
    text = explain_subject(run.uri, "doc-zip", Place("runs"))
    assert "vector  doc-zip  in vectors/vectors/part-000000.parquet:1" in text
    assert "dimensions   2, contract c77, vectors " in text
    assert f"model        merged {merged.fingerprint}" in text
    assert "made from training/a/finetune" in text
    assert "document  doc-zip  in corpus/documents/train/part-000000.parquet:0" in text
    assert "synthetic by smol, prompt p123" in text
    assert f"code 0.1.0 {merged.manifest['versions']['code']}" in text
