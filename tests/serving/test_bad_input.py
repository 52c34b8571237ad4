"""Everything of OpenAI's limits, and beyond: 4xx with a body that names the field, never 5xx, nothing read in vain."""

import asyncio
import json

import httpx
import pytest

from fakes_serving import FakeEncoder, api_of, client_of, refused

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client():
    with client_of(FakeEncoder(), max_items=2048, limits={"max_batch_tokens": 4096}) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "tiny", "input": ""}', "input"),
        (b'{"model": "tiny", "input": []}', "input"),
        (b'{"model": "tiny", "input": [""]}', "input"),
        (b'{"model": "tiny", "input": [[]]}', "input"),
        (b'{"model": "tiny", "input": null}', "input"),
        (b'{"model": "tiny", "input": {"a": 1}}', "input"),
        (b'{"model": "tiny", "input": [1, 2.5]}', "input"),
        (b'{"model": "tiny", "input": [1e400]}', "input"),
        (b'{"model": "tiny", "input": [NaN]}', "input"),
        (b'{"model": "tiny", "input": [-1]}', "input"),
        (b'{"model": "tiny", "input": [' + b"9" * 4000 + b"]}", "input"),
        (b'{"model": "tiny", "input": "a", "dimensions": NaN}', "dimensions"),
        (b'{"model": "tiny", "input": "a", "dimensions": Infinity}', "dimensions"),
        (b'{"model": "tiny", "input": "a", "dimensions": 1e400}', "dimensions"),
        (b'{"model": "tiny", "input": "a", "dimensions": -1}', "dimensions"),
        (b'{"model": "tiny", "input": "a", "dimensions": ' + b"9" * 4000 + b"}", "dimensions"),
        (b'{"model": "tiny", "input": "a", "dimensions": true}', "dimensions"),
        (b'{"model": null, "input": "a"}', "model"),
        (b'{"input": "a"}', "model"),
        (b'{"model": "tiny", "input": "a", "instruction": "' + b"x" * 5000 + b'"}', "instruction"),
        (b'{"model": "tiny", "input": "a", "temperature": 1}', "temperature"),
        (b'{"model": "tiny", "input": "\xff\xfe"}', None),
        (b"\x00\x01\x02", None),
        (b"", None),
        (b"null", None),
        (b"[" * 100_000, None),
        (b'{"a":' * 100_000, None),
        ('{"model": "tiny", "input": "a"}'.encode("utf-16"), None),
    ],
)
def test_bad_bodies_are_4xx_and_name_the_field(client, body, param):
    error = refused(client.post("/v1/embeddings", content=body, headers=JSON), 400)
    assert error["param"] == param
    assert len(error["message"]) < 400


def test_a_number_of_more_digits_than_python_reads_is_a_bad_request(client):
    body = b'{"model": "tiny", "input": [' + b"9" * 10_000 + b"]}"
    refused(client.post("/v1/embeddings", content=body, headers=JSON), 400)


def test_item_limit_is_openais(client):
    body = {"model": "tiny", "input": ["a"] * 2048}
    assert len(client.post("/v1/embeddings", json=body).json()["data"]) == 2048
    error = refused(client.post("/v1/embeddings", json={**body, "input": ["a"] * 2049}), 400)
    assert (error["param"], error["code"]) == ("input", "too_many_items")
    assert "2049 items; allowed: at most 2048" in error["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_of_a_body_of_100_mb_no_more_than_the_limit_is_read(declared):
    limit, piece = 16 * 2**20, b"x" * 2**20
    read = []

    async def pieces():
        for _ in range(100):
            read.append(len(piece))
            yield piece

    async def run():
        api = api_of(FakeEncoder(), max_body_bytes=limit)
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            length = {"content-length": str(100 * len(piece))} if declared else {}
            return await client.post("/v1/embeddings", content=pieces(), headers={**JSON, **length})

    error = refused(asyncio.run(run()), 413)
    assert error["code"] == "body_too_large"
    assert sum(read) <= (0 if declared else limit + len(piece))


@pytest.mark.parametrize("length", [b"9" * 5000, b"100000000"])
def test_a_declared_length_beyond_the_limit_is_refused_however_long_the_number(length):
    async def run():
        replies = []

        async def send(message):
            replies.append(message)

        async def receive():
            raise AssertionError("the body was asked for")

        scope = {
            "type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"/v1/embeddings", "query_string": b"",
            "headers": [(b"content-length", length)], "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        await api_of(FakeEncoder())(scope, receive, send)
        return replies

    assert asyncio.run(run())[0]["status"] == 413


@pytest.mark.parametrize(
    "path", ["/v1/models/" + "x" * 5000, "/v1/models/%ff%00", "/v1/models/a%2Fb", "/%2e%2e/etc/passwd"]
)
def test_strange_paths_are_not_found(client, path):
    error = refused(client.get(path), 404)
    assert len(error["message"]) < 400


def test_an_endless_stream_of_small_refusals_leaves_no_labels_behind(client):
    for number in range(50):
        client.get(f"/v1/models/{number}")
        client.get(f"/{number}")
    lines = [line for line in client.get("/metrics").text.splitlines() if "requests_total{" in line]
    assert len(lines) < 15


def test_refusals_repeat_little_of_what_was_sent(client):
    body = json.dumps({"model": "m" * 10_000, "input": "a"})
    error = refused(client.post("/v1/embeddings", content=body, headers=JSON), 404)
    assert len(error["message"]) < 300
