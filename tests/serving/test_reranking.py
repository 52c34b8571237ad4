"""A reranker behind /v1/rerank and /v1/search: scores against the library's own predict, refusals, and the pool on Serve."""

import socket

import httpx
import numpy as np
import pytest
from ray import serve
from starlette.testclient import TestClient

from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.core.model_folder import ModelFolder
from embedloom.encoder.pairs import PairEncoder
from embedloom.errors import DataError
from embedloom.serving.api import create_api
from embedloom.serving.app import build_application
from embedloom.serving.reranking import RerankerService
from embedloom.serving.schemas import CorpusCard, RerankResponse, SearchHit, SearchResponse
from embedloom.serving.service import BatchSettings
from embedloom.serving.stage import start_endpoint
from fakes_mining import make_tiny_cross_encoder
from fakes_serving import FakeEncoder, client_of, refused, service_of, settings_of

DOCUMENTS = ["a list is sorted", "größer, 日本語", "sorted() gives a new list", "a list is sorted", "x" * 500]
QUERY = "sort a list"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "model", seed=5)


@pytest.fixture(scope="module")
def library(folder):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu", max_length=128)


class ThreeDocuments:
    """A corpus that finds the same three, best first, one of which has lost its text."""

    card = CorpusCard(documents=4, dimension=8, index="exact", texts=True)
    contract_hash = FakeEncoder(limit=128).contract.hash
    hits = (("first", "one text", "Title"), ("second", None, None), ("third", "another text", None))

    def search(self, query, count, with_texts, words=None):
        self.asked = count, with_texts
        found = enumerate(self.hits[:count])
        return [
            SearchHit(id=name, score=0.9 - at / 10, title=title, text=text)
            if with_texts
            else SearchHit(id=name, score=0.9)
            for at, (name, text, title) in found
        ]


@pytest.fixture(scope="module")
def corpus():
    return ThreeDocuments()


@pytest.fixture(scope="module")
def client(folder, corpus):
    settings = BatchSettings(max_batch_tokens=256, batch_wait_seconds=0.0)
    reranker = RerankerService(PairEncoder.open(folder, dtype="float32", device="cpu"), settings)
    api = create_api(
        service_of(FakeEncoder(limit=128)),
        settings_of(reranker="c0ffee", rerank_top=3),
        corpus=corpus,
        reranker=reranker,
    )
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client


def rerank(client, **changes):
    return client.post(
        "/v1/rerank", json={"model": "tiny", "query": QUERY, "documents": DOCUMENTS, **changes}
    )


def test_scores_are_the_librarys_and_what_was_cut_is_counted(client, library):
    reply = rerank(client)
    body = RerankResponse.model_validate(reply.json(), strict=True)
    scores = library.predict([(QUERY, text) for text in DOCUMENTS])
    scores[3] = scores[0]
    order = np.argsort(-scores, kind="stable").tolist()
    assert [item.index for item in body.results] == order
    np.testing.assert_allclose([item.relevance_score for item in body.results], scores[order], atol=1e-5)
    assert body.scored_by == "reranker" and body.model == "tiny"
    assert body.usage.truncated_items == 1 and reply.headers["x-truncated-items"] == "1"
    assert order.index(3) == order.index(0) + 1  # equal documents keep the order of the request
    # A token a byte, [CLS] and two [SEP]; the last pair fills the 128 positions. Equal documents are read once.
    lengths = [3 + len(QUERY) + len(text.encode()) for text in dict.fromkeys(DOCUMENTS)]
    assert body.usage.total_tokens == sum(min(128, length) for length in lengths)


def test_blank_documents_come_last_and_best_ones_alone_if_asked(client):
    body = rerank(client, documents=[" ", "a", "b"], top_n=3).json()
    assert body["results"][-1] == {"index": 0, "relevance_score": pytest.approx(0.0)}
    assert len(rerank(client, top_n=2).json()["results"]) == 2
    assert rerank(client, documents=["\n", " "]).json()["results"][0]["index"] == 0


def test_teis_rerank_is_answered_by_it_too(client, library):
    texts = DOCUMENTS[:3]
    found = client.post("/rerank", json={"query": QUERY, "texts": texts}).json()
    scores = library.predict([(QUERY, text) for text in texts])
    assert {item["index"]: item["score"] for item in found} == pytest.approx(
        dict(enumerate(scores)), abs=1e-5
    )


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        (
            {"truncate": "none"},
            "documents",
            "documents[4] with the query is longer than the 128 tokens of a pair",
        ),
        ({"truncate": "none", "documents": [" ", "x" * 500]}, "documents", "documents[1] with the query"),
        (
            {"truncate": "start"},
            "truncate",
            '"start" is not what a reranker was trained with; allowed: "end"',
        ),
        ({"instruction": "Find"}, "instruction", "reads query and document"),
        ({"documents": ["a"] * 9}, "documents", "at most 8"),
        ({"query": " "}, "query", "empty or blank"),
        ({"model": "other"}, "model", "allowed: 'tiny'"),
    ],
)
def test_what_it_does_not_take_is_named(client, change, param, words):
    error = refused(rerank(client, **change), 404 if param == "model" else 400)
    assert error["param"] == param and words in error["message"]


