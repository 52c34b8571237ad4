"""Admission by tokens, clients that leave, and time limits, over the in-process app."""

import asyncio
import enum
import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from embedloom.serving.gateway import HandleBackend
from embedloom.serving.messages import EncodeJob, EncodeResult, Part, Refusal
from embedloom.serving.metrics import EndpointMetrics
from fakes_serving import FakeEncoder, api_of, client_of, refused, service_of


async def settled(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not come about within five seconds")


def held(encoder: FakeEncoder) -> FakeEncoder:
    encoder.gate.clear()
    return encoder


@pytest.mark.parametrize("batched", [True, False], ids=["one batched request", "many single ones"])
def test_a_full_queue_answers_429_with_retry_after_and_recovers(batched):
    """64 tokens are computed, 192 wait, the next request is refused: single and batched input alike."""
    encoder = held(FakeEncoder())
    limits = {
        "max_batch_tokens": 64,
        "max_request_tokens": 256,
        "max_queued_tokens": 192,
        "query_lane_tokens": 1,
    }
    text = "x" * 63  # 64 tokens

    async def run():
        api = api_of(encoder, limits=limits, max_requests=100)
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:

            def ask(count):
                return client.post("/v1/embeddings", json={"model": "tiny", "input": [text] * count})

            first = asyncio.create_task(ask(1))
            await settled(lambda: encoder.batches)
            waiting = (
                [asyncio.create_task(ask(3))] if batched else [asyncio.create_task(ask(1)) for _ in range(3)]
            )
            await asyncio.sleep(0.1)
            full = await ask(1)
            encoder.gate.set()
            answers = await asyncio.gather(first, *waiting)
            return full, answers, await ask(3)

    full, answers, after = asyncio.run(run())
    error = refused(full, 429)
    assert (error["code"], error["type"]) == ("overloaded", "rate_limit_error")
    assert int(full.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in [*answers, after]] == [200] * (len(answers) + 1)


def test_queries_are_admitted_while_bulk_is_full():
    encoder = held(FakeEncoder())
    limits = {
        "max_batch_tokens": 64,
        "max_request_tokens": 128,
        "max_queued_tokens": 128,
        "query_lane_tokens": 16,
    }

    async def run():
        service = service_of(encoder, **limits)

        def ask(texts):
            return asyncio.create_task(service.encode(EncodeJob((Part("document", texts),))))

        tasks = [ask(["x" * 63] * 2)]
        await settled(lambda: encoder.batches)
        tasks.append(ask(["x" * 63]))
        await asyncio.sleep(0.05)
        refused_bulk = await ask(["x" * 63] * 2)
        tasks.append(ask(["query"]))
        await asyncio.sleep(0.05)
        queued = service.queued_tokens()
        metrics = EndpointMetrics()
        metrics.watch_queue(service.queued_tokens)
        shown = metrics.render().decode()
        encoder.gate.set()
        answers = await asyncio.gather(*tasks)
        await service.close()
        return refused_bulk, queued, shown, answers

    refusal, queued, shown, answers = asyncio.run(run())
    assert isinstance(refusal, Refusal) and refusal.code == "overloaded"
    assert queued == {"query": 6, "bulk": 128}
    assert 'embedloom_queued_tokens{lane="bulk"} 128.0' in shown
    assert [answer.lane for answer in answers] == ["bulk", "bulk", "query"]


def test_a_request_above_the_token_limit_is_refused_for_good():
    with client_of(FakeEncoder(), limits={"max_request_tokens": 100}) as client:
        reply = client.post("/v1/embeddings", json={"model": "tiny", "input": ["x" * 60] * 2})
        error = refused(reply, 400)
        assert (error["code"], error["param"]) == ("request_too_large", "input")
        assert "122 tokens; allowed: at most 100" in error["message"]


def test_a_text_of_too_many_characters_is_refused_before_it_is_tokenised():
    with client_of(FakeEncoder(), max_item_characters=50) as client:
        for path, body, param in (
            ("/v1/embeddings", {"input": ["a", "x" * 51]}, "input"),
            ("/v1/rerank", {"query": "x" * 51, "documents": ["a"]}, "query"),
            ("/v1/similarity", {"query": "a", "documents": ["x" * 51]}, "documents"),
        ):
            error = refused(client.post(path, json={"model": "tiny", **body}), 400)
            assert (error["param"], error["code"]) == (param, "string_above_max_length")


class Leaver:
    """A client that sends a request and hangs up while it is being answered."""

    def __init__(self, body: dict) -> None:
        self.messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self.leaves = asyncio.Event()
        self.sent = []

    async def receive(self):
        if self.messages:
            return self.messages.pop()
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)


