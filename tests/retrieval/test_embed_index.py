"""The FAISS index: recall against brute force, reproducible files, and what loading refuses."""

import json

import faiss
import numpy as np
import pytest

from embedloom.config.embedding import IndexConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError, MissingDependency
from embedloom.retrieval.embed import vector_table
from embedloom.retrieval.index import build_index, load_index
from embedloom.retrieval.search import top_k

ROWS, PARTS = 1200, 4
IDS = [f"d{n:04d}" for n in range(ROWS)]


@pytest.fixture(scope="module")
def vectors():
    drawn = np.random.default_rng(0).standard_normal((ROWS, 24)).astype(np.float32)
    drawn[100:110] = drawn[0]  # equal texts have equal vectors
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def place_with(folder, vectors, dtype="float32"):
    place = Place(str(folder))
    for number, rows in enumerate(np.array_split(np.arange(ROWS), PARTS)):
        name = f"vectors/part-{number:06d}.parquet"
        place.write_table(name, vector_table([IDS[r] for r in rows], vectors[rows], "c1", "m", 1, dtype))
    return place


def test_flat_is_exact_and_knows_its_ids(tmp_path, vectors):
    place = place_with(tmp_path, vectors)
    facts = build_index(IndexConfig(kind="flat", sample=50), place, "c1")
    assert facts["recall_at_10"] == 1.0 and facts["rows"] == ROWS and facts["built_on"] == "cpu"
    names, scores = load_index(place, "c1").search(vectors[300:305], 4)
    expected = top_k(vectors[300:305], vectors, 4)
    assert names == [[IDS[row] for row in line] for line in expected.positions]
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_stated_recall_is_the_recall(tmp_path, vectors, kind):
    place = place_with(tmp_path, vectors)
    rough = {
        "ivf": {"lists": 30, "probes": 2},
        "hnsw": {"neighbours": 4, "build_width": 8, "search_width": 10},
    }
    facts = build_index(IndexConfig(kind=kind, sample=200, **rough[kind]), place, "c1")
    assert facts["recall_at_10"] < 0.98  # settings so rough that there is something to measure
    # The documents themselves as queries: another sample, counted in plain Python.
    names, _ = load_index(place, "c1").search(vectors[200:600], 10)
    exact = top_k(vectors[200:600], vectors, 10).positions
    mine = np.mean([len(set(a) & {IDS[r] for r in b}) / 10 for a, b in zip(names, exact, strict=True)])
    assert abs(mine - facts["recall_at_10"]) < 0.08
    better = {"ivf": {"lists": 30, "probes": 30}, "hnsw": {}}
    assert build_index(IndexConfig(kind=kind, **better[kind]), place, "c1")["recall_at_10"] > 0.99


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_same_vectors_give_the_same_file(tmp_path, vectors, kind):
    contents = []
    for name in ("a", "b"):
        place = place_with(tmp_path / name, vectors)
        build_index(IndexConfig(kind=kind, sample=20), place, "c1")
        contents.append([place.read_bytes(f) for f in ("index.faiss", "index_ids.parquet", "index.json")])
    assert contents[0] == contents[1]


def test_int8_vectors_are_indexed_as_they_are_stored(tmp_path, vectors):
    place = place_with(tmp_path, vectors, "int8")
    assert build_index(IndexConfig(kind="flat", sample=50), place, "c1")["recall_at_10"] == 1.0
    assert load_index(place, "c1").search(vectors[20:21], 1)[0] == [["d0020"]]


