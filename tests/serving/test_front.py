"""What stands around every route: CORS, and the request log."""

import json
import logging

import pytest

from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.serving.app import build_application
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.front import ApiKey
from fakes_serving import FakeEncoder, client_of, refused

HERE, ELSEWHERE = "https://search.example.org", "https://evil.example.org"
BODY = {"model": "tiny", "input": "ab"}


def preflight(client, origin: str):
    return client.options(
        "/v1/embeddings",
        headers={
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type,authorization",
        },
    )


def test_no_other_page_may_call_by_default():
    with client_of(FakeEncoder()) as client:
        assert "access-control-allow-origin" not in preflight(client, HERE).headers
        reply = client.post("/v1/embeddings", json=BODY, headers={"origin": HERE})
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_listed_origins_may_call_and_read_refusals():
    key = ApiKey(name="page", sha256="0" * 64)
    with client_of(FakeEncoder(), allowed_origins=(HERE,), keys=(key,)) as client:
        assert preflight(client, HERE).headers["access-control-allow-origin"] == HERE
        assert "access-control-allow-origin" not in preflight(client, ELSEWHERE).headers
        reply = client.post("/v1/embeddings", json=BODY, headers={"origin": HERE})
        refused(reply, 401)
        assert reply.headers["access-control-allow-origin"] == HERE
        assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(
    "origin", ["*", "https://*.example.org", "example.org", "https://a.org/path", "file://x"]
)
def test_an_origin_is_one_site(origin):
    with pytest.raises(ValueError, match="is not an origin"):
        ServingConfig(allowed_origins=(origin,))


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_a_load_balancers_check_is_answered_whatever_it_says_of_itself(path):
    hosts = ("localhost", "127.0.0.1")
    with client_of(FakeEncoder(), hosts=hosts) as client:
        for host in ("10.2.3.4:8000", "service.internal", "", "a b"):
            assert client.get(path, headers={"host": host, "user-agent": ""}).status_code == 200
        assert client.head(path).status_code == 200
        assert client.get(path + "?from=lb").status_code == 200


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", "GET, HEAD, OPTIONS, POST"),
        ("/v1/embeddings", "OPTIONS, POST"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/models/a/b", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_says_what_a_path_takes_without_a_key_or_work(path, allowed):
    """HAProxy's default check is OPTIONS of ``/``, and takes 2xx for life."""
    encoder = FakeEncoder()
    with client_of(encoder, keys=(ApiKey(name="page", sha256="0" * 64),)) as client:
        reply = client.options(path)
        assert (reply.status_code, reply.headers["allow"], reply.content) == (204, allowed, b"")
        refused(client.options("/nothing"), 404)
    assert not encoder.batches


def lines_of(caplog):
    return [json.loads(r.message) for r in caplog.records if r.name == "embedloom.serving.requests"]


def logged(caplog, mode: str, **body):
    caplog.set_level(logging.INFO, "embedloom.serving.requests")
    with client_of(FakeEncoder(), request_log=mode) as client:
        client.post("/v1/embeddings", json={**BODY, **body}, headers={"x-request-id": "r-1"})
    return lines_of(caplog)


def test_a_line_says_what_a_request_cost_and_not_what_it_said(caplog):
    (line,) = logged(caplog, "facts", input=["secret words", "b"], user="someone")
    assert line["request_id"] == "r-1"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/embeddings", 200)
    assert (line["items"], line["tokens"], line["lane"]) == (2, 15, "query")
    assert line["seconds"] > 0
    assert "secret" not in json.dumps(line) and "someone" not in json.dumps(line)


def test_refused_requests_are_logged_without_their_texts(caplog):
    (line,) = logged(caplog, "facts", input=["secret words"], dimensions=3)
    assert line["status"] == 400
    assert "secret" not in json.dumps(line)


def test_texts_are_logged_only_when_asked_for_and_not_whole(caplog):
    (line,) = logged(caplog, "texts", input="x" * 3000, truncate="end")
    assert line["texts"] == ["x" * 1000]


def test_the_log_can_be_off(caplog):
    assert logged(caplog, "none") == []


def test_a_line_names_the_key_and_unknown_paths_share_a_name(caplog):
    caplog.set_level(logging.INFO, "embedloom.serving.requests")
    digest = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of "foo"
    with client_of(FakeEncoder(), request_log="facts", keys=(ApiKey(name="page", sha256=digest),)) as client:
        client.post("/v1/embeddings", json=BODY, headers={"authorization": "Bearer foo"})
        client.get("/v1/secret-path?q=words")
    known, unknown = lines_of(caplog)
    assert known["key"] == "page"
    assert "key" not in unknown and unknown["path"] == "other" and unknown["status"] == 401


def test_an_endpoint_on_loopback_answers_only_to_names_of_this_machine():
    hosts = ("localhost", "127.0.0.1", "::1")
    with client_of(FakeEncoder(), hosts=hosts) as client:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
            assert client.post("/v1/embeddings", json=BODY, headers={"host": host}).status_code == 200, host
        for host in ("evil.example.org", "127.0.0.1.evil.example.org:8000", "", "[::2]"):
            error = refused(client.post("/v1/embeddings", json=BODY, headers={"host": host}), 403)
            assert error["code"] == "unknown_host"
    with client_of(FakeEncoder()) as client:
        assert client.get("/health", headers={"host": "anything"}).status_code == 200


@pytest.mark.parametrize(
    ("on_loopback", "serving", "checked"),
    [
        (True, {}, True),
        (True, {"allowed_hosts": ("search.local",)}, True),
        (False, {"host": "0.0.0.0"}, False),
        (True, {"keys_variable": "KEYS_OF_THIS_TEST"}, False),
    ],
)
def test_hosts_are_checked_where_loopback_is_all_that_keeps_others_out(
    tiny_model, monkeypatch, on_loopback, serving, checked
):
    monkeypatch.setenv("KEYS_OF_THIS_TEST", "a: {sha256: " + "ab" * 32 + "}")
    args = ApplicationArgs(
        model_folder=str(tiny_model),
        served_name="t",
        on_loopback=on_loopback,
        serving=ServingConfig(require_gate=False, **serving),
    )
    (settings,) = [
        item
        for item in build_application(args)._bound_deployment.init_args
        if isinstance(item, EndpointSettings)
    ]
    assert bool(settings.hosts) == checked
    assert set(serving.get("allowed_hosts", ())) <= set(settings.hosts)
