"""Several models behind one endpoint: each answers to its own names, to the keys that may use it."""

import hashlib

import numpy as np
import pytest
from starlette.testclient import TestClient

from embedloom.config.base import validate
from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ApplicationArgs, ModelAlias, ServingConfig
from embedloom.errors import ConfigError, DataError
from embedloom.serving.api import create_api
from embedloom.serving.app import batch_parts, build_application
from embedloom.serving.front import ApiKey
from embedloom.serving.members import Member
from embedloom.serving.schemas import CorpusCard, SearchHit
from fakes_serving import FakeEncoder, refused, service_of, settings_of


class OneDocument:
    """A corpus that always finds the same."""

    card = CorpusCard(documents=1, dimension=8, index="exact", texts=True)
    contract_hash = FakeEncoder(limit=128).contract.hash

    def search(self, query, count, with_texts, words=None):
        return [SearchHit(id="d", score=0.5)]


class OtherEncoder(FakeEncoder):
    """Vectors of the other sign."""

    def embed_tokens(self, token_ids, max_batch_tokens=4096):
        return -super().embed_tokens(token_ids, max_batch_tokens)


KEYS = tuple(
    ApiKey(name=name, sha256=hashlib.sha256(f"sk-{name}".encode()).hexdigest()) for name in ("both", "first")
)


def endpoint_of(keys=(), allowed=None, served_allowed=None, **options) -> TestClient:
    first, second = FakeEncoder(limit=128), OtherEncoder(limit=100, matryoshka=[4])
    member = Member(
        service_of(second),
        settings_of(
            served_name="org/other",
            fingerprint="beef",
            models={"other-query": ModelAlias(side="query")},
            allowed_keys=allowed,
        ),
    )
    settings = settings_of(
        keys=keys, models={"tiny-query": ModelAlias(side="query")}, allowed_keys=served_allowed
    )
    api = create_api(service_of(first), settings, further=[member], **options)
    return TestClient(api, raise_server_exceptions=False)


def vectors(reply) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return np.array([item["embedding"] for item in reply.json()["data"]], dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "encoder", "side"),
    [("tiny", FakeEncoder, "document"), ("tiny-query", FakeEncoder, "query"),
     ("org/other", OtherEncoder, "document"), ("other-query", OtherEncoder, "query")],
)  # fmt: skip
def test_a_request_is_answered_by_the_model_it_names(name, encoder, side):
    with endpoint_of() as client:
        reply = client.post("/v1/embeddings", json={"model": name, "input": ["ab", "cde"]})
        own = encoder(limit=128)
        expected = (-1 if encoder is OtherEncoder else 1) * FakeEncoder(limit=128).embed(["ab", "cde"], side)
        assert own and np.array_equal(vectors(reply), expected)
        assert reply.json()["model"] == name


def test_limits_and_dimensions_are_each_models_own():
    with endpoint_of() as client:
        long = {"input": "x" * 110}
        vectors(client.post("/v1/embeddings", json={"model": "tiny", **long}))
        error = refused(client.post("/v1/embeddings", json={"model": "org/other", **long}), 400)
        assert error["code"] == "context_length_exceeded"
        vectors(client.post("/v1/embeddings", json={"model": "org/other", "input": "a", "dimensions": 4}))
        error = refused(
            client.post("/v1/embeddings", json={"model": "tiny", "input": "a", "dimensions": 4}), 400
        )
        assert error["code"] == "dimensions_not_available"


def test_every_route_with_a_body_finds_the_model():
    with endpoint_of() as client:
        for path, body in {
            "/v1/rerank": {"query": "a", "documents": ["b", "c"]},
            "/v2/rerank": {"query": "a", "documents": ["b", "c"]},
            "/v1/similarity": {"query": "a", "documents": ["b", "c"]},
            "/v1/embed": {"texts": ["a"], "input_type": "search_query"},
            "/tokenize": {"input": ["a"]},
            "/embeddings": {"input": ["a"]},
        }.items():
            reply = client.post(path, json={"model": "org/other", **body})
            assert reply.status_code == 200, (path, reply.text)
            refused(client.post(path, json={"model": "nobody", **body}), 404)
        # TEI's have no model: the served one answers.
        assert client.post("/embed", json={"inputs": "x" * 110}).status_code == 200
        assert client.get("/info").json()["model_id"] == "tiny"


