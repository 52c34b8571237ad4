"""Clients as they are: nulls, model names in place of fields, cut texts, one bad item, other people's headers and paths."""

import base64
import hashlib
import json
import math

import jsonschema
import numpy as np
import pytest

from embedloom.config.base import validate
from embedloom.config.serving import ModelAlias, ServingConfig
from embedloom.core.prompting import PromptContract
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError
from embedloom.serving.calls import check_aliases
from embedloom.serving.front import ApiKey
from embedloom.serving.messages import Part
from embedloom.serving.refusals import ApiError, parse
from embedloom.serving.schemas import ClosedRequest
from embedloom.serving.service import Frame, cut_items, given_ids, text_ids
from fakes_serving import BOS, FakeEncoder, api_of, client_of, refused, vector_of

JSON = {"content-type": "application/json"}
ALIASES = {
    "tiny-query": ModelAlias(side="query"),
    "tiny-find": ModelAlias(side="query", instruction="Find", truncate="end"),
    "tiny-sts": ModelAlias(task="sts"),
    "org/tiny-passages": ModelAlias(side="document", truncate="start"),
}
# The least that each request may be.
LEAST = {
    "EmbeddingsRequest": {"model": "tiny", "input": "a"},
    "RerankRequest": {"model": "tiny", "query": "a", "documents": ["b"]},
    "SimilarityRequest": {"model": "tiny", "query": "a", "documents": ["b"]},
    "TokenizeRequest": {"input": "a"},
    "SearchRequest": {"query": "a"},
    "CohereEmbedRequest": {"model": "tiny", "texts": ["a"]},
    "TeiEmbedRequest": {"inputs": "a"},
    "TeiRerankRequest": {"query": "a", "texts": ["b"]},
    "TeiSimilarityRequest": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "TeiTokenizeRequest": {"inputs": "a"},
    "BatchRequest": {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"},
    "ExpiresAfter": {"anchor": "created_at", "seconds": 3600},
    "TeiSentences": {"source_sentence": "a", "sentences": ["b"]},
}


@pytest.fixture
def encoder():
    return FakeEncoder(limit=128)


@pytest.fixture
def client(encoder):
    with client_of(encoder, models=ALIASES) as client:
        yield client


def embed(client, status=200, **body):
    reply = client.post("/v1/embeddings", json={"model": "tiny", "input": "a", **body})
    assert reply.status_code == status, reply.text
    return reply


def vectors(reply) -> np.ndarray:
    return np.array([item["embedding"] for item in reply.json()["data"]], dtype=np.float32)


def requests_of(kind: type) -> list[type]:
    """All request types that are somebody's body: those that no other is made from."""
    below = [found for child in kind.__subclasses__() for found in requests_of(child)]
    return below or [kind]


REQUESTS = requests_of(ClosedRequest)


def test_every_request_type_is_tested_here():
    assert {kind.__name__ for kind in REQUESTS} == set(LEAST)


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
def test_null_is_the_default_in_every_field_that_has_one(kind):
    least = LEAST[kind.__name__]
    plain = parse(kind, json.dumps(least).encode())
    schema = kind.model_json_schema()
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    for name in optional:
        asked = {**least, name: None}
        assert parse(kind, json.dumps(asked).encode()) == plain, name
        jsonschema.validate(asked, schema)
    with pytest.raises(ApiError, match="unknown parameter"):
        parse(kind, json.dumps({**least, "strange": None}).encode())
    for name in least:
        if not kind.model_fields[name].is_required():
            continue
        with pytest.raises(ApiError, match=name):
            parse(kind, json.dumps({**least, name: None}).encode())


# -- model names in place of fields


def test_a_model_name_stands_for_side_instruction_and_task(client, encoder):
    for name, expected in {
        "tiny": encoder.embed(["ab"], "document"),
        "tiny-query": encoder.embed(["ab"], "query"),
        "tiny-find": encoder.embed(["ab"], "query", instruction="Find"),
        "tiny-sts": encoder.embed(["ab"], "document", "sts"),
        "org/tiny-passages": encoder.embed(["ab"], "document"),
    }.items():
        reply = embed(client, model=name, input="ab")
        assert np.array_equal(vectors(reply), expected), name
        assert reply.json()["model"] == name


def test_what_a_request_says_itself_holds_over_its_model_name(client, encoder):
    found = embed(client, model="tiny-find", input="ab", input_type="document")
    assert np.array_equal(vectors(found), encoder.embed(["ab"], "document"))
    found = embed(client, model="tiny-find", input="ab", instruction="Seek")
    assert np.array_equal(vectors(found), encoder.embed(["ab"], "query", instruction="Seek"))
    # Another task: the name's instruction belonged to its own.
    found = embed(client, model="tiny-find", input="ab", task="classification")
    assert np.array_equal(vectors(found), encoder.embed(["ab"], "query", "classification"))
    refused(
        client.post("/v1/embeddings", json={"model": "tiny-find", "input": "x" * 200, "truncate": "none"}),
        400,
    )
    embed(client, model="tiny-find", input="x" * 200)


def test_jinas_tasks_say_the_side(client, encoder):
    for task, expected in {
        "retrieval.query": encoder.embed(["a"], "query"),
        "retrieval.passage": encoder.embed(["a"], "document"),
        "text-matching": encoder.embed(["a"], "document", "sts"),
        "separation": encoder.embed(["a"], "document", "clustering"),
    }.items():
        assert np.array_equal(vectors(embed(client, task=task)), expected), task


def test_model_names_are_listed_with_what_they_stand_for(client):
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["tiny", *ALIASES]
    assert cards["tiny"]["alias_of"] is cards["tiny"]["defaults"] is None
    found = cards["tiny-find"]
    assert found["alias_of"] == "tiny"
    assert found["defaults"] == {
        "input_type": "query",
        "task": None,
        "instruction": "Find",
        "truncate": "end",
    }
    assert client.get("/v1/models/org/tiny-passages").json() == cards["org/tiny-passages"]
    same = {key: value for key, value in found.items() if key not in ("id", "alias_of", "defaults")}
    assert same.items() <= cards["tiny"].items()
    error = refused(client.post("/v1/embeddings", json={"model": "gpt", "input": "a"}), 404)
    assert all(repr(name) in error["message"] for name in ("tiny", *ALIASES))


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/similarity", "/tokenize"])
def test_every_route_answers_to_every_name(client, path):
    body = {"input": "a"} if path == "/tokenize" else {"query": "a", "documents": ["b"]}
    for name in ("tiny", *ALIASES):
        reply = client.post(path, json={"model": name, "truncate": "end", **body})
        assert (reply.status_code, reply.json()["model"]) == (200, name), reply.text
    refused(client.post(path, json={"model": "gpt", **body}), 404)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"tiny": {}}, r"serving\.models\.tiny: is the served name itself"),
        ({"q": {"task": "searching"}}, r"serving\.models\.q\.task: .*'searching'.*allowed: .*retrieval"),
        ({"q": {"instruction": "  "}}, r"serving\.models\.q\.instruction: blank"),
        ({"q": {"side": "passage"}}, r"models\.q\.side: .*'query' or 'document'.*'passage'"),
        ({"q": {"sied": "query"}}, r"models\.q\.sied: unknown key; the nearest valid key is 'side'"),
        ({"": {}}, r"models: '' is not a name"),
        ({" q": {}}, r"models: ' q' is not a name"),
        ({"q\n": {}}, r"models: 'q\\n' is not a name"),
        ({"q/": {}}, r"models: 'q/' is not a name"),
    ],
)
def test_model_names_are_checked_before_anything_starts(models, words):
    with pytest.raises(ConfigError, match=words):
        check_aliases(validate(ServingConfig, {"models": models}, "serving").models, "tiny", PromptContract())


