"""Cohere's, TEI's, Jina's, Voyage's and Infinity's requests, as their clients send them, and what they read of the replies.

The real clients are asked by tests/drills/serve_clients.py; the bodies here are what they sent.
"""

import base64
import hashlib

import numpy as np
import pytest

from embedloom.config.serving import ModelAlias
from embedloom.core.prompting import NamedTask
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError
from embedloom.serving.calls import check_aliases
from embedloom.serving.dialects import NOT_OFFERED, CohereEmbedResponse, TeiInfo, TeiRanking, TeiTokens
from embedloom.serving.front import ApiKey
from embedloom.serving.messages import Part
from embedloom.serving.schemas import RerankResponse
from embedloom.serving.service import pieces_of
from fakes_serving import BOS, FakeEncoder, client_of, refused

LIMIT = 128
TEXTS = ["ab", "größer, 日本語", " "]
DOCUMENTS = ["ab", "", "cde", "ab"]


@pytest.fixture
def encoder():
    return FakeEncoder(limit=LIMIT)


@pytest.fixture
def client(encoder):
    with client_of(encoder, models={"tiny-query": ModelAlias(side="query")}) as client:
        yield client


def answer(client, path, body, status=200):
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def scores_of(encoder, query="q", documents=("ab", "cde", "ab")):
    return encoder.embed(list(documents), "document") @ encoder.embed([query], "query")[0]


# -- Cohere


@pytest.mark.parametrize(
    ("input_type", "side", "task"),
    [
        ("search_document", "document", "retrieval"), ("search_query", "query", "retrieval"),
        ("classification", "document", "classification"), ("clustering", "document", "clustering"),
        (None, "document", "retrieval"),
    ],
)  # fmt: skip
def test_cohere_embeds_with_the_prompt_of_its_input_type(client, encoder, input_type, side, task):
    # cohere.ClientV2(base_url=…).embed(…)
    asked = {
        "texts": TEXTS,
        "model": "tiny",
        "input_type": input_type,
        "embedding_types": ["float", "base64"],
        "truncate": "END",
    }
    body = answer(client, "/v2/embed", asked)
    CohereEmbedResponse.model_validate(body)
    expected = encoder.embed(TEXTS, side, task)
    assert np.array_equal(np.array(body["embeddings"]["float"], dtype=np.float32), expected)
    packed = [np.frombuffer(base64.b64decode(row), "<f4") for row in body["embeddings"]["base64"]]
    assert np.array_equal(packed, expected)
    assert (body["response_type"], body["texts"]) == ("embeddings_by_type", TEXTS)
    assert body["meta"]["api_version"] == {"version": "2"}


def test_cohere_v1_answers_plain_lists_and_litellm_posts_them_to_the_base_url(client, encoder):
    asked = {"texts": ["a", "b"], "model": "tiny", "input_type": "search_query"}
    expected = encoder.embed(["a", "b"], "query")
    for path in ("/v1/embed", "/", "/v1"):
        body = answer(client, path, asked)
        CohereEmbedResponse.model_validate(body)
        assert body["response_type"] == "embeddings_floats"
        assert np.array_equal(np.array(body["embeddings"], dtype=np.float32), expected)
    assert list(answer(client, "/v2/embed", asked)["embeddings"]) == ["float"]
    typed = answer(client, "/v1/embed", {**asked, "embedding_types": ["float"]})
    assert typed["response_type"] == "embeddings_by_type"


def test_cohere_gets_every_type_that_its_api_has(client, encoder):
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    body = answer(client, "/v2/embed", {"texts": TEXTS, "model": "tiny", "embedding_types": kinds})
    CohereEmbedResponse.model_validate(body)
    found, expected = body["embeddings"], encoder.embed(TEXTS, "document")
    assert list(found) == kinds
    assert found["ubinary"] == np.packbits(expected > 0, axis=1).tolist()
    assert (np.array(found["binary"]) + 128).tolist() == found["ubinary"]
    assert (np.array(found["uint8"]) - 128).tolist() == found["int8"]
    largest = np.abs(expected).max(axis=1, keepdims=True)
    assert np.abs(np.array(found["int8"]) - expected / largest * 127).max() <= 0.501


