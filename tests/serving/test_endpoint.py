"""The endpoint on Ray Serve, asked over HTTP by the official client."""

import base64
import concurrent.futures
import hashlib
import os
import signal
import socket
import uuid

import httpx
import numpy as np
import openai
import psutil
import pytest

from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ServingConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.embed import vector_table
from embedloom.serving.stage import Endpoint, check_port_free, start_endpoint
from fakes import make_tiny_encoder

pytestmark = pytest.mark.ray
KEY = "sk-of-these-tests"
DOCUMENTS = [f"document number {number}" for number in range(20)]
TEXTS = ["open a file", "Returns the shortest path between two nodes.", "größer, 日本語"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(model, port: int | None = None, scaling: ServeScaling | None = None, **serving) -> Endpoint:
    config = ServingConfig(port=port or free_port(), compute_dtype="float32", require_gate=False, **serving)
    return start_endpoint(config, model, "f00d", "tiny", scaling or ServeScaling(threads=1))


def client_of(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, max_retries=0)


def cosines(reply, expected: np.ndarray) -> np.ndarray:
    got = np.array([item.embedding for item in reply.data])
    return (got * expected).sum(axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.fixture(scope="module")
def corpus(tiny_model, tmp_path_factory):
    """Vectors of ``DOCUMENTS``, cut to their first sixteen dimensions."""
    place = Place(str(tmp_path_factory.mktemp("corpus") / "vectors"))
    vectors = Encoder.load(tiny_model, dtype="float32").embed(DOCUMENTS, "document")[:, :16]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    contract, model = PromptContract.load(tiny_model).hash, ModelFolder(tiny_model).id
    ids = [f"d{number:02d}" for number in range(20)]
    writer = ArtefactWriter(place, "vectors", "c", {"corpus": "x"}, "local")
    place.write_table("vectors/part-000000.parquet", vector_table(ids, vectors, contract, model, 1))
    writer.commit({"rows": 20}, {"contract_hash": contract, "model_id": model})
    return place.uri


@pytest.fixture(scope="module")
def endpoint(ray_local, tiny_model, corpus):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_KEYS", f"tests: {{sha256: {hashlib.sha256(KEY.encode()).hexdigest()}}}")
        with start(tiny_model, corpus=corpus, keys_variable="TEST_KEYS") as endpoint:
            yield endpoint


def test_port_in_use_stops_before_anything_starts(ray_local, tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serving\.port: {port} is in use"):
            start(tiny_model, port)


@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
def test_openai_client_gets_the_encoders_vectors(endpoint, tiny_model, encoding_format):
    encoder = Encoder.load(tiny_model, dtype="float32")
    options = {} if encoding_format is None else {"encoding_format": encoding_format}
    for side in ("document", "query"):
        reply = client_of(endpoint).embeddings.create(
            model="tiny", input=TEXTS, extra_body={"input_type": side, "truncate": "end"}, **options
        )
        if encoding_format == "base64":
            for item in reply.data:
                item.embedding = np.frombuffer(base64.b64decode(item.embedding), "<f4").tolist()
        assert (cosines(reply, encoder.embed(TEXTS, side)) >= 0.9999).all()
        assert reply.usage.prompt_tokens == sum(map(len, encoder.tokenize(TEXTS, side)))


def test_client_sees_openai_errors(endpoint):
    client = client_of(endpoint)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="other", input="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model="tiny", input="x" * 500)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model="tiny", input="")
    assert empty.value.param == "input"
    assert uuid.UUID(empty.value.request_id)  # one id, not two joined


def test_client_lists_the_model(endpoint, tiny_model):
    (card,) = client_of(endpoint).models.list().data
    assert (card.id, card.fingerprint) == ("tiny", "f00d")
    assert card.contract_hash == Encoder.load(tiny_model).contract.hash


def test_search_is_brute_force_over_the_corpus(endpoint, tiny_model, corpus):
    encoder = Encoder.load(tiny_model, dtype="float32")
    body = {"query": "number 7", "top_k": 5, "instruction": "Find"}
    headers = {"authorization": f"Bearer {KEY}"}
    reply = httpx.post(f"{endpoint.url}/v1/search", json=body, headers=headers, trust_env=False).json()
    query = encoder.embed(["number 7"], "query", instruction="Find")[0, :16]
    documents = encoder.embed(DOCUMENTS, "document")[:, :16]
    scores = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
    assert [hit["id"] for hit in reply["results"]] == [f"d{row:02d}" for row in np.argsort(-scores)[:5]]
    assert np.allclose([hit["score"] for hit in reply["results"]], np.sort(scores)[::-1][:5], atol=1e-4)


def test_without_the_key_nothing_but_health_and_the_page_is_answered(endpoint):
    def status(path: str) -> int:
        return httpx.get(f"{endpoint.url}{path}", trust_env=False).status_code

    paths = ("/", "/health", "/v1/models", "/metrics")
    assert [status(path) for path in paths] == [200, 200, 401, 401]
    stranger = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="sk-other", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.embeddings.create(model="tiny", input="a")
    assert refused.value.code == "invalid_api_key"


def test_a_corpus_of_other_weights_stops_before_anything_starts(ray_local, tiny_llama, corpus, tmp_path):
    other = make_tiny_encoder(tiny_llama, tmp_path)
    (other / "added.json").write_text("{}")
    with pytest.raises(DataError, match=r"serving\.corpus: .* vectors of different weights"):
        start(other, corpus=corpus)


def test_many_clients_at_once_each_get_their_own(endpoint, tiny_model):
    encoder = Encoder.load(tiny_model, dtype="float32")
    texts = [f"function number {n} " * (1 + n % 3) for n in range(60)]
    client = client_of(endpoint)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = list(
            pool.map(
                lambda text: client.embeddings.create(
                    model="tiny", input=text, extra_body={"truncate": "end"}
                ),
                texts,
            )
        )
    expected = encoder.embed(texts, "document")
    for reply, vector in zip(replies, expected, strict=True):
        assert cosines(reply, vector[None])[0] >= 0.9999


@pytest.fixture(scope="module")
def behind_gateway(ray_local, tiny_model, endpoint):
    endpoint.stop()  # two Serve applications at once would be one too many for a small machine
    scaling = ServeScaling(min_replicas=1, max_replicas=2, target_ongoing_requests=2, threads=1)
    limits = {"max_ongoing_requests": 2, "max_queued_requests": 2}
    with start(tiny_model, scaling=scaling, route_prefix="/embed", **limits) as endpoint:
        yield endpoint


@pytest.mark.slow
def test_overload_is_answered_200_or_429(behind_gateway):
    body = {"model": "tiny", "input": ["some text " * 6] * 256}
    client = httpx.Client(trust_env=False, timeout=120)

    def ask(_: int) -> httpx.Response:
        return client.post(f"{behind_gateway.url}/v1/embeddings", json=body)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(ask, range(48)))
    assert {reply.status_code for reply in replies} == {200, 429}
    for reply in replies:
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "overloaded"


@pytest.mark.slow
def test_killed_encoder_behind_the_gateway_loses_no_request(behind_gateway):
    client = client_of(behind_gateway)

    def ask(number: int) -> int:
        if number == 20:
            os.kill(_pid_of(":encoder"), signal.SIGKILL)
        return len(client.embeddings.create(model="tiny", input=f"text {number}").data)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(60))) == [1] * 60


def _pid_of(name: str) -> int:
    """Process of this test session's own Ray whose title holds ``name``."""
    for process in psutil.Process().children(recursive=True):
        if name in " ".join(process.cmdline()):
            return process.pid
    raise AssertionError(f"no process {name}")


@pytest.mark.slow
def test_stop_lets_a_running_request_finish_and_frees_the_port(behind_gateway):
    client = client_of(behind_gateway)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.embeddings.create, model="tiny", input=["some text " * 6] * 2048)
        while "embedloom_requests_ongoing 2.0" not in _metrics(behind_gateway):  # it, and this scrape
            assert not running.done(), running.result()
        behind_gateway.stop()
        assert len(running.result(60).data) == 2048
    check_port_free("127.0.0.1", int(behind_gateway.url.split(":")[2].split("/")[0]))


def _metrics(endpoint: Endpoint) -> str:
    return httpx.get(f"{endpoint.url}/metrics", trust_env=False).text
