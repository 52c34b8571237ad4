import hashlib
import hmac

import pytest

from embedloom.config.serving import ServingConfig
from embedloom.errors import ConfigError
from embedloom.serving.front import ApiKey, KeyRing, Quota, parse_keys, read_keys
from embedloom.serving.refusals import ApiError
from fakes_serving import FakeEncoder, client_of, refused

SECRET, OTHER = "sk-one", "sk-two"
BODY = {"model": "tiny", "input": "ab"}


def key(secret: str = SECRET, **values) -> ApiKey:
    values = {"name": "one", **values}
    return ApiKey(sha256=hashlib.sha256(secret.encode()).hexdigest(), **values)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_only_a_known_key_is_served_and_the_body_is_not_read_without_one():
    with client_of(FakeEncoder(), keys=(key(), key(OTHER, name="two")), max_body_bytes=100) as client:
        for secret in (SECRET, OTHER):
            assert client.post("/v1/embeddings", json=BODY, headers=bearer(secret)).status_code == 200
        for headers in ({}, bearer("sk-on"), bearer(SECRET + "x"), {"authorization": SECRET}, bearer("é")):
            reply = client.post(
                "/v1/embeddings",
                content=b"x" * 1000,
                headers={name: value.encode("latin-1") for name, value in headers.items()},
            )
            assert refused(reply, 401)["type"] == "authentication_error"
            assert reply.headers["www-authenticate"] == "Bearer"


def test_what_needs_a_key_and_what_does_not():
    with client_of(FakeEncoder(), keys=(key(),)) as client:
        assert {path: client.get(path).status_code for path in ("/health", "/ready")} == {
            "/health": 200,
            "/ready": 200,
        }
        for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nothing"):
            refused(client.get(path), 401)
            assert client.get(path, headers=bearer(SECRET)).status_code in (200, 404)
        document = client.get("/openapi.json", headers=bearer(SECRET)).json()
        assert document["paths"]["/v1/embeddings"]["post"]["security"] == [{"key": []}]
        assert "security" not in document["paths"]["/health"]["get"]


def test_every_hash_is_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    ring = KeyRing([key(), key(OTHER, name="two"), key("sk-three", name="three")])
    assert ring.identify(b"Bearer " + SECRET.encode()).name == "one"
    assert len(compared) == 3
    with pytest.raises(ApiError):
        ring.identify(b"Basic " + SECRET.encode())
    assert len(compared) == 6


def test_quota_gives_a_minutes_worth_at_once_and_refills_evenly():
    clock = Clock()
    quota = Quota(60, clock)
    quota.take(60)
    assert quota.seconds_until(1) == pytest.approx(1.0)
    clock.now += 0.5
    assert quota.seconds_until(1) == pytest.approx(0.5)
    clock.now += 3600
    assert quota.seconds_until(60) == 0
    assert quota.seconds_until(61) == pytest.approx(1.0)  # never more than a minute's worth is saved
    quota.take(90)  # overdrawn by 30: half a minute
    assert quota.seconds_until(0) == pytest.approx(30.0)


def test_request_and_token_quotas_answer_429_with_the_time_to_wait():
    clock = Clock()
    ring = KeyRing([key(requests_per_minute=2, tokens_per_minute=600)], clock)
    client = ring.identify(b"Bearer " + SECRET.encode())
    client.begin()
    client.begin()
    with pytest.raises(ApiError, match="requests per minute of this key are used up") as caught:
        client.begin()
    assert caught.value.status == 429 and caught.value.headers["retry-after"] == "30"
    clock.now += 60
    client.begin()
    client.charge(1199)  # 599 beyond the quota: nothing until a whole token is left, a minute later
    with pytest.raises(ApiError, match="tokens per minute") as caught:
        client.begin()
    assert caught.value.headers["retry-after"] == "60"


def test_tokens_are_charged_to_the_key_that_used_them():
    keys = (key(tokens_per_minute=6), key(OTHER, name="two", tokens_per_minute=6))
    with client_of(FakeEncoder(), keys=keys) as client:
        long = {"model": "tiny", "input": "abcdefgh"}
        assert client.post("/v1/embeddings", json=long, headers=bearer(SECRET)).status_code == 200
        reply = client.post("/v1/embeddings", json=BODY, headers=bearer(SECRET))
        assert refused(reply, 429)["code"] == "rate_limit_exceeded"
        assert 30 <= int(reply.headers["retry-after"]) <= 40  # 3 overdrawn and one to have, at 6 a minute
        assert client.post("/v1/embeddings", json=BODY, headers=bearer(OTHER)).status_code == 200


def test_keys_come_from_a_file_or_a_variable(tmp_path, monkeypatch):
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    text = f"page: {{sha256: {digest}, requests_per_minute: 5}}\n"
    (tmp_path / "keys.yaml").write_text(text)
    monkeypatch.setenv("MY_KEYS", text)
    for config in (
        ServingConfig(keys_file=str(tmp_path / "keys.yaml")),
        ServingConfig(keys_variable="MY_KEYS"),
    ):
        assert read_keys(config) == (ApiKey(name="page", sha256=digest, requests_per_minute=5),)
    assert read_keys(ServingConfig()) == ()
    with pytest.raises(ConfigError, match=r"keys_file: .*no such file"):
        read_keys(ServingConfig(keys_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="OTHER_KEYS is not in the environment"):
        read_keys(ServingConfig(keys_variable="OTHER_KEYS"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no keys"),
        ("[1]", "holds no keys"),
        ("a: {sha256: sk-very-secret}", "64 lower-case hex"),
        ("a: {sha265: sk-very-secret}", "sha265: unknown key; the nearest valid key is 'sha256'"),
        ("a: {requests_per_minute: 5}", "sha256: required, but missing"),
        ("a: sk-very-secret", "64 lower-case hex"),
        ("a: {sha256: " + "a" * 64 + ", token_per_minute: 1}", "nearest valid key is 'tokens_per_minute'"),
        ("a: {sha256: " + "a" * 64 + ", requests_per_minute: 0}", "greater than or equal to 1"),
        ("a: {sha256: " + "a" * 64 + "}\nb: {sha256: " + "a" * 64 + "}", "same key"),
        ("a: {sha256: sk-very-secret", "not readable as YAML"),
    ],
)
def test_bad_key_documents_are_named_and_not_repeated(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_keys(text, "keys.yaml")
    assert "sk-very-secret" not in str(caught.value)