def test_the_corpus_is_the_served_models():
    with endpoint_of(corpus=OneDocument()) as client:
        assert client.post("/v1/search", json={"query": "a"}).status_code == 200
        assert client.post("/v1/search", json={"query": "a", "model": "tiny"}).status_code == 200
        error = refused(client.post("/v1/search", json={"query": "a", "model": "org/other"}), 404)
        assert "'org/other' does not answer /v1/search; allowed: 'tiny'" in error["message"]
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert cards["tiny"]["corpus"]["documents"] == 1 and cards["org/other"]["corpus"] is None


def test_models_are_listed_and_unknown_ones_refused_as_openai_does():
    with endpoint_of() as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["tiny", "tiny-query", "org/other", "other-query"]
        assert [card["fingerprint"] for card in cards] == ["f00d", "f00d", "beef", "beef"]
        assert client.get("/v1/models/org/other").json() == cards[2]
        error = refused(client.post("/v1/embeddings", json={"model": "gpt", "input": "a"}), 404)
        assert error["message"].startswith("The model 'gpt' does not exist or you do not have access to it")
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        refused(client.get("/v1/models/gpt"), 404)
        document = client.get("/openapi.json").json()
        named = document["components"]["schemas"]["EmbeddingsRequest"]["properties"]["model"]["enum"]
        assert named == ["tiny", "tiny-query", "org/other", "other-query"]
        assert client.get("/ready").json()["model"] == "tiny"


def test_a_key_sees_and_asks_only_the_models_that_it_may_use():
    with endpoint_of(KEYS, allowed=("both",)) as client:

        def ask(key, model):
            headers = {"authorization": f"Bearer sk-{key}"}
            return client.post("/v1/embeddings", json={"model": model, "input": "a"}, headers=headers)

        def listed(key):
            found = client.get("/v1/models", headers={"authorization": f"Bearer sk-{key}"}).json()["data"]
            return [card["id"] for card in found]

        assert [ask("both", name).status_code for name in ("tiny", "org/other", "other-query")] == [200] * 3
        assert listed("both") == ["tiny", "tiny-query", "org/other", "other-query"]
        assert ask("first", "tiny").status_code == 200 and listed("first") == ["tiny", "tiny-query"]
        for name in ("org/other", "other-query", "nobody"):
            error = refused(ask("first", name), 404)
            # One that is not there and one that is not for this key look alike.
            assert error["message"].replace(name, "X") == refused(ask("first", "zz"), 404)["message"].replace(
                "zz", "X"
            )
            assert "org/other'," not in error["message"].partition("allowed")[2]
        reply = client.get("/v1/models/org/other", headers={"authorization": "Bearer sk-first"})
        refused(reply, 404)


def test_without_a_model_the_first_one_that_the_key_may_use_answers():
    with endpoint_of(KEYS, served_allowed=("both",)) as client:
        for key, name in (("both", "tiny"), ("first", "org/other")):
            reply = client.post("/tokenize", json={"input": ["a"]}, headers={"api-key": f"sk-{key}"})
            assert reply.json()["model"] == name
    with endpoint_of(KEYS, served_allowed=("both",), allowed=("both",)) as client:
        refused(client.post("/tokenize", json={"input": ["a"]}, headers={"api-key": "sk-first"}), 404)
        assert client.get("/v1/models", headers={"api-key": "sk-first"}).json()["data"] == []


def test_one_model_may_be_for_some_keys_only():
    api = create_api(service_of(FakeEncoder()), settings_of(keys=KEYS, allowed_keys=("both",)))
    with TestClient(api) as client:
        body = {"model": "tiny", "input": "a"}
        assert client.post("/v1/embeddings", json=body, headers={"api-key": "sk-both"}).status_code == 200
        refused(client.post("/v1/embeddings", json=body, headers={"api-key": "sk-first"}), 404)


def test_bodies_are_refused_as_ever():
    with endpoint_of() as client:
        refused(
            client.post("/v1/embeddings", content=b"{", headers={"content-type": "application/json"}), 400
        )
        refused(client.post("/v1/embeddings", content=b"x"), 415)
        for body in ([], "a", {"input": "a"}, {"model": 7, "input": "a"}, {"model": "", "input": "a"}):
            refused(client.post("/v1/embeddings", json=body), 400)


