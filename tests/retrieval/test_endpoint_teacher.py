"""Teachers behind an OpenAI-compatible endpoint, against a server on this machine that misbehaves on request."""

import importlib.util
import pickle
from dataclasses import replace

import numpy as np
import pytest

from embedloom.core.prompting import Templates
from embedloom.encoder.tokenizer import CutTexts
from embedloom.errors import ConfigError, DataError, MissingDependency, StageError
from embedloom.retrieval.teachers import EndpointSource
from fakes_endpoint import DIMENSION, FakeEndpoint, serve, vector_of

TEXTS = ["one", "two words", "three more words", "four", "five"]


def source(endpoint: FakeEndpoint, **changes) -> EndpointSource:
    return EndpointSource(name="remote", url=endpoint.url, model="served", max_retries=2, **changes)


def embed(embedder, texts, side="document", instruction=None, task_type="retrieval"):
    return embedder.embed(texts, side, [task_type] * len(texts), [instruction] * len(texts))


def expected(texts):
    vectors = np.array([vector_of(text) for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_vectors_are_in_the_order_of_the_texts_whatever_the_order_of_the_answer(batch_size):
    with serve(FakeEndpoint("reversed")) as endpoint:
        vectors, tokens = embed(source(endpoint, batch_size=batch_size).open(), TEXTS)
        assert (vectors.shape, vectors.dtype) == ((5, DIMENSION), np.float32)
        np.testing.assert_allclose(vectors, expected(TEXTS), atol=1e-6)
        assert sum(tokens) == 8  # words, as the server counts them
        assert len(endpoint.requests) == -(-5 // batch_size)
        assert {request["model"] for request in endpoint.requests} == {"served"}
        assert {request["encoding_format"] for request in endpoint.requests} == {"float"}


def test_templates_and_instructions_stand_around_the_text():
    templates = Templates(query="Instruct: {instruction}\nQuery: {text}", document="passage: {text} </s>")
    with serve(FakeEndpoint()) as endpoint:
        embedder = source(endpoint, templates=templates, batch_size=8).open()
        embed(embedder, ["a {text}"], "query", "Find {it}")
        embed(embedder, ["b"], "document")
        embed(embedder, ["c"], "document", None, "sts")
        embed(embedder, ["d"], "query")
        assert [request["input"][0] for request in endpoint.requests] == [
            "Instruct: Find {it}\nQuery: a {text}",
            "passage: b </s>",
            "Instruct: Retrieve semantically similar text\nQuery: c",
            "Instruct: Given a question, retrieve passages that answer the question\nQuery: d",
        ]
        with pytest.raises(DataError, match=r"task_type: 'guessing' is unknown; allowed: .*'retrieval'"):
            embed(embedder, ["e"], "query", None, "guessing")


def test_long_texts_are_cut_and_empty_ones_become_a_blank():
    with serve(FakeEndpoint()) as endpoint:
        embedder = source(endpoint, max_characters=4, templates=Templates(query="q: {text}")).open()
        embed(embedder, ["abcdefgh", ""], "query")
        embed(embedder, [""], "document")
        assert [request["input"] for request in endpoint.requests] == [["q: abcd", "q: "], [" "]]


def test_texts_that_are_cut_on_either_side_are_counted():
    """Ten words of four letters, cut at 20 characters, lose 29 of 49: at 4 words in 20 characters that is 6 tokens."""
    words = " ".join(["abcd"] * 10)
    with serve(FakeEndpoint()) as endpoint:
        embedder = source(endpoint, max_characters=20).open()
        embed(embedder, [words, "abcd", words])
        assert embedder.cuts == CutTexts(texts=3, cut=2, read=9, left_out=12)
    with serve(FakeEndpoint(longest=3, most=2)) as endpoint:
        embedder = source(endpoint).open()
        embed(embedder, [words, "abcd", words, words])
        assert embedder.cuts.counts() == {"texts_cut": 3, "tokens_left_out": 3}  # one each, as none says more
        assert embedder.cuts.texts == 4
    with serve(FakeEndpoint()) as endpoint:
        embedder = source(endpoint).open()
        embed(embedder, [words])
        assert embedder.cuts.counts() == {}


@pytest.mark.parametrize("habit", ["short", "empty", "doubled"])
def test_an_answer_without_one_vector_per_text_is_refused(habit):
    with (
        serve(FakeEndpoint(habit)) as endpoint,
        pytest.raises(DataError, match=r"teacher 'remote' at .*: answered \d vectors for 5 texts"),
    ):
        embed(source(endpoint).open(), TEXTS)


def test_changing_dimensions_and_values_that_are_not_finite_are_refused():
    with serve(FakeEndpoint("wider")) as endpoint:
        embedder = source(endpoint, batch_size=5).open()
        embed(embedder, TEXTS)
        with pytest.raises(DataError, match=r"vectors of dimensions \[6, 7\]; all must have the same"):
            embed(embedder, TEXTS)
    with (
        serve(FakeEndpoint("nan")) as endpoint,
        pytest.raises(DataError, match="the vector of row 0 is not finite"),
    ):
        embed(source(endpoint).open(), TEXTS)


def test_vectors_that_are_no_numbers_are_refused():
    with (
        serve(FakeEndpoint("base64")) as endpoint,
        pytest.raises(DataError, match="no lists of numbers, though asked for float"),
    ):
        embed(source(endpoint).open(), TEXTS)


@pytest.mark.parametrize("failures", [(429,), (503, 429)])
def test_what_may_pass_is_tried_again(failures):
    with serve(FakeEndpoint(failures=failures)) as endpoint:
        vectors, _ = embed(source(endpoint).open(), TEXTS)
        np.testing.assert_allclose(vectors, expected(TEXTS), atol=1e-6)
        assert len(endpoint.requests) == len(failures) + 1


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (429, StageError, "HTTP 429: .*, after 3 tries"),
        (401, ConfigError, "HTTP 401: .*the key is taken from api_key_env: None"),
        (404, ConfigError, "HTTP 404: .*model is 'served'"),
        (400, DataError, "HTTP 400: .*not now.*batch_size and max_characters make requests smaller"),
    ],
)
def test_what_stays_wrong_is_explained(status, error, message):
    with serve(FakeEndpoint(failures=(status,) * 3)) as endpoint, pytest.raises(error, match=message):
        embed(source(endpoint).open(), TEXTS)


def test_a_server_that_is_not_there_is_named():
    with serve(FakeEndpoint()) as endpoint:
        gone = replace(source(endpoint), max_retries=0)
    with pytest.raises(StageError, match=r"no answer after 1 tries \(APIConnectionError"):
        embed(gone.open(), TEXTS)


def test_requests_too_large_are_halved():
    with serve(FakeEndpoint(most=2)) as endpoint:
        vectors, tokens = embed(source(endpoint, batch_size=5).open(), TEXTS)
        np.testing.assert_allclose(vectors, expected(TEXTS), atol=1e-6)
        assert sum(tokens) == 8
    with serve(FakeEndpoint(most=0)) as endpoint, pytest.raises(DataError, match="HTTP 413"):
        embed(source(endpoint).open(), ["one"])


def test_a_server_without_usage_costs_no_known_tokens():
    with serve(FakeEndpoint("silent")) as endpoint:
        assert embed(source(endpoint).open(), TEXTS)[1] == [0] * 5


def test_the_key_comes_from_its_variable_and_stays_out_of_the_source(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses")
    with serve(FakeEndpoint()) as endpoint:
        with_key = source(endpoint, api_key_env="TEACHER_KEY")
        with pytest.raises(ConfigError, match=r"'TEACHER_KEY' \(api_key_env\) is not set"):
            with_key.open()
        monkeypatch.setenv("TEACHER_KEY", "s3cret")
        embed(with_key.open(), ["a"])
        embed(source(endpoint).open(), ["a"])
        assert endpoint.keys == ["Bearer s3cret", "Bearer none"]
        assert b"s3cret" not in pickle.dumps(with_key)
        assert "s3cret" not in repr(with_key)


def test_the_contract_hash_knows_the_model_and_the_texts_but_not_the_address():
    one = EndpointSource(name="a", url="http://one/v1", model="served")
    hashes = [
        changed.open().contract_hash
        for changed in (
            one,
            replace(one, url="http://two/v1", name="b", concurrency=1, batch_size=7),
            replace(one, model="another"),
            replace(one, templates=Templates(query="query: {text}")),
            replace(one, max_characters=100),
        )
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:])) == 4


def test_no_texts_ask_nothing():
    with serve(FakeEndpoint()) as endpoint:
        vectors, tokens = embed(source(endpoint).open(), [])
        assert (len(vectors), tokens, endpoint.requests) == (0, [], [])


def test_a_missing_client_library_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"^teacher 'a' needs .*pip install 'embedloom\[openai\]'$"):
        EndpointSource(name="a", url="http://one/v1", model="m").open()