def test_names_of_every_task_are_taken():
    contract = PromptContract()
    tasks = [*contract.instructions, "retrieval.query", "text-matching", None]
    check_aliases({f"q{n}": ModelAlias(task=task) for n, task in enumerate(tasks)}, "tiny", contract)


# -- texts over the limit


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("truncate", ["start", "end"])
def test_a_cut_is_told_in_a_header_and_in_the_usage(encoding_format, truncate):
    texts = ["x" * 63, "x" * 64, "ab", "y" * 5000]  # BOS and 63 characters fill the limit of 64
    with client_of(FakeEncoder(), truncate=truncate) as client:
        whole = embed(client, input=texts[:1], encoding_format=encoding_format)
        assert "x-truncated-items" not in whole.headers and "truncated_items" not in whole.json()["usage"]
        cut = embed(client, input=texts, encoding_format=encoding_format)
        assert cut.headers["x-truncated-items"] == "2"
        assert cut.json()["usage"] == {"prompt_tokens": 195, "total_tokens": 195, "truncated_items": 2}
        refused(
            client.post("/v1/embeddings", json={"model": "tiny", "input": texts, "truncate": "none"}), 400
        )


@pytest.mark.parametrize(
    ("operators", "path", "status"),
    [
        (None, "/v1/embeddings", 400), (None, "/v1/rerank", 200), (None, "/v1/similarity", 400),
        ("none", "/v1/embeddings", 400), ("none", "/v1/rerank", 400), ("none", "/v1/similarity", 400),
        ("end", "/v1/embeddings", 200), ("end", "/v1/rerank", 200), ("start", "/v1/similarity", 200),
    ],
)  # fmt: skip
def test_the_operators_default_holds_where_a_request_says_nothing(operators, path, status):
    long = ["ok", "x" * 100]
    body = (
        {"input": long}
        if path == "/v1/embeddings"
        else {"query": "q", "documents": long, "instruction": "Find"}
    )
    with client_of(FakeEncoder(), truncate=operators) as client:
        reply = client.post(path, json={"model": "tiny", **body})
        assert reply.status_code == status, reply.text
        if status == 200:
            assert reply.headers["x-truncated-items"] == "1"
            assert reply.json()["usage"]["truncated_items"] == 1
        else:
            assert (
                f"{'input' if 'input' in body else 'documents'}[1] has 101 tokens"
                in reply.json()["error"]["message"]
            )


