import base64
import concurrent.futures
import json
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from embedloom.serving.api import create_api
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.schemas import EmbeddingsResponse
from fakes_serving import FakeEncoder, client_of, refused, service_of, settings_of, vector_of


@pytest.fixture
def encoder():
    return FakeEncoder()


@pytest.fixture
def client(encoder):
    with client_of(encoder) as client:
        yield client


def post(client, **body):
    return client.post("/v1/embeddings", json={"model": "tiny", **body})


def test_vectors_equal_the_encoders_own(client, encoder):
    reply = post(client, input=["ab", "cd"], input_type="query", instruction="Find")
    assert reply.status_code == 200
    body = EmbeddingsResponse.model_validate(reply.json())
    assert [item.index for item in body.data] == [0, 1]
    got = np.array([item.embedding for item in body.data], dtype=np.float32)
    assert np.array_equal(got, encoder.embed(["ab", "cd"], "query", instruction="Find"))
    assert body.model == "tiny"
    assert body.usage.prompt_tokens == body.usage.total_tokens == 2 * (1 + len("Instruct: Find\nQuery: ab"))
    assert reply.headers["x-contract-hash"] == encoder.contract.hash


def test_base64_and_float_are_the_same_numbers(client):
    numbers = post(client, input="ab").json()["data"][0]["embedding"]
    packed = post(client, input="ab", encoding_format="base64").json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.array(numbers, dtype=np.float32))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", np.int8), ("uint8", np.uint8), ("binary", np.int8), ("ubinary", np.uint8)]
)
def test_other_types_come_by_either_name_and_as_base64_of_their_bytes(client, kind, dtype):
    body = post(client, input=["ab", "cd"], output_dtype=kind).json()
    EmbeddingsResponse.model_validate(body)
    numbers = [item["embedding"] for item in body["data"]]
    other = "ubinary" if kind == "binary" else "binary"  # output_dtype holds, as its description says
    both = {"encoding_format": other, "output_dtype": kind}
    for asked in ({"encoding_format": kind}, {"embedding_type": kind}, both):
        assert post(client, input=["ab", "cd"], **asked).json() == body
    floats = post(client, input=["ab", "cd"], output_dtype="float", encoding_format=kind).json()
    assert floats == post(client, input=["ab", "cd"]).json()
    packed = post(client, input=["ab", "cd"], output_dtype=kind, encoding_format="base64").json()["data"]
    # As voyageai's client reads them.
    assert [np.frombuffer(base64.b64decode(item["embedding"]), dtype).tolist() for item in packed] == numbers
    plain = np.array([item["embedding"] for item in post(client, input=["ab", "cd"]).json()["data"]])
    if kind in ("int8", "uint8"):
        scales = np.array([[item["scale"]] for item in body["data"]])
        assert (
            np.abs((np.array(numbers) - 128 * (kind == "uint8")) * scales - plain).max()
            <= scales.max() / 2 + 1e-6
        )
    else:
        bits = np.packbits(plain > 0, axis=1).astype(int)
        assert numbers == (bits - (128 if kind == "binary" else 0)).tolist()
        assert "scale" not in body["data"][0]


def test_a_type_is_of_the_dimensions_that_are_asked_for():
    asked = {"input": "ab", "dimensions": 4, "normalized": True}
    with client_of(FakeEncoder(matryoshka=[4, 8])) as client:
        short = post(client, **asked).json()["data"][0]["embedding"]
        values = post(client, **asked, output_dtype="int8").json()["data"][0]
        error = refused(post(client, **asked, output_dtype="binary"), 400)
    assert np.allclose(
        np.array(values["embedding"]) * values["scale"], short, atol=values["scale"] / 2 + 1e-6
    )
    assert error["param"] == "output_dtype" and "these vectors have 4" in error["message"]


def test_token_ids_go_to_the_model_unchanged(client):
    reply = post(client, input=[[5, 6], [7]])
    got = np.array([item["embedding"] for item in reply.json()["data"]], dtype=np.float32)
    assert np.array_equal(got, np.stack([vector_of([5, 6]), vector_of([7])]))
    assert reply.json()["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"input": ""}, 400, "input", None),
        ({"input": []}, 400, "input", None),
        ({"input": ["a"] * 9}, 400, "input", "too_many_items"),
        ({"input": "a", "model": "gpt"}, 404, "model", "model_not_found"),
        ({"input": 7}, 400, "input", None),
        ({"input": "x" * 100}, 400, "input", "context_length_exceeded"),
        ({"input": [9999]}, 400, "input", "invalid_token_id"),
        ({"input": "a", "dimensions": 4}, 400, "dimensions", "dimensions_not_available"),
    ],
)
def test_bad_requests_name_the_field(client, body, status, param, code):
    error = refused(post(client, **body), status)
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