def test_cohere_cuts_by_default_and_says_so(client):
    reply = client.post(
        "/v2/embed", json={"texts": ["x" * 500, "a"], "model": "tiny", "input_type": "search_document"}
    )
    assert reply.headers["x-truncated-items"] == "1"
    assert reply.json()["meta"]["warnings"] == ["1 of the texts were cut to the model's limit"]
    asked = {"texts": ["a", "x" * 500], "model": "tiny", "truncate": "NONE"}
    assert refused(client.post("/v2/embed", json=asked), 400)["message"].startswith("texts[1] has 501 tokens")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"embedding_types": ["int4"]}, "embedding_types"), ({"embedding_types": []}, "embedding_types"),
        ({"texts": ["a", ""]}, "texts"), ({"texts": []}, "texts"), ({"texts": None, "images": ["x"]}, "images"),
        ({"input_type": "image"}, "input_type"), ({"output_dimension": 5}, "output_dimension"), ({"model": "gpt"}, "model"),
    ],
)  # fmt: skip
def test_what_cohere_has_and_this_has_not_is_refused_by_name(client, change, param):
    body = {"texts": ["a"], "model": "tiny", **change}
    reply = client.post("/v2/embed", json={name: value for name, value in body.items() if value is not None})
    assert refused(reply, 404 if param == "model" else 400)["param"] == param


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_coheres_rerank(client, encoder, path):
    # cohere.ClientV2(base_url=…).rerank(…) and cohere.Client(base_url=…).rerank(…)
    asked = {
        "model": "tiny", "query": "q", "documents": [DOCUMENTS[0], {"text": "", "id": 1}, {"text": "cde"}, "ab"],
        "top_n": 4, "max_tokens_per_doc": 4096, "rank_fields": ["text"], "return_documents": True, "max_chunks_per_doc": 10,
    }  # fmt: skip
    body = answer(client, path, asked)
    RerankResponse.model_validate(body)
    assert body["meta"]["api_version"] == {"version": path[2]}
    found = {item["index"]: item["relevance_score"] for item in body["results"]}
    assert np.allclose([found[0], found[2], found[3]], scores_of(encoder), atol=1e-6)
    assert body["results"][-1] == {"index": 1, "relevance_score": -1.0, "document": {"text": "", "id": 1}}
    assert found[0] == found[3]


# -- Jina, Voyage, Infinity


def test_jinas_requests(client, encoder):
    asked = {
        "model": "tiny", "task": "retrieval.query", "input": TEXTS, "normalized": True, "late_chunking": False,
        "embedding_type": "float", "truncate": True, "dimensions": 8,
    }  # fmt: skip
    body = answer(client, "/v1/embeddings", asked)
    assert np.array_equal(
        [item["embedding"] for item in body["data"]], encoder.embed(TEXTS, "query").tolist()
    )
    ranked = answer(
        client,
        "/v1/rerank",
        {"model": "tiny", "query": "q", "documents": ["ab", "cde"], "top_n": 1, "return_documents": True},
    )
    assert ranked["results"][0]["document"]["text"] in ("ab", "cde") and ranked["usage"]["total_tokens"] > 0


def test_jinas_base64(client, encoder):
    asked = {"model": "tiny", "input": TEXTS, "embedding_type": "base64"}
    packed = [item["embedding"] for item in answer(client, "/v1/embeddings", asked)["data"]]
    expected = encoder.embed(TEXTS, "document")
    assert np.array_equal([np.frombuffer(base64.b64decode(row), "<f4") for row in packed], expected)
    own = answer(client, "/v1/embeddings", {**asked, "encoding_format": "float"})["data"]
    assert np.array_equal([item["embedding"] for item in own], expected.tolist())