def test_truncate_in_the_spellings_of_other_dialects(client, encoder):
    for spelling in ("end", "END", True):
        assert np.array_equal(
            vectors(embed(client, input="x" * 200, truncate=spelling)), encoder.embed(["x" * 200], "document")
        )
    for spelling in ("none", "NONE", False, None):
        embed(client, 400, input="x" * 200, truncate=spelling)
    assert embed(client, input="x" * 200, truncation=True).headers["x-truncated-items"] == "1"
    embed(client, 400, input="x" * 200, truncation=False)
    embed(client, 400, input="x" * 200, truncation=True, truncate="none")  # our own name holds


def test_a_real_tokenizers_cuts_are_counted(tiny_model):
    encoder = Encoder.load(tiny_model, dtype="float32")
    limit = encoder.contract.max_document_tokens
    texts = ["a", "open a file " * 300, "größer, 日本語 " * 4]
    # Texts that just fill the limit and that are one token longer.
    word = "file "
    while len(encoder.tokenizer([word])["input_ids"][0]) < limit:
        word += "file "
    texts += [word.strip(), word + "file file"]
    whole = [len(ids) for ids in encoder.tokenizer(texts)["input_ids"]]
    assert min(whole) < limit < max(whole)
    for truncate in ("start", "end"):
        part = Part("document", texts)
        ids = text_ids(encoder, part, slice(0, None), truncate)
        assert cut_items(encoder, part, slice(0, None), ids) == sum(length > limit for length in whole)


def test_tokenize_tells_a_cut_too(client):
    reply = client.post("/tokenize", json={"input": ["x" * 200, "a"], "truncate": "end"})
    assert reply.headers["x-truncated-items"] == "1"
    assert "x-truncated-items" not in client.post("/tokenize", json={"input": "x" * 200}).headers


# -- token ids


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ([15, 19], "input[0] does not begin"),
        ([[BOS, 15], [19, 17]], "input[1] does not begin"),
        ([[BOS, 9999]], "input[0] holds token id 9999"),
        ([[15, BOS]], "input[0] does not begin"),
    ],
)
def test_token_ids_of_another_tokenizer_are_refused_by_name(given, where):
    with client_of(FakeEncoder(), token_ids="refuse") as client:
        error = refused(client.post("/v1/embeddings", json={"model": "tiny", "input": given}), 400)
        assert error["message"].startswith(where)
        assert "check_embedding_ctx_length=False" in error["message"]
        assert (error["param"], error["code"]) == ("input", "invalid_token_id")