def test_limits_are_named(client):
    assert "at most 8" in refused(post(client, input=["a"] * 9), 400)["message"]
    assert "allowed: 'tiny'" in refused(post(client, input="a", model="x"), 404)["message"]
    assert (
        "allowed: 8 (the model was not trained for shorter ones)"
        in refused(post(client, input="a", dimensions=4), 400)["message"]
    )


def test_dimensions_of_a_matryoshka_model():
    with client_of(FakeEncoder(matryoshka=[4, 8])) as client:
        full = np.array(post(client, input="ab").json()["data"][0]["embedding"])
        short = np.array(post(client, input="ab", dimensions=4).json()["data"][0]["embedding"])
        assert np.allclose(short, full[:4] / np.linalg.norm(full[:4]), atol=1e-6)
        assert "allowed: 4, 8" in refused(post(client, input="ab", dimensions=5), 400)["message"]


def test_full_dimension_is_always_allowed(client):
    assert len(post(client, input="ab", dimensions=8).json()["data"][0]["embedding"]) == 8


@pytest.mark.parametrize("method", ["get", "put", "delete"])
def test_wrong_method_and_path_are_openai_shaped(client, method):
    refused(getattr(client, method)("/v1/embeddings"), 405)
    refused(getattr(client, method)("/v1/nothing"), 404)


def test_models_list_carries_contract_and_fingerprint(client, encoder):
    (card,) = client.get("/v1/models").json()["data"]
    assert card == client.get("/v1/models/tiny").json()
    assert (card["id"], card["object"], card["fingerprint"]) == ("tiny", "model", "f00d")
    assert card["contract_hash"] == encoder.contract.hash
    assert (card["dimension"], card["max_query_tokens"], card["matryoshka_dimensions"]) == (8, 64, [])
    refused(client.get("/v1/models/other"), 404)


def test_a_served_name_may_hold_a_slash():
    with client_of(FakeEncoder(), served_name="org/tiny") as client:
        assert client.get("/v1/models/org/tiny").json()["id"] == "org/tiny"
        assert client.get("/v1/models/org%2Ftiny").json()["id"] == "org/tiny"


def test_full_endpoint_answers_429_with_retry_after(client, encoder):
    encoder.gate.clear()
    post_one = lambda: post(client, input="ab")  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        replies = [pool.submit(post_one) for _ in range(12)]
        deadline = time.monotonic() + 10
        while sum(reply.done() for reply in replies) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        encoder.gate.set()
        answers = [reply.result() for reply in replies]
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 4 + [429] * 8  # four places, as configured
    full = next(answer for answer in answers if answer.status_code == 429)
    assert refused(full, 429)["code"] == "overloaded"
    assert full.headers["retry-after"] == "1"
    assert post(client, input="ab").status_code == 200


def test_a_request_that_takes_too_long_is_given_up():
    encoder = FakeEncoder(delay_seconds=0.5)
    with client_of(encoder, request_timeout_seconds=0.05) as client:
        assert refused(post(client, input="ab"), 504)["code"] == "timeout"


def test_inner_failures_show_no_trace(client, encoder, caplog):
    encoder.failure = RuntimeError("secret path /srv/x")
    reply = post(client, input="ab")
    error = refused(reply, 500)
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text
    assert reply.headers["x-request-id"] in error["message"]
    assert "secret path" in caplog.text
    encoder.failure = None
    assert post(client, input="ab").status_code == 200


def test_every_reply_has_one_request_id(client, encoder):
    assert len(client.get("/health").headers["x-request-id"]) == 32
    # A request with an id came through Serve's proxy, which stamps the reply itself.
    encoder.failure = RuntimeError("down")
    reply = client.post(
        "/v1/embeddings", json={"model": "tiny", "input": "a"}, headers={"x-request-id": "abc-1"}
    )
    assert "abc-1" in refused(reply, 500)["message"]
    assert "x-request-id" not in reply.headers