def test_a_search_that_asks_for_it_is_ordered_anew(client, corpus, library):
    plain = client.post("/v1/search", json={"query": QUERY, "top_k": 1}).json()
    assert corpus.asked == (1, True) and "scored_by" not in plain
    reply = client.post("/v1/search", json={"query": QUERY, "top_k": 3, "rerank": True})
    body = SearchResponse.model_validate(reply.json())
    assert corpus.asked == (3, True)
    one, two = library.predict([(QUERY, "Title one text"), (QUERY, "another text")])
    order = ["first", "third"] if one >= two else ["third", "first"]
    assert [hit.id for hit in body.results] == [*order, "second"]
    assert [hit.score for hit in body.results] == pytest.approx([max(one, two), min(one, two), 0.0], abs=1e-5)
    assert body.scored_by == "reranker" and body.timing.rerank_seconds >= 0
    # The query's own tokens, and those of two pairs.
    assert body.usage.total_tokens > plain["usage"]["total_tokens"]
    bare = client.post(
        "/v1/search", json={"query": QUERY, "top_k": 1, "rerank": True, "return_documents": False}
    ).json()
    assert corpus.asked == (3, True) and bare["results"][0]["text"] is None
    assert bare["results"][0]["id"] == order[0]


def test_without_one_similarity_answers_and_says_so(corpus):
    with client_of(FakeEncoder(limit=128), corpus=corpus) as plain:
        assert rerank(plain, documents=["a", "b"]).json()["scored_by"] == "embedding_similarity"
        assert plain.get("/v1/models/tiny").json()["reranker"] is None
        error = refused(plain.post("/v1/search", json={"query": QUERY, "rerank": True}), 400)
        assert error["code"] == "rerank_not_available" and "serves no reranker" in error["message"]


def test_a_corpus_without_texts_cannot_be_reranked(folder):
    corpus = ThreeDocuments()
    corpus.card = CorpusCard(documents=4, dimension=8, index="exact", texts=False)
    reranker = RerankerService(
        PairEncoder.open(folder, dtype="float32"), BatchSettings(max_batch_tokens=256, batch_wait_seconds=0.0)
    )
    api = create_api(service_of(FakeEncoder(limit=128)), settings_of(), corpus=corpus, reranker=reranker)
    with TestClient(api) as client:
        error = refused(client.post("/v1/search", json={"query": QUERY, "rerank": True}), 400)
    assert "the texts of this corpus are not at hand" in error["message"]


def test_models_names_the_reranker(client):
    assert client.get("/v1/models/tiny").json()["reranker"] == "c0ffee"


@pytest.mark.parametrize("most", [1, 2])
def test_it_is_bound_beside_the_encoders_with_its_own_replicas(tiny_model, folder, most):
    args = ApplicationArgs(
        model_folder=str(tiny_model),
        served_name="tiny",
        serving=ServingConfig(require_gate=False, reranker=str(folder), compute_dtype="float32"),
        scaling=ServeScaling(max_replicas=most),
        reranker_scaling=ServeScaling(min_replicas=0, max_replicas=5),
    )
    bound = build_application(args)._bound_deployment
    settings, reranker = bound.init_args[1], bound.init_args[-2]._bound_deployment
    assert settings.reranker == ModelFolder(folder).fingerprint
    assert reranker.name == "reranker" and reranker.init_args[0].dtype == "float32"
    config = reranker._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (0, 5)
    plain = args.model_copy(update={"serving": ServingConfig(require_gate=False)})
    without = build_application(plain)._bound_deployment.init_args
    assert without[-1] is None and without[1].reranker is None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.ray
def test_a_folder_that_is_no_reranker_stops_before_anything_starts(ray_local, tiny_model):
    config = ServingConfig(port=free_port(), require_gate=False, reranker=str(tiny_model))
    with pytest.raises(DataError, match=r"no reranker, its config\.json has architectures \['Llama"):
        start_endpoint(config, tiny_model, "f00d", "tiny", ServeScaling(threads=1))


@pytest.mark.ray
@pytest.mark.parametrize("most", [1, 2])
def test_it_answers_from_a_pool_of_its_own(ray_local, tiny_model, folder, library, most):
    config = ServingConfig(
        port=free_port(), compute_dtype="float32", require_gate=False, reranker=str(folder)
    )
    scaling = ServeScaling(max_replicas=most, threads=1)
    own = ServeScaling(min_replicas=1, max_replicas=2, threads=1)
    with start_endpoint(config, tiny_model, "f00d", "tiny", scaling, reranker_scaling=own) as endpoint:
        deployments = serve.status().applications["embedloom"].deployments
        assert "reranker" in deployments and len(deployments) == 2
        body = {"model": "tiny", "query": QUERY, "documents": DOCUMENTS}
        reply = httpx.post(f"{endpoint.url}/v1/rerank", json=body, trust_env=False, timeout=60).json()
        scores = library.predict([(QUERY, text) for text in DOCUMENTS])
        found = {item["index"]: item["relevance_score"] for item in reply["results"]}
        assert reply["scored_by"] == "reranker" and found == pytest.approx(dict(enumerate(scores)), abs=1e-4)
        card = httpx.get(f"{endpoint.url}/v1/models/tiny", trust_env=False, timeout=60).json()
        assert len(card["reranker"]) == 16