def test_token_ids_that_tokenize_gave_are_taken_and_embed_to_the_texts_own_vector():
    texts = ["ab", "größer, 日本語", " ", "x" * 100]
    with client_of(FakeEncoder(), token_ids="refuse") as client:
        for truncate in ("none", "start", "end"):
            asked = {"input": texts if truncate != "none" else texts[:3], "truncate": truncate}
            found = client.post("/tokenize", json=asked).json()["data"]
            ids = [item["token_ids"] for item in found]
            assert np.array_equal(vectors(embed(client, input=ids)), vectors(embed(client, **asked)))
        whole = client.post("/tokenize", json={"input": texts}).json()["data"]
        ids = [item["token_ids"] for item in whole]
        for truncate in ("start", "end"):  # cut as the text itself, with the special tokens around it
            reply = embed(client, input=ids, truncate=truncate)
            assert np.array_equal(vectors(reply), vectors(embed(client, input=texts, truncate=truncate)))
            assert reply.headers["x-truncated-items"] == "1"
    with client_of(FakeEncoder(), token_ids="accept") as client:
        assert np.array_equal(vectors(embed(client, input=[15, 19])), [vector_of([15, 19])])


def test_the_endpoint_refuses_foreign_token_ids_unless_told_otherwise():
    assert ServingConfig().token_ids == "refuse"


@pytest.mark.parametrize(
    ("before", "after", "ids", "holds"),
    [
        ([1], [], [1, 5], True), ([1], [], [5, 1], False), ([1], [2], [1, 2], True), ([1], [2], [1, 5, 2], True),
        ([1], [2], [1, 5], False), ([1], [2], [1], False), ([], [], [5], True), ([], [2], [5, 2], True), ([], [2], [2, 5], False),
    ],
)  # fmt: skip
def test_what_a_frame_holds(before, after, ids, holds):
    assert Frame(before, after).holds(ids) is holds


def test_cut_ids_keep_the_special_tokens_around_them():
    frame, ids = Frame([1], [2]), [1, 10, 11, 12, 13, 2]
    assert frame.cut(ids, 4, "end") == [1, 10, 11, 2]
    assert frame.cut(ids, 4, "start") == [1, 12, 13, 2]
    assert frame.cut(ids, 6, "end") == frame.cut(ids, 3, "none") == ids
    assert frame.cut([9, 8, 7], 2, "end") == [9, 8]


def test_a_real_tokenizers_own_ids_hold_and_others_do_not(tiny_model):
    encoder = Encoder.load(tiny_model, dtype="float32")
    frame = Frame.of(encoder.tokenizer)
    assert frame.before == [encoder.tokenizer.bos_token_id]
    for side in ("query", "document"):
        for ids in encoder.tokenize(["open a file", " ", "日本語 " * 200, "\x00", "<s></s>"], side):
            assert frame.holds(ids)
            assert given_ids(encoder, Part(side, token_ids=[ids]), "none", True, frame, own_only=True) == [
                ids
            ]
    foreign = [15339, 1917]  # "hello world" in OpenAI's vocabulary
    assert not frame.holds(foreign)


# -- one bad item


def test_white_space_is_a_text_and_sinks_nothing(client, encoder):
    blanks = [" ", "\n\t", "\u3000", "\ufeff", "\x00"]
    texts = ["ab", *blanks, "cd"]
    found = vectors(embed(client, input=texts))
    assert np.array_equal(found, encoder.embed(texts, "document"))
    assert np.array_equal(found[[0, -1]], vectors(embed(client, input=["ab", "cd"])))


@pytest.mark.parametrize(
    ("item", "words"),
    [("", "input[2] is an empty string"), (None, "input[2] is of type null"), (5, "input[2] is of type integer"),
     ("x" * 128, "input[2] has 129 tokens"), ({"text": "a"}, "input[2] is of type object"), (["a"], "input[2] is"),
     ("x" * 300_000, "input[2] has 300000 characters")],
)  # fmt: skip
def test_an_item_that_cannot_be_embedded_is_named(client, item, words):
    error = refused(
        client.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "b", item, "c"]}), 400
    )
    assert error["message"].startswith(words) and error["param"] == "input"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (rb"x \ude00 y", "x \ufffd y"),
        (rb"\ud83d", "\ufffd"),
        (rb"\uD83Dx", "\ufffdx"),
        (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\ude00\ud83d", "\ufffd\ufffd"),
        (rb"\\ud83d", "\\ud83d"),
        (rb"\\\ud83d", "\\\ufffd"),
        (rb"\ud83d\ude00", "\U0001f600"),
        (rb"\ud83d\n\ude00", "\ufffd\n\ufffd"),
        ("größer \\ud83d".encode(), "größer \ufffd"),
    ],
)
def test_half_a_surrogate_pair_becomes_the_replacement_character(client, encoder, written, meant):
    body = b'{"model": "tiny", "input": ["ok", "%s", "\\u00e9\\ud83d\\ude00"]}' % written
    reply = client.post("/v1/embeddings", content=body, headers=JSON)
    assert np.array_equal(vectors(reply), encoder.embed(["ok", meant, "é\U0001f600"], "document"))
    asked = b'{"model": "tiny", "query": "%s", "documents": ["ok", {"text": "%s"}]}' % (written, written)
    assert client.post("/v1/rerank", content=asked, headers=JSON).status_code == 200


