"""`embedloom embed`, `serve` and `gate` on models of others: vectors and scores are sentence-transformers' own."""

import json
import shutil
import socket
from pathlib import Path

import httpx
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.config.evaluation import EvaluationTask
from embedloom.core.storage import Place
from embedloom.encoder.own_code import trusted_copy
from embedloom.encoder.registry import resolve_model
from embedloom.evaluation.scoring import run_mteb
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.tasks import build_task
from embedloom.retrieval.vector_files import read_vectors
from embedloom.serving.stage import Endpoint
from fakes_foreign import make_transformer, save_library_model, with_dense
from fakes_own_code import own_code_model

CLUSTER = str(Path(__file__).parent.parent / "cluster" / "cluster.yaml")
DOCUMENTS = [
    "sort two lists",
    "read a list of cats",
    "merge sorted lists",
    "big dogs",
    "small cats",
    "how do i read",
]
QUERIES = ["merge two lists", "small dogs", "read"]
JUDGED = [(0, 2), (0, 0), (1, 3), (2, 5), (2, 1)]
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::UserWarning")]


def call(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments), "--cluster", CLUSTER])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A Dense layer behind the pooling, a prompt for either side, another limit than the positions."""
    root = tmp_path_factory.mktemp("dense")
    prompts = {"query": "query : ", "document": "passage : "}
    bert = make_transformer(root / "bert", limit=300)
    return save_library_model(root / "dense", bert, later=with_dense, prompts=prompts, max_seq_length=64)


@pytest.fixture(scope="module")
def own_code(tmp_path_factory):
    """Its trusted copy lies in the user's cache, as actors that were started before look there."""
    folder = own_code_model(tmp_path_factory.mktemp("own") / "own")
    yield folder
    shutil.rmtree(trusted_copy(folder).parent)


@pytest.fixture
def asked(monkeypatch):
    """What the endpoint answers while the command would wait for Ctrl-C."""
    found = {}

    def ask(endpoint):
        with httpx.Client(base_url=endpoint.url, timeout=60) as client:
            body = {"model": endpoint.served_name, "input": QUERIES, "input_type": "query"}
            found["queries"] = client.post("/v1/embeddings", json=body).json()
            body |= {"input": DOCUMENTS, "input_type": "document"}
            found["documents"] = client.post("/v1/embeddings", json=body).json()
            search = {"model": endpoint.served_name, "query": QUERIES[0], "top_k": len(DOCUMENTS)}
            found["search"] = client.post("/v1/search", json=search).json()
            found["card"] = client.get("/v1/models").json()["data"][0]

    monkeypatch.setattr(Endpoint, "wait", ask)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_same(found, expected):
    found = np.asarray(found)
    cosines = (
        (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    )
    assert cosines.min() > 0.9999
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "minilm-l6", "own_code"])
def test_vectors_of_embed_and_serve_are_the_library_s(ray_local, tmp_path, asked, request, kind):
    name = kind if kind == "minilm-l6" else str(request.getfixturevalue(kind))
    trust = ["--trust-remote-code"] if kind == "own_code" else []
    library = SentenceTransformer(str(resolve_model(name)), device="cpu", trust_remote_code=bool(trust))
    queries, documents = (
        encode(texts, normalize_embeddings=True)
        for encode, texts in ((library.encode_query, QUERIES), (library.encode_document, DOCUMENTS))
    )
    source, out = tmp_path / "in.jsonl", tmp_path / "vectors"
    source.write_text(
        "".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(DOCUMENTS))
    )
    call("embed", source, "--model", name, "--out", out, *trust)
    ids, vectors = read_vectors(Place(str(out)), "vectors")
    assert ids == [f"d{n}" for n in range(len(DOCUMENTS))]
    assert_same(vectors, documents)
    details = json.loads((out / "manifest.json").read_text())["details"]
    assert details.get("trust_remote_code") is (True if trust else None)

    call("serve", name, "--corpus", out, "--port", free_port(), *trust)
    for side, expected in (("queries", queries), ("documents", documents)):
        assert_same([item["embedding"] for item in asked[side]["data"]], expected)
    order = np.argsort(-(documents @ queries[0]))
    assert [hit["id"] for hit in asked["search"]["results"]] == [f"d{n}" for n in order]
    assert asked["card"].get("trust_remote_code") is (True if trust else None)


def test_scores_of_gate_are_the_library_s(ray_local, dense, own_code, tmp_path):
    folder = tmp_path / "bench"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        rows = (json.dumps({"_id": f"{name[0]}{n}", "text": text}) + "\n" for n, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    judged = "".join(f"q{query}\tc{document}\t1\n" for query, document in JUDGED)
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    (spec,) = expand_tasks([EvaluationTask(name="bench", kind="beir", path=str(folder))])
    models = {"dense": str(dense), "own": str(own_code), "model": "minilm-l6"}
    for candidate, against in (("dense", "model"), ("own", "model")):
        out = tmp_path / candidate
        result = call(
            "gate", models[candidate], "--against", models[against], "--task", folder, "--out", out,
            "--set", "gate.resamples=200", "--trust-remote-code",
        )  # fmt: skip
        assert result.exit_code in (0, 1), result.output
        found = json.loads((out / "scores.json").read_text())["models"]
        for label, scores in found.items():
            name = label.rsplit("-", 1)[0]
            path = resolve_model(models[name])
            theirs = SentenceTransformer(str(path), device="cpu", trust_remote_code=name == "own")
            files = run_mteb(theirs, build_task(spec, None))
            (entry,) = json.loads(files["bench.json"])["scores"]["test"]
            assert scores["bench"] == pytest.approx(entry["ndcg_at_10"], abs=1e-4), name
        verdict = json.loads(Path(result.stdout.splitlines()[-1]).read_text())
        assert [one.rsplit("-", 1)[0] for one in verdict.get("trust_remote_code", [])] == (
            ["own"] if candidate == "own" else []
        )
        assert 0 < min(scores["bench"] for scores in found.values()) < 1