def test_voyages_requests(client, encoder):
    # voyageai.Client(base_url=…).embed(…)
    asked = {
        "input": TEXTS, "model": "tiny", "input_type": "query", "truncation": True, "output_dtype": None,
        "output_dimension": None, "encoding_format": "base64",
    }  # fmt: skip
    for path in ("/v1/embeddings", "/embeddings"):
        packed = [item["embedding"] for item in answer(client, path, asked)["data"]]
        vectors = [np.frombuffer(base64.b64decode(row), "<f4") for row in packed]
        assert np.array_equal(vectors, encoder.embed(TEXTS, "query"))
    # .rerank(…): the results under another name
    ranked = answer(
        client,
        "/v1/rerank",
        {"query": "q", "documents": DOCUMENTS, "model": "tiny", "top_k": 2, "truncation": True},
    )
    assert ranked["data"] == ranked["results"] and len(ranked["data"]) == 2
    assert "data" not in answer(client, "/v1/rerank", {"query": "q", "documents": DOCUMENTS, "model": "tiny"})


def test_rerank_at_the_root_suits_infinitys_and_vllms_clients(client, encoder):
    # LiteLLM's infinity/ wants a document as a string and its hosted_vllm/ an object, in answer to this same request.
    asked = {"model": "tiny", "query": "q", "top_n": 2, "documents": ["ab", "cde"], "return_documents": True}
    body = answer(client, "/rerank", asked)
    RerankResponse.model_validate(body)
    assert all("document" not in item for item in body["results"])
    best = sorted(range(2), key=lambda index: -scores_of(encoder, documents=["ab", "cde"])[index])
    assert [item["index"] for item in body["results"]] == best
    assert all("document" in item for item in answer(client, "/v1/rerank", asked)["results"])


# -- TEI


@pytest.mark.parametrize("path", ["/embed", "/"])
@pytest.mark.parametrize(
    ("asked", "side", "task"),
    [
        ({"inputs": "ab"}, "document", "retrieval"),
        ({"inputs": ["ab"], "truncate": False, "normalize": True}, "document", "retrieval"),
        (
            {"inputs": "ab", "prompt_name": "query", "truncate": True, "truncation_direction": "Left"},
            "query",
            "retrieval",
        ),
        ({"inputs": "ab", "prompt_name": "passage"}, "document", "retrieval"),
        ({"inputs": "ab", "prompt_name": "sts"}, "query", "sts"),
        ({"inputs": "ab", "dimensions": None, "prompt_name": None}, "document", "retrieval"),
    ],
)
def test_tei_embeds(client, encoder, path, asked, side, task):
    assert np.array_equal(
        np.array(answer(client, path, asked), dtype=np.float32), encoder.embed(["ab"], side, task)
    )


def test_tei_embeds_lists_and_token_ids_of_its_own_tokenizer(client, encoder):
    body = answer(client, "/embed", {"inputs": TEXTS})
    assert np.array_equal(np.array(body, dtype=np.float32), encoder.embed(TEXTS, "document"))
    ids = [[token["id"] for token in text] for text in answer(client, "/tokenize", {"inputs": TEXTS})]
    assert answer(client, "/embed", {"inputs": ids}) == body


@pytest.mark.parametrize(("direction", "kept"), [("right", "a"), ("left", "b"), (None, "a")])
def test_tei_cuts_at_either_end(client, encoder, direction, kept):
    text = "a" * LIMIT + "b" * LIMIT
    reply = client.post(
        "/embed", json={"inputs": [text, "c"], "truncate": True, "truncation_direction": direction}
    )
    assert reply.headers["x-truncated-items"] == "1"
    expected = encoder.embed([kept * (LIMIT - 1)], "document")
    assert np.array_equal(np.array(reply.json()[:1], dtype=np.float32), expected)
    assert refused(client.post("/embed", json={"inputs": ["c", text]}), 400)["message"].startswith(
        "inputs[1] has 257 tokens"
    )


def test_teis_auto_truncate_is_the_operators_setting():
    with client_of(FakeEncoder(limit=LIMIT), truncate="end") as client:
        reply = client.post("/embed", json={"inputs": "x" * 500})
        assert (reply.status_code, reply.headers["x-truncated-items"]) == (200, "1")
        assert client.get("/info").json()["auto_truncate"] is True
        # Counted whole: clients chunk by it.
        assert len(answer(client, "/tokenize", {"inputs": "x" * 500})[0]) == 501
        refused(client.post("/embed", json={"inputs": "x" * 500, "truncate": False}), 400)


