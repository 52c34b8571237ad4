"""Searches in replicas of their own: the hits are those of a search in the process that answers, whatever happens to replicas."""

import asyncio
import itertools
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest

from embedloom.config.cluster import Profile, ServeScaling
from embedloom.config.serving import ApplicationArgs, SearchConfig, ServingConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.errors import DataError
from embedloom.retrieval.embed import vector_table
from embedloom.serving.app import SEARCHES_A_REPLICA, _bound_searchers
from embedloom.serving.corpus import card_of, load_corpus
from embedloom.serving.searching import CorpusSource, RemoteCorpus, SearchReplica
from embedloom.serving.stage import start_endpoint
from fakes_search import ENCODER, HASH, artefact, with_words
from fakes_serving import client_of

TEXTS = [
    *(f"document number {number} of the shelf" for number in range(20)),
    "die Katze",
    "東京都に住む猫",
    "shelf shelf cat",
]
QUERY = ENCODER.embed(["shelf cat"], "query")[0]


def source_of(place: Place, **search) -> CorpusSource:
    documents = str(place.local.parent / "in.parquet")
    return CorpusSource(place.uri, documents, HASH, "f00d", True, SearchConfig(**search))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def remote(source: CorpusSource, replicas: list) -> RemoteCorpus:
    turns = itertools.cycle(replicas)

    async def call(method, asked):
        return await getattr(next(turns), method)(asked)

    return RemoteCorpus(call, source.identity, source.card(), source.contract_hash)


@pytest.mark.parametrize("index", [None, "flat", "hnsw"])
@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_hits_are_those_of_a_search_in_the_process(tmp_path, cache, index, mode):
    source = source_of(with_words(tmp_path, TEXTS, index))
    far = remote(source, [SearchReplica(source, 1), SearchReplica(source, 1)])
    answers = []
    for corpus in (source.open(), far, far):
        with client_of(ENCODER, corpus=corpus) as client:
            asked = {"query": "shelf cat", "top_k": 7, "mode": mode, "return_documents": True}
            answers.append(client.post("/v1/search", json=asked).json())
            assert client.get("/v1/models").json()["data"][0]["corpus"] == source.open().card.model_dump()
    assert answers[0]["results"] and answers[0]["results"] == answers[1]["results"] == answers[2]["results"]
    assert [one["mode"] for one in answers] == [mode] * 3


def test_a_replica_of_another_corpus_is_asked_again_until_it_has_this_one(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("embedloom.serving.searching._MOVED_SECONDS", 0.01)
    source = source_of(artefact(tmp_path, ["a", "b", "c"]))
    other = source_of(artefact(tmp_path, ["a", "b", "c"]), mode="dense", depth=77)
    old, new = SearchReplica(other, 1), SearchReplica(source, 1)
    hits = asyncio.run(remote(source, [old, old, old, new]).search(QUERY, 2, False))
    assert hits == source.open().search(QUERY, 2, False)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(remote(source, [old]).search(QUERY, 2, False), 0.2))


@pytest.mark.parametrize("index", [None, "flat", "hnsw", "ivf"])
def test_a_mapped_corpus_finds_the_same_and_is_written_out_once(tmp_path, cache, index):
    texts = [f"document number {number}" for number in range(200)]
    place = artefact(tmp_path, texts, index=index)
    plain, mapped = (load_corpus(place, None, HASH, "f00d", True, mapped=way) for way in (False, True))
    for count in (1, 10, 200):
        assert mapped.search(QUERY, count, False) == plain.search(QUERY, count, False)
    written = sorted((cache / "corpora").rglob("vectors.npy")) if index is None else []
    stamps = [path.stat().st_mtime_ns for path in written]
    load_corpus(place, None, HASH, "f00d", True, mapped=True)
    assert [path.stat().st_mtime_ns for path in written] == stamps and len(written) == (index is None)
    if index is None:
        maps = [one.path for one in psutil.Process().memory_maps()]
        assert str(written[0]) in maps
        with pytest.raises(DataError, match="vectors of different prompts cannot be compared"):
            load_corpus(place, None, "other", "f00d", True, mapped=True)


