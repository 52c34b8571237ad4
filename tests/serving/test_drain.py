"""An endpoint that is stopped: what is in hand ends or is told so, what comes is told so, nothing hangs."""

import asyncio

import httpx
import pytest

from embedloom.serving.api import create_api
from embedloom.serving.front import Drain
from fakes_serving import FakeEncoder, refused, service_of, settings_of

BODY = {"model": "tiny", "input": "ab"}


def stopped(seconds: float, release: bool):
    """One request in hand and three that come while the endpoint stops; the replies, and how many were cut off."""
    encoder = FakeEncoder()
    encoder.gate.clear()
    drain = Drain()

    async def run():
        api = create_api(service_of(encoder), settings_of(), drain=drain)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://t") as client:
            first = asyncio.create_task(client.post("/v1/embeddings", json=BODY))
            while not encoder.batches:
                await asyncio.sleep(0.001)
            stopping = asyncio.create_task(drain.run(seconds))
            await asyncio.sleep(0)
            late = await client.post("/v1/embeddings", json=BODY)
            probes = [
                (await client.get(path)).status_code
                for path in ("/health", "/ready", "/metrics", "/v1/models")
            ]
            if release:
                encoder.gate.set()
            cut = await stopping
            encoder.gate.set()
            return await first, late, probes, cut, await client.post("/v1/embeddings", json=BODY)

    return asyncio.run(run())


def test_what_is_in_hand_ends_and_what_comes_is_told_that_it_stops():
    first, late, probes, cut, after = stopped(60.0, release=True)
    assert first.status_code == 200 and cut == 0
    for reply in (late, after):
        assert refused(reply, 503)["code"] == "stopping"
        assert int(reply.headers["retry-after"]) >= 1
    assert probes == [200, 503, 200, 503]  # alive, not ready


def test_what_is_not_done_in_time_is_answered_too():
    first, _, _, cut, _ = stopped(0.05, release=False)
    assert refused(first, 503)["code"] == "stopping" and first.headers["retry-after"]
    assert cut == 1


def test_a_client_that_leaves_is_no_stop():
    async def run():
        drain = Drain()
        started = asyncio.Event()

        async def handle():
            task = drain.enter()
            try:
                started.set()
                await asyncio.sleep(60)
            finally:
                drain.leave(task)

        one = asyncio.create_task(handle())
        await started.wait()
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        return await drain.run(60)

    assert asyncio.run(run()) == 0