def test_the_end_that_a_tei_client_names_is_cut_where_the_operator_says_that_it_is_cut():
    encoder = FakeEncoder(limit=LIMIT)
    with client_of(encoder, truncate="end") as client:
        asked = {"inputs": "a" * LIMIT + "b" * LIMIT, "truncation_direction": "left"}
        vectors = np.array(answer(client, "/embed", asked), dtype=np.float32)
        assert np.array_equal(vectors, encoder.embed(["b" * (LIMIT - 1)], "document"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"model": "tiny", "query": "a", "documents": ["b"], "texts": None}),
        ("/", {"inputs": "a", "texts": None}),
        ("/tokenize", {"input": "a", "inputs": None}),
    ],
)
def test_a_null_field_of_another_dialect_is_as_if_it_were_absent(client, path, body):
    given = {key: value for key, value in body.items() if value is not None}
    seen, expected = answer(client, path, body), answer(client, path, given)
    if isinstance(seen, dict):  # a reply's own id is new each time
        seen, expected = ({**reply, "id": None} for reply in (seen, expected))
    assert seen == expected


def test_teis_rerank(client, encoder):
    asked = {"query": "q", "texts": DOCUMENTS, "raw_scores": False, "return_text": True, "truncate": True}
    body = answer(client, "/rerank", asked)
    TeiRanking.model_validate(body)
    found = {item["index"]: item["score"] for item in body}
    assert np.allclose([found[0], found[2], found[3]], scores_of(encoder), atol=1e-6)
    assert [item["score"] for item in body] == sorted(found.values(), reverse=True)
    assert body[-1] == {"index": 1, "score": -1.0, "text": ""}
    assert "text" not in answer(client, "/rerank", {"query": "q", "texts": DOCUMENTS})[0]


def test_teis_similarity_embeds_all_sentences_alike(client, encoder):
    inputs = {"source_sentence": "ab", "sentences": ["ab", "cde", " "]}
    vectors = encoder.embed(["ab", "ab", "cde", " "], "document")
    assert np.allclose(
        answer(client, "/similarity", {"inputs": inputs, "parameters": {}}),
        vectors[1:] @ vectors[0],
        atol=1e-6,
    )
    asked = {
        "inputs": inputs,
        "parameters": {"prompt_name": "sts", "truncate": True, "truncation_direction": "right"},
    }
    vectors = encoder.embed(["ab", "ab", "cde", " "], "query", "sts")
    assert np.allclose(answer(client, "/similarity", asked), vectors[1:] @ vectors[0], atol=1e-6)
    inputs = {**inputs, "sentences": ["a", ""]}
    assert (
        "sentences[1] is an empty string"
        in refused(client.post("/similarity", json={"inputs": inputs}), 400)["message"]
    )


def test_teis_tokenize_and_ours_share_a_path(client):
    body = answer(client, "/tokenize", {"inputs": "ab", "add_special_tokens": True})
    TeiTokens.model_validate(body)
    assert body == [[
        {"id": BOS, "text": "<s>", "special": True, "start": None, "stop": None},
        {"id": 100, "text": "a", "special": False, "start": 0, "stop": 1},
        {"id": 101, "text": "b", "special": False, "start": 1, "stop": 2},
    ]]  # fmt: skip
    assert answer(client, "/tokenize", {"inputs": ["ab"], "add_special_tokens": False}) == [body[0][1:]]
    assert answer(client, "/tokenize", {"input": "ab"})["data"][0]["token_ids"] == [BOS, 100, 101]
    prompted = answer(client, "/tokenize", {"inputs": "ab", "prompt_name": "query"})[0]
    assert len(prompted) > 30 and prompted[-1]["stop"] - prompted[0 + 1]["start"] == len(prompted) - 1


def test_pieces_of_a_real_tokenizer_are_the_text_they_stand_for(tiny_model):
    encoder = Encoder.load(tiny_model, dtype="float32")
    texts = ["open a file", "größer, 日本語"]
    ids = encoder.tokenize(texts, "document")
    for text, own, pieces in zip(texts, ids, pieces_of(encoder, Part("document", texts), ids), strict=True):
        assert [piece.id for piece in pieces] == own
        assert [piece.special for piece in pieces] == [True] + [False] * (len(own) - 1)
        covered = {
            place for piece in pieces if piece.start is not None for place in range(piece.start, piece.stop)
        }
        assert {text[place] for place in set(range(len(text))) - covered} <= {" "}