def test_a_corpus_that_was_embedded_again_is_not_taken_from_the_cache(tmp_path, cache):
    load_corpus(artefact(tmp_path, ["a", "b"]), None, HASH, "f00d", True, mapped=True)
    corpus = load_corpus(artefact(tmp_path, ["a", "b", "cat"]), None, HASH, "f00d", True, mapped=True)
    assert corpus.card.documents == 3 and len(corpus.search(QUERY, 9, False)) == 3


@pytest.mark.parametrize("index", [None, "flat"])
@pytest.mark.parametrize("dimensions", [None, 4])
def test_the_card_of_an_artefact_is_that_of_the_loaded_corpus(tmp_path, index, dimensions):
    place = artefact(tmp_path, ["a", "b", "c"], index=index, dimensions=dimensions)
    for documents in (None, str(tmp_path / "in.parquet")):
        loaded = load_corpus(place, documents, HASH, "f00d", True)
        assert card_of(Artefact.open(place, "vectors"), documents, SearchConfig()) == loaded.card


def test_replicas_scale_by_searches_and_reserve_cpus_of_their_own(tmp_path):
    source = source_of(artefact(tmp_path, ["a", "b"]))
    args = ApplicationArgs(
        model_folder="m", served_name="m", serving=ServingConfig(corpus="v"),
        search_scaling=ServeScaling(min_replicas=1, max_replicas=4, cpus=3),
    )  # fmt: skip
    bound = _bound_searchers(args, source)._bound_deployment
    scaling = bound._deployment_config.autoscaling_config
    assert (bound.name, bound.ray_actor_options["num_cpus"]) == ("search", 3)
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.target_ongoing_requests == SEARCHES_A_REPLICA
    assert _bound_searchers(args.model_copy(update={"search_scaling": None}), source) is None
    assert _bound_searchers(args, None) is None


@pytest.mark.parametrize("wrong", [{"gpus": 1}, {"min_replicas": 0}])
def test_searches_take_no_gpu_and_always_have_a_replica(wrong):
    with pytest.raises(ValueError, match=r"serve_search: gpus .* allowed: gpus 0 and at least 1 replica"):
        Profile(serve_search=ServeScaling(**wrong))


@pytest.mark.ray
def test_over_http_two_replicas_answer_and_one_may_be_killed(ray_local, tiny_model, tmp_path):
    contract, model = PromptContract.load(tiny_model).hash, ModelFolder(tiny_model).id
    ids = [f"d{number:02d}" for number in range(40)]
    vectors = Encoder.load(tiny_model, dtype="float32").embed(ids, "document")
    place = Place(str(tmp_path / "vectors"))
    writer = ArtefactWriter(place, "vectors", "c", {"corpus": "x"}, "local")
    place.write_table("vectors/part-000000.parquet", vector_table(ids, vectors, contract, model, 1))
    writer.commit({"rows": 40}, {"contract_hash": contract, "model_id": model})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServingConfig(port=port, compute_dtype="float32", require_gate=False, corpus=place.uri)
    pool = ServeScaling(min_replicas=2, max_replicas=2, cpus=0.5, threads=1)
    one = ServeScaling(threads=1)
    asked = {"query": "d07", "top_k": 5, "return_documents": False}
    with start_endpoint(config, tiny_model, "f00d", "tiny", one, search_scaling=pool) as endpoint:
        url = f"{endpoint.url}/v1/search"
        first = httpx.post(url, json=asked, timeout=60).json()["results"]
        query = Encoder.load(tiny_model, dtype="float32").embed(["d07"], "query")[0]
        expected = np.argsort(-(vectors @ query), kind="stable")[:5]
        assert [hit["id"] for hit in first] == [ids[row] for row in expected]
        replicas = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "ServeReplica:embedloom:search" in " ".join(process.info["cmdline"] or ())
        ]
        assert len(replicas) == 2
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(httpx.post, url, json=asked, timeout=60) for _ in range(60)]
            replicas[0].kill()
            answers += [clients.submit(httpx.post, url, json=asked, timeout=60) for _ in range(60)]
            found = [answer.result() for answer in answers]
        assert {reply.status_code for reply in found} == {200}
        assert all(reply.json()["results"] == first for reply in found)