def test_bytes_that_are_not_utf8_are_placed(client):
    for body, words in (
        (b'{"model": "tiny", "input": ["ok", "gr\xf6\xdfer"]}', "input[1] holds bytes"),
        (b'{"model": "tiny", "input": "\xff"}', "input holds bytes"),
        (b'{"model": "tiny", "in\xffput": "a"}', "the body is not"),
    ):
        error = refused(client.post("/v1/embeddings", content=body, headers=JSON), 400)
        assert words in error["message"] and "column" not in error["message"]


def test_blank_documents_rank_last_and_change_nothing_for_the_others(client, encoder):
    body = {"model": "tiny", "query": "q", "instruction": "Find"}
    plain = client.post("/v1/rerank", json={**body, "documents": ["ab", "cd", "ef"]}).json()
    mixed = client.post(
        "/v1/rerank", json={**body, "documents": ["", "ab", " \n", "cd", {"text": ""}, "ef"]}
    ).json()
    scores = {item["index"]: item["relevance_score"] for item in plain["results"]}
    order = [item["index"] for item in mixed["results"]]
    assert order == [[1, 3, 5][item["index"]] for item in plain["results"]] + [0, 2, 4]
    assert [item["relevance_score"] for item in mixed["results"][:3]] == [
        scores[n] for n in (order_of(plain))
    ]
    assert [item["relevance_score"] for item in mixed["results"][3:]] == [-1.0] * 3
    assert mixed["usage"] == plain["usage"]
    top = client.post("/v1/rerank", json={**body, "documents": ["", "ab", " "], "top_n": 2}).json()
    assert [item["index"] for item in top["results"]] == [1, 0]
    alone = client.post("/v1/rerank", json={**body, "documents": ["", " "]}).json()
    assert [(item["index"], item["relevance_score"]) for item in alone["results"]] == [(0, -1.0), (1, -1.0)]


def order_of(reply) -> list[int]:
    return [item["index"] for item in reply["results"]]


def test_blank_documents_rank_last_under_scores_that_are_no_cosines():
    class Long(FakeEncoder):
        def embed_tokens(self, token_ids, max_batch_tokens=4096):
            return -3 * super().embed_tokens(token_ids)

    encoder = Long()
    encoder.contract = encoder.contract.model_copy(update={"normalize": False})
    with client_of(encoder) as client:
        body = {"model": "tiny", "query": "q", "instruction": "Find", "documents": ["", *"abcdefg"]}
        results = client.post("/v1/rerank", json=body).json()["results"]
    scores = [item["relevance_score"] for item in results]
    assert results[-1]["index"] == 0 and scores == sorted(scores, reverse=True)
    assert scores[-1] == min(-1.0, scores[-2])


def test_a_bad_document_is_named_by_its_place_in_the_request(client):
    body = {
        "model": "tiny",
        "query": "q",
        "instruction": "Find",
        "documents": ["", "a", "", "x" * 200],
        "truncate": "none",
    }
    assert "documents[3] has 201 tokens" in refused(client.post("/v1/rerank", json=body), 400)["message"]
    body = {**body, "documents": ["a", ""]}
    assert (
        "documents[1] is an empty string" in refused(client.post("/v1/similarity", json=body), 400)["message"]
    )