def test_teis_info(client, encoder):
    info = TeiInfo.model_validate(client.get("/info").json())
    assert (info.model_id, info.model_sha, info.max_input_length) == ("tiny", "f00d", LIMIT)
    assert info.model_type == {"embedding": {"pooling": encoder.contract.pooling}}
    assert (info.max_client_batch_size, info.auto_truncate) == (8, False)


@pytest.mark.parametrize("path", [*NOT_OFFERED, "/v1/embed_all"])
def test_what_tei_has_and_this_has_not_is_refused_by_name(client, path):
    message = refused(client.post(path, json={"inputs": "a"}), 404)["message"]
    assert NOT_OFFERED[path.removeprefix("/v1")] in message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": ""}, "inputs"), ({"inputs": ["a", ""]}, "inputs"), ({"inputs": []}, "inputs"), ({}, "inputs"),
        ({"inputs": "a", "normalize": False}, "normalize"), ({"inputs": "a", "prompt_name": "search"}, "prompt_name"),
        ({"inputs": "a", "truncation_direction": "up"}, "truncation_direction"), ({"input": "a"}, "input"),
        ({"inputs": ["a"] * 9}, "inputs"), ({"inputs": "a", "dimensions": 5}, "dimensions"),
    ],
)  # fmt: skip
def test_bad_requests_to_tei_name_the_field(client, body, param):
    assert refused(client.post("/embed", json=body), 400)["param"] == param


def test_every_way_to_name_a_prompt_reaches_the_models_own_tasks():
    encoder = FakeEncoder(limit=LIMIT)
    task = NamedTask(task_type="retrieval", instruction="Find the page", document_instruction="Page")
    encoder.contract = encoder.contract.model_copy(update={"tasks": {"pages": task}})
    aliases = {"tiny-pages": ModelAlias(side="query", task="pages")}
    check_aliases(aliases, "tiny", encoder.contract)
    with pytest.raises(ConfigError, match=r"serving\.models\.q\.task: .*'page'"):
        check_aliases({"q": ModelAlias(task="page")}, "tiny", encoder.contract)
    expected = encoder.embed(["ab"], "query", "pages")
    assert not np.array_equal(expected, encoder.embed(["ab"], "query"))
    with client_of(encoder, tasks=("pages",), models=aliases) as client:
        for path, asked in (
            ("/v1/embeddings", {"model": "tiny-pages", "input": "ab"}),
            ("/v1/embeddings", {"model": "tiny", "input": "ab", "input_type": "query", "task": "pages"}),
            ("/v1/embed", {"model": "tiny", "texts": ["ab"], "input_type": "search_query", "task": "pages"}),
            ("/v1/embed", {"model": "tiny-pages", "texts": ["ab"]}),
            ("/embed", {"inputs": "ab", "prompt_name": "pages"}),
        ):
            body = answer(client, path, asked)
            rows = (
                body
                if path == "/embed"
                else body.get("embeddings") or [item["embedding"] for item in body["data"]]
            )
            assert np.array_equal(np.array(rows, dtype=np.float32), expected), asked
        for path, asked in (
            ("/embed", {"inputs": "a", "prompt_name": "page"}),
            ("/tokenize", {"input": "a", "task": "page"}),
        ):
            assert "pages" in refused(client.post(path, json=asked), 400)["message"]


# -- keys


def test_the_page_is_open_and_embedding_at_the_same_path_is_not():
    key = "sk-of-these-tests"
    keys = (ApiKey(name="tests", sha256=hashlib.sha256(key.encode()).hexdigest()),)
    with client_of(FakeEncoder(), keys=keys) as client:
        assert client.get("/").status_code == 200
        for path in (
            "/",
            "/v1",
            "/embed",
            "/rerank",
            "/similarity",
            "/tokenize",
            "/v2/embed",
            "/embeddings",
            "/v2/rerank",
        ):
            refused(client.post(path, json={"inputs": "a"}), 401)
        for path in ("/info", "/models"):
            refused(client.get(path), 401)
        reply = client.post("/", json={"inputs": "a"}, headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == 200