def test_a_client_that_leaves_frees_its_place():
    encoder = held(FakeEncoder())

    async def run():
        api = api_of(encoder, max_requests=2, limits={"max_batch_tokens": 64})
        scope = {
            "type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"/v1/embeddings", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        clients = [Leaver({"model": "tiny", "input": ["x" * 63] * 8}) for _ in range(2)]
        tasks = [asyncio.create_task(api(dict(scope), one.receive, one.send)) for one in clients]
        await settled(lambda: encoder.batches)
        await asyncio.sleep(0.05)
        for one in clients:
            one.leaves.set()
        await asyncio.gather(*tasks)
        encoder.gate.set()
        # Both places of the endpoint are free again, and what was not yet computed never will be.
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            body = {"model": "tiny", "input": "a"}
            replies = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for _ in range(2)))
            metrics = (await client.get("/metrics")).text
        return clients, replies, metrics

    clients, replies, metrics = asyncio.run(run())
    assert [one.sent for one in clients] == [[], []]
    assert [reply.status_code for reply in replies] == [200, 200]
    # The two later texts may come in one batch or in two; none of those that were waiting is among them.
    assert sum(len(batch) for batch in encoder.batches[1:]) == 2
    assert 'embedloom_requests_total{path="/v1/embeddings",status="499"} 2.0' in metrics


def test_a_timed_out_request_leaves_the_queue():
    encoder = held(FakeEncoder())
    with client_of(encoder, request_timeout_seconds=0.1, limits={"max_batch_tokens": 64}) as client:
        body = {"model": "tiny", "input": ["x" * 63] * 8}
        assert refused(client.post("/v1/embeddings", json=body), 504)["code"] == "timeout"
        encoder.gate.set()
        assert client.post("/v1/embeddings", json={"model": "tiny", "input": "a"}).status_code == 200
    assert len(encoder.batches) == 2


def test_a_body_that_does_not_arrive_is_given_up():
    async def run():
        api = api_of(FakeEncoder(), request_timeout_seconds=0.05)

        async def slow():
            yield b'{"model": "tiny", '
            await asyncio.sleep(5)

        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.post(
                "/v1/embeddings", content=slow(), headers={"content-type": "application/json"}
            )

    assert refused(asyncio.run(run()), 408)["code"] == "timeout"


class Answered:
    """What a Serve handle gives back."""

    def __init__(self, result):
        self.result = result

    def __await__(self):
        async def done():
            return self.result

        return done().__await__()


def test_a_gateway_shows_what_waits_at_all_its_replicas():
    results = [
        EncodeResult(np.zeros((1, 2), np.float32), {}, "query", "c", 0, 0, replica=tag, queued=queued)
        for tag, queued in (
            ("a", {"query": 5, "bulk": 100}),
            ("b", {"query": 1, "bulk": 0}),
            ("a", {"query": 0, "bulk": 40}),
        )
    ]
    encode = SimpleNamespace(remote=lambda _: Answered(results.pop(0)))
    handle = SimpleNamespace(app_name="of this test", deployment_name="encoder", encode=encode)
    backend = HandleBackend(handle)
    assert backend.queued_tokens() == {"query": 0, "bulk": 0}
    seen = []
    for _ in range(3):
        asyncio.run(backend.encode(EncodeJob(())))
        seen.append(backend.queued_tokens())
    assert seen == [{"query": 5, "bulk": 100}, {"query": 6, "bulk": 100}, {"query": 1, "bulk": 40}]


def test_the_encoders_that_are_up_are_counted_by_the_controller(monkeypatch):
    """One question a second however often it is asked; what was last known while the controller is away."""

    class State(enum.StrEnum):
        RUNNING, STARTING = "RUNNING", "STARTING"

    asked = []

    def status():
        asked.append(1)
        if len(asked) > 1:
            raise ConnectionError("the controller is being restarted")
        encoder = SimpleNamespace(replica_states={State.RUNNING: 2, State.STARTING: 1})
        return SimpleNamespace(applications={"mine": SimpleNamespace(deployments={"encoder": encoder})})

    monkeypatch.setattr("embedloom.serving.applications.serve.status", status)

    async def run():
        backend = HandleBackend(SimpleNamespace(app_name="mine", deployment_name="encoder"))
        found = [await backend.replicas() for _ in range(3)]
        backend._counted -= 60
        return [*found, await backend.replicas()]

    assert asyncio.run(run()) == [2, 2, 2, 2]
    assert len(asked) == 2
    with pytest.raises(ConnectionError):
        asyncio.run(HandleBackend(SimpleNamespace(app_name="other", deployment_name="encoder")).replicas())