def test_an_index_that_does_not_belong_is_refused(tmp_path, vectors, monkeypatch):
    place = place_with(tmp_path, vectors)
    with pytest.raises(DataError, match=r"index.json: missing"):
        load_index(place, "c1")
    build_index(IndexConfig(kind="flat", sample=5), place, "c1")
    with pytest.raises(DataError, match=r"the queries has contract_hash 'c2'.*'c1'"):
        load_index(place, "c2")
    with pytest.raises(DataError, match="the index has 24 dimensions"):
        load_index(place, "c1").search(vectors[:1, :5], 1)
    with pytest.raises(DataError, match="row 0 is zero"):
        load_index(place, "c1").search(vectors[:1] * 0, 1)
    facts = place.read_json("index.json")
    place.write_bytes("index.json", json.dumps({**facts, "rows": 7}).encode())
    with pytest.raises(DataError, match=r"1200 vectors of 24 dimensions and 1200 ids, index\.json says 7"):
        load_index(place, "c1")
    place.write_json("index.json", facts)
    place.write_bytes("index.faiss", b"half")
    with pytest.raises(DataError, match="not readable as a FAISS index"):
        load_index(place, "c1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"faiss.*embedloom\[cpu\]"):
        load_index(place, "c1")


def test_more_cells_than_vectors_are_refused(tmp_path, vectors):
    with pytest.raises(DataError, match="5000 cells for 1200 vectors"):
        build_index(IndexConfig(kind="ivf", lists=5000), place_with(tmp_path, vectors), "c1")


class Cagra:
    """In place of faiss.GpuIndexCagra: keeps what it is told, and lets the CPU link the graph."""

    def __init__(self, resources, dimension, metric, settings):
        assert resources == "gpu" and metric == faiss.METRIC_INNER_PRODUCT
        self.degrees = settings.graph_degree, settings.intermediate_graph_degree
        self.calls = CALLS
        self.calls.append(("graph", self.degrees))

    def train(self, vectors):
        self.vectors = vectors.copy()

    def copyTo(self, graph):
        graph.hnsw.efConstruction = 200
        graph.add(self.vectors)


class Settings:
    graph_degree = intermediate_graph_degree = 0


CALLS: list = []


@pytest.fixture
def gpu(monkeypatch):
    """FAISS as if it had GPU code and a GPU: what is put there is a copy on the CPU, and noted."""

    def to_gpu(resources, device, index):
        assert (resources, device) == ("gpu", 0)
        CALLS.append(("copied", index.ntotal))
        return faiss.clone_index(index)

    CALLS.clear()
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "gpu", raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE GPU CUVS ")
    monkeypatch.setattr(faiss, "GpuIndexCagra", Cagra, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexCagraConfig", Settings, raising=False)
    return CALLS


def test_cells_learnt_and_assigned_on_a_gpu_are_those_of_the_cpu(tmp_path, vectors, request):
    config = IndexConfig(kind="ivf", lists=20, probes=3, sample=50)
    there, here = place_with(tmp_path / "a", vectors), place_with(tmp_path / "b", vectors)
    mine = build_index(config, here, "c1")
    calls = request.getfixturevalue("gpu")
    facts = build_index(config, there, "c1")
    assert calls == [("copied", 0), ("copied", 20)]  # for the means, then the 20 centroids themselves
    assert facts == {**mine, "built_on": "gpu"} and mine["built_on"] == "cpu"
    assert there.read_bytes("index.faiss") == here.read_bytes("index.faiss")


def test_graph_of_cagra_is_searched_as_hnsw(tmp_path, vectors, gpu):
    place = place_with(tmp_path, vectors)
    facts = build_index(IndexConfig(kind="hnsw", neighbours=8, search_width=64, sample=100), place, "c1")
    assert gpu == [("graph", (16, 32))]
    assert facts["built_on"] == "gpu" and facts["recall_at_10"] > 0.9
    loaded = load_index(place, "c1")
    assert loaded.faiss_index.hnsw.efSearch == 64
    assert loaded.search(vectors[700:701], 1)[0] == [["d0700"]]


@pytest.mark.parametrize("missing", ["cuvs", "gpu"])
def test_graph_is_built_on_the_cpu_without_cuvs_or_a_gpu(tmp_path, vectors, gpu, missing, monkeypatch):
    if missing == "cuvs":
        monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE GPU ")
    else:
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    facts = build_index(IndexConfig(kind="hnsw", sample=20), place_with(tmp_path, vectors), "c1")
    assert gpu == [] and facts["built_on"] == "cpu"