def test_many_clients_at_once_get_their_own_models_vectors():
    """64 at a time, of both models in turn."""
    import concurrent.futures

    with endpoint_of(KEYS) as client:
        client.app  # noqa: B018 - built before the threads ask

        def ask(number):
            name = ("tiny", "org/other")[number % 2]
            for _ in range(50):
                reply = client.post(
                    "/v1/embeddings",
                    json={"model": name, "input": f"n{number}"},
                    headers={"api-key": "sk-both"},
                )
                if reply.status_code != 429:
                    break
            return name, f"n{number}", vectors(reply)[0]

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            for name, text, found in pool.map(ask, range(128)):
                sign = 1 if name == "tiny" else -1
                assert np.array_equal(found, sign * FakeEncoder(limit=128).embed([text], "document")[0])


# -- the config


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"a": {"model": "m", "side": "query"}}, "side goes with another name of a model"),
        ({"a": {"keys": ["k"]}}, "keys goes with model, which is not given"),
        ({"a": {"scaling": {"min_replicas": 2}}}, "min_replicas 2"),
        ({"a": {"model": "m", "aliases": {"b": {}}}, "b": {}}, "'b' names two models"),
        ({"a": {"modell": "m"}}, "nearest valid key is 'model'"),
    ],
)
def test_wrong_entries_are_refused_when_they_are_read(models, words):
    with pytest.raises(ConfigError, match=words):
        validate(ServingConfig, {"models": models}, "serving")


@pytest.fixture
def args(tiny_model, tmp_path, monkeypatch):
    import shutil

    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "added.json").write_text("{}")
    monkeypatch.setenv("THE_KEYS", f"one: {{sha256: {KEYS[0].sha256}}}")

    def of(model=str(other), **serving) -> ApplicationArgs:
        entry = {
            "model": model,
            "aliases": {"b-query": {"side": "query"}},
            "keys": ["one"],
            "scaling": {"min_replicas": 0, "max_replicas": 3, "cpus": 2},
        }
        values = {
            "require_gate": False,
            "keys_variable": "THE_KEYS",
            "models": {"a-query": {"side": "query"}, "b": entry},
            **serving,
        }
        content = {
            "model_folder": str(tiny_model),
            "served_name": "a",
            "serving": values,
            "scaling": ServeScaling(),
        }
        return validate(ApplicationArgs, content, "test")

    return of


def test_each_model_has_a_deployment_with_its_own_scaling(args):
    gateway = build_application(args())._bound_deployment
    assert gateway.name == "gateway"
    encoders, settings, _, blueprint, _, further = gateway.init_args[:6]
    first = encoders._bound_deployment
    second, own = further["b"][0]._bound_deployment, further["b"][1]
    assert (first.name, second.name) == ("encoder", "encoder-2")
    assert first.num_replicas == 1 and second._deployment_config.autoscaling_config.max_replicas == 3
    assert second.ray_actor_options["num_cpus"] == 2
    assert (
        settings.names == ("a", "a-query") and own.names == ("b", "b-query") and own.allowed_keys == ("one",)
    )
    assert own.fingerprint != settings.fingerprint
    # What a deploy, or a batch, reads back is the whole endpoint.
    assert validate(ApplicationArgs, blueprint, "again") == args()


def test_gateways_find_encoders_of_applications_by_model(args):
    gateway = build_application(args(), {"a": "app-a", "b": "app-b"})._bound_deployment
    assert gateway.init_args[0] == "app-a" and gateway.init_args[5]["b"][0] == "app-b"


def test_keys_and_models_that_are_not_there_are_named_before_anything_starts(args, tmp_path):
    with pytest.raises(ConfigError, match=r"serving\.models\.b\.keys: no key is called 'one'; allowed: none"):
        build_application(args(keys_variable=None))
    with pytest.raises(ConfigError, match=r"serving\.model_keys: no key is called 'two'; allowed: one"):
        build_application(args(model_keys=["two"]))
    with pytest.raises(DataError, match=r"no config\.json|not a model folder"):
        build_application(args(model=str(tmp_path)))


def test_a_batch_is_computed_by_the_model_it_asks_for(args):
    found = batch_parts(args(), "b-query", "one")
    assert found.settings.served_name == "b" and found.scaling.cpus == 2 and not found.settings.keys
    assert batch_parts(args(), "a", "one").settings.served_name == "a"
    assert batch_parts(args(), "nobody", "one").settings.served_name == "a"  # which refuses each line
    with pytest.raises(DataError, match="'b' does not exist or you do not have access to it"):
        batch_parts(args(), "b", "two")