def test_documents_that_are_objects(client):
    body = {"model": "tiny", "query": "q", "instruction": "Find"}
    documents = [{"text": "ab", "title": "cd", "id": 7}, {"text": "ef"}]
    found = client.post("/v1/rerank", json={**body, "documents": documents, "return_documents": True}).json()
    plain = client.post("/v1/rerank", json={**body, "documents": ["ab", "ef"]}).json()
    assert [(item["index"], item["relevance_score"]) for item in found["results"]] == [
        (item["index"], item["relevance_score"]) for item in plain["results"]
    ]
    assert [item["document"] for item in found["results"]] == [documents[n] for n in order_of(found)]
    fields = client.post(
        "/v1/rerank", json={**body, "documents": documents, "rank_fields": ["title", "text"]}
    ).json()
    joined = client.post("/v1/rerank", json={**body, "documents": ["cd ab", "ef"]}).json()
    assert fields["results"] == joined["results"]


# -- fields, paths and headers of other people


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"normalized": True, "late_chunking": False, "embedding_type": "float"}),
        ("/v1/embeddings", {"output_dtype": "float", "output_dimension": 8, "truncation": True}),
        ("/embeddings", {"modality": "text", "add_special_tokens": True, "priority": 0, "drop_params": True}),
        (
            "/v1/rerank",
            {"max_tokens_per_doc": 4096, "max_chunks_per_doc": 10, "rank_fields": ["text"], "priority": 0},
        ),
        ("/v2/rerank", {"max_tokens_per_doc": 4096, "return_documents": True, "raw_scores": False}),
        ("/rerank", {"raw_scores": True, "overlap_tokens": 80, "top_k": 1, "truncation": True}),
    ],
)
def test_harmless_fields_of_other_dialects_change_nothing(client, path, fields):
    least = LEAST["EmbeddingsRequest" if "embeddings" in path else "RerankRequest"]
    plain, found = (client.post(path, json={**least, **more}) for more in ({}, fields))
    assert found.status_code == 200, found.text
    if "data" in plain.json():
        assert found.json() == plain.json()
    else:
        assert [item["relevance_score"] for item in found.json()["results"]] == [
            item["relevance_score"] for item in plain.json()["results"]
        ]


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("input_typ", "input_type"), ("intruction", "instruction"), ("truncat", "truncate"), ("dimension", "dimensions"),
        ("normalize", None), ("timeout", None), ("temperature", None), ("x", None), ("", None), ("stream", None),
    ],
)  # fmt: skip
def test_an_unknown_field_is_named_and_a_hint_is_near(client, field, near):
    error = refused(client.post("/v1/embeddings", json={"model": "tiny", "input": "a", field: 1}), 400)
    assert error["param"] == field and error["message"].startswith(f"{field}: unknown parameter")
    if near:
        assert error["message"].endswith(f"the nearest valid one is {near!r}")
    else:
        assert "nearest" not in error["message"] and "allowed: task, instruction" in error["message"]


@pytest.mark.parametrize("prefix", ["", "/root"])
@pytest.mark.parametrize(
    "path", ["/v1/embeddings/", "/v1//embeddings", "//v1/embeddings", "/v1/embeddings//", "/embeddings"]
)
def test_paths_that_mean_one_route_are_answered(encoder, prefix, path):
    from starlette.testclient import TestClient

    with TestClient(api_of(encoder), root_path=prefix) as client:
        reply = client.post(f"http://t{prefix}{path}", json={"model": "tiny", "input": "a"})
        assert reply.status_code == 200, reply.text
        assert client.get(f"http://t{prefix}/v1/models/").json()["object"] == "list"
        assert client.get(f"http://t{prefix}/models").json()["object"] == "list"
        assert client.get(f"http://t{prefix}/").headers["content-type"].startswith("text/html")
        assert (
            'path="/v1/embeddings"' in client.get(f"http://t{prefix}/metrics/").text or path == "/embeddings"
        )


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/v1/embeddings", "/v1/embeddings"), ("/api/v1/rerank", "/v1/rerank"), ("/v1/tokenize", "/tokenize"),
        ("/v1/v1/models", "/v1/models"), ("/openai/deployments/x/embeddings", "/embeddings"), ("/v3/rerank", "/rerank"),
    ],
)  # fmt: skip
def test_other_paths_are_answered_with_a_hint(client, path, meant):
    message = refused(client.post(path, json={}), 404)["message"]
    assert f"did you mean {meant}?" in message
    assert ("ends with /v1 once" in message) == ("/v1/v1" in path)