def test_large_bodies_are_refused_declared_or_not():
    limit = 2**20
    with client_of(FakeEncoder(), max_body_bytes=limit) as client:
        text = b'{"model": "tiny", "input": "' + b"x" * limit + b'"}'
        headers = {"content-type": "application/json"}
        refused(client.post("/v1/embeddings", content=text, headers=headers), 413)
        pieces = (text[i : i + 2**16] for i in range(0, len(text), 2**16))
        refused(client.post("/v1/embeddings", content=pieces, headers=headers), 413)


def test_health_ready_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["status"] == "ready"
    post(client, input=["ab", "cdef"])
    post(client, input="")
    client.get("/somewhere/else")
    text = client.get("/metrics").text
    for line in (
        'embedloom_requests_total{path="/v1/embeddings",status="200"} 1.0',
        'embedloom_requests_total{path="/v1/embeddings",status="400"} 1.0',
        'embedloom_requests_total{path="other",status="404"} 1.0',
        'embedloom_tokens_total{side="document"} 8.0',
        "embedloom_batch_texts_sum 2.0",
        "embedloom_batch_tokens_sum 8.0",
        "embedloom_request_items_sum 2.0",
        'embedloom_request_duration_seconds_count{path="/health"} 1.0',
        'embedloom_queue_duration_seconds_count{lane="query"} 1.0',
    ):
        assert line in text, line


def test_inputs_that_are_cut_are_counted(client):
    """A token is a byte and a document has 64."""
    assert "embedloom_truncated_items_total 0.0" in client.get("/metrics").text
    assert (
        post(client, input=["a" * 100, "b", "c" * 200], truncate="end").json()["usage"]["truncated_items"]
        == 2
    )
    assert "embedloom_truncated_items_total 2.0" in client.get("/metrics").text


def test_not_ready_while_no_encoder_answers():
    class Broken:
        async def describe(self):
            raise ConnectionError("down")

        async def encode(self, job):
            raise ConnectionError("down")

    settings = EndpointSettings(
        served_name="t", fingerprint="f", created=0, max_items=1, max_requests=1, request_timeout_seconds=1
    )
    with TestClient(create_api(Broken(), settings), raise_server_exceptions=False) as client:
        assert client.get("/health").status_code == 200
        assert refused(client.get("/ready"), 503)["code"] == "not_ready"


class Counted:
    """Encoders elsewhere: so many are up; counts who asks one of them."""

    def __init__(self, up: int) -> None:
        self.up, self.asked = up, 0
        self.service = service_of(FakeEncoder())

    async def replicas(self) -> int:
        return self.up

    async def describe(self):
        self.asked += 1
        return await self.service.describe()


@pytest.mark.parametrize(
    ("up", "least", "status"), [(0, 0, 200), (2, 0, 200), (2, 1, 200), (0, 1, 503)], ids=str
)
def test_readiness_counts_the_encoders_and_asks_none(up, least, status):
    backend = Counted(1)
    with TestClient(create_api(backend, settings_of(min_replicas=least))) as client:
        assert client.get("/ready").json()["replicas"] == 1  # what the model is, is asked once
        backend.up = up
        for method, path in [("GET", "/ready"), ("HEAD", "/ready"), ("GET", "/v1/models"), ("HEAD", "/v1/models"),
                             ("GET", "/v1/models/tiny"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/"),
                             ("OPTIONS", "/ready"), ("GET", "/openapi.json")] * 3:  # fmt: skip
            client.request(method, path)
        reply = client.get("/ready")
        assert reply.status_code == status
        if status == 200:
            assert reply.json()["replicas"] == up
        else:
            assert refused(reply, 503)["code"] == "not_ready"
    assert backend.asked == 1


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_a_body_must_call_itself_json(client, kind):
    body = json.dumps({"model": "tiny", "input": "ab"}).encode()
    headers = {"content-type": kind} if kind else {}
    error = refused(client.post("/v1/embeddings", content=body, headers=headers), 415)
    assert "application/json" in error["message"]


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"]
)
def test_any_spelling_of_json_is_taken(client, kind):
    body = json.dumps({"model": "tiny", "input": "ab"}).encode()
    assert client.post("/v1/embeddings", content=body, headers={"content-type": kind}).status_code == 200
