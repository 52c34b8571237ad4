"""Rerank, similarity and tokenize over the in-process app; expected numbers come from the fake encoder itself."""

import numpy as np
import pytest

from embedloom.serving.routes import similarities
from embedloom.serving.schemas import RerankResponse, SimilarityResponse, TokenizeResponse
from fakes_serving import FakeEncoder, client_of, refused

DOCUMENTS = ["ab", "cd", "efg", "ab"]


@pytest.fixture
def encoder():
    return FakeEncoder()


@pytest.fixture
def client(encoder):
    with client_of(encoder) as client:
        yield client


def expected(encoder, **prompt):
    return encoder.embed(DOCUMENTS, "document") @ encoder.embed(["q"], "query", **prompt)[0]


def test_rerank_orders_by_similarity_and_keeps_the_order_of_equals(client, encoder):
    reply = client.post(
        "/v1/rerank",
        json={
            "model": "tiny",
            "query": "q",
            "documents": DOCUMENTS,
            "instruction": "Find",
            "return_documents": True,
        },
    )
    body = RerankResponse.model_validate(reply.json())
    scores = expected(encoder, instruction="Find")
    order = sorted(range(4), key=lambda index: (-scores[index], index))
    assert [item.index for item in body.results] == order
    assert np.allclose([item.relevance_score for item in body.results], scores[order], atol=1e-6)
    assert [item.document.text for item in body.results] == [DOCUMENTS[index] for index in order]
    places = [item.index for item in body.results if DOCUMENTS[item.index] == "ab"]
    assert places == [0, 3]
    assert body.scored_by == "embedding_similarity"
    texts = ["Instruct: Find\nQuery: q", *DOCUMENTS]
    assert body.usage.total_tokens == sum(1 + len(text) for text in texts)


def test_rerank_takes_coheres_objects_and_top_n(client):
    plain = client.post("/v1/rerank", json={"model": "tiny", "query": "q", "documents": DOCUMENTS}).json()
    objects = [{"text": text} for text in DOCUMENTS]
    best = client.post(
        "/v1/rerank", json={"model": "tiny", "query": "q", "documents": objects, "top_n": 2}
    ).json()
    assert best["results"] == plain["results"][:2]
    assert "document" not in best["results"][0]


def test_similarity_keeps_the_order_and_knows_symmetric_tasks():
    encoder = FakeEncoder(limit=128)
    with client_of(encoder) as client:
        body = {"model": "tiny", "query": "q", "documents": DOCUMENTS}
        reply = SimilarityResponse.model_validate(client.post("/v1/similarity", json=body).json())
        assert np.allclose(reply.similarities, expected(encoder), atol=1e-6)
        same = {**body, "query": "ab", "task": "sts"}
        reply = SimilarityResponse.model_validate(client.post("/v1/similarity", json=same).json())
        assert reply.similarities[0] == reply.similarities[3] == pytest.approx(1.0)


def test_similarity_does_not_depend_on_company_and_stays_a_cosine():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((50, 96)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    together = similarities(vectors[3], vectors, normalize=True)
    alone = [similarities(vectors[3], vectors[row : row + 1], normalize=True)[0] for row in range(50)]
    assert together.tolist() == [float(score) for score in alone]
    assert together.max() <= 1.0
    assert similarities(2 * vectors[0], vectors[:1], normalize=False)[0] == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"query": ""}, 400, "query", "empty or blank"),
        ({"query": "x" * 100, "truncate": "none"}, 400, "query", "query has 123 tokens"),
        ({"documents": []}, 400, "documents", "an empty list"),
        ({"documents": "ab"}, 400, "documents", "of type string"),
        ({"documents": ["a", None]}, 400, "documents", "documents[1] is of type null"),
        ({"documents": ["a", {"text": None}]}, 400, "documents", "documents[1].text is of type null"),
        ({"documents": [{"text": 5}]}, 400, "documents", "documents[0].text is of type integer"),
        ({"documents": [{"txt": "a"}]}, 400, "documents", "documents[0] has the key 'txt'"),
        ({"documents": [{}]}, 400, "documents", "has no key 'text'"),
        ({"documents": ["a"] * 9}, 400, "documents", "at most 8"),
        ({"documents": ["x" * 100], "truncate": "none"}, 400, "documents", "documents[0] has 101 tokens"),
        ({"documents": ["a"], "top_n": 0}, 400, "top_n", "greater than or equal to 1"),
        ({"model": "gpt"}, 404, "model", "allowed: 'tiny'"),
        ({"querry": "a"}, 400, "querry", "nearest valid one is 'query'"),
    ],
)
def test_bad_rerank_requests_name_the_field(client, change, status, param, words):
    body = {"model": "tiny", "query": "q", "documents": ["a"], "instruction": "Find", **change}
    if param == "querry":
        del body["query"]
    error = refused(client.post("/v1/rerank", json=body), status)
    assert error["param"] == param
    assert words in error["message"]


def test_rerank_cuts_long_documents_as_coheres_does(client, encoder):
    reply = client.post(
        "/v1/rerank", json={"model": "tiny", "query": "q", "documents": ["x" * 100], "instruction": "Find"}
    )
    assert reply.status_code == 200
    assert sum(len(ids) == 64 for batch in encoder.batches for ids in batch) == 1


def test_tokenize_counts_what_embeddings_charges(client):
    body = {"input": ["ab", "x" * 100], "input_type": "query", "instruction": "Find"}
    reply = TokenizeResponse.model_validate(client.post("/tokenize", json=body).json())
    assert [item.count for item in reply.data] == [
        1 + len("Instruct: Find\nQuery: ") + length for length in (2, 100)
    ]
    assert [item.limit for item in reply.data] == [64, 64]
    assert all(item.count == len(item.token_ids) for item in reply.data)
    short = {**body, "input": "ab"}
    charged = client.post("/v1/embeddings", json={"model": "tiny", **short}).json()["usage"]["prompt_tokens"]
    assert client.post("/tokenize", json=short).json()["total_tokens"] == charged
    cut = client.post("/tokenize", json={**body, "truncate": "end"}).json()
    assert [item["count"] for item in cut["data"]][1] == 64


def test_tokenized_ids_embed_to_the_texts_own_vector(client):
    ids = client.post("/tokenize", json={"input": "ab"}).json()["data"][0]["token_ids"]
    vectors = [
        client.post("/v1/embeddings", json={"model": "tiny", "input": given}).json()["data"][0]["embedding"]
        for given in ("ab", ids)
    ]
    assert vectors[0] == vectors[1]