@pytest.mark.parametrize(
    ("path", "key"),
    [("/v1/search", "serving.corpus"), ("/v1/files", "batches.folder"), ("/v1/batches", "batches.folder")],
)
def test_what_was_not_set_up_says_what_sets_it_up(client, path, key):
    assert key in refused(client.post(path, json={}), 404)["message"]


def test_a_path_that_is_like_none_gets_no_hint(client):
    for path in ("/v1/chat/completions", "/nothing", "/v3/", "/etc/passwd"):
        assert "did you mean" not in refused(client.post(path, json={}), 404)["message"]


KEY = "sk-of-these-tests"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200), ({"authorization": f"BEARER {KEY}"}, 200),
        ({"authorization": f"bearer  {KEY} "}, 200), ({"AUTHORIZATION": f"bEaReR\t{KEY}"}, 200),
        ({"api-key": KEY}, 200), ({"API-KEY": f" {KEY} "}, 200), ({"x-api-key": KEY}, 200),
        ({"api-key": KEY, "authorization": "Basic abc"}, 200), ({"api-key": "other", "authorization": f"Bearer {KEY}"}, 200),
        ({"api-key": "other"}, 401), ({"api-key": ""}, 401), ({"authorization": KEY}, 401), ({"authorization": "Bearer "}, 401),
        ({"authorization": f"Basic {KEY}"}, 401), ({"api-key": "other", "authorization": "Bearer none"}, 401), ({}, 401),
    ],
)  # fmt: skip
def test_a_key_comes_in_any_of_its_headers(headers, status):
    keys = (ApiKey(name="tests", sha256=hashlib.sha256(KEY.encode()).hexdigest()),)
    with client_of(FakeEncoder(), keys=keys) as client:
        reply = client.post("/v1/embeddings", json={"model": "tiny", "input": "a"}, headers=headers)
        assert reply.status_code == status, reply.text


STAINLESS = [
    f"x-stainless-{name}"
    for name in (
        "os",
        "arch",
        "lang",
        "runtime",
        "runtime-version",
        "package-version",
        "retry-count",
        "timeout",
    )
]


@pytest.mark.parametrize(
    "asked",
    [STAINLESS, ["authorization", "content-type"], ["openai-organization", "openai-project"], ["api-key", "x-api-key"],
     ["idempotency-key", "user-agent", "x-client-name", "x-fern-language", "x-contract-hash", "x-request-id"]],
)  # fmt: skip
def test_a_preflight_of_an_allowed_origin_allows_what_sdks_send(asked):
    origin = "https://page.example.org"
    with client_of(FakeEncoder(), allowed_origins=(origin,)) as client:
        headers = {
            "origin": origin, "access-control-request-method": "POST", "access-control-request-headers": ",".join(asked),
        }  # fmt: skip
        reply = client.options("/v1/embeddings", headers=headers)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
        allowed = {name.strip().lower() for name in reply.headers["access-control-allow-headers"].split(",")}
        assert set(asked) <= allowed
        stranger = client.options("/v1/embeddings", headers={**headers, "origin": "https://evil.example.org"})
        assert stranger.status_code == 400 and "access-control-allow-origin" not in stranger.headers
        read = client.post("/v1/embeddings", json={"model": "tiny", "input": "a"}, headers={"origin": origin})
        assert "x-truncated-items" in read.headers["access-control-expose-headers"]


# -- recorded requests of clients


def test_a_served_name_of_null_fields_as_litellm_sends_them(client, encoder):
    reply = embed(
        client, input="a", encoding_format=None, dimensions=None, user=None, truncate=None, input_type=None
    )
    assert np.array_equal(vectors(reply), encoder.embed(["a"], "document"))


def test_base64_of_an_unnormalised_models_vectors_at_unit_length():
    class Long(FakeEncoder):
        def embed_tokens(self, token_ids, max_batch_tokens=4096):
            return 3 * super().embed_tokens(token_ids)

    encoder = Long()
    encoder.contract = encoder.contract.model_copy(update={"normalize": False})
    with client_of(encoder) as client:
        packed = embed(client, normalized=True, encoding_format="base64").json()["data"][0]["embedding"]
        assert math.isclose(np.linalg.norm(np.frombuffer(base64.b64decode(packed), "<f4")), 1.0, abs_tol=1e-6)
        assert math.isclose(np.linalg.norm(vectors(embed(client))[0]), 3.0, abs_tol=1e-5)
