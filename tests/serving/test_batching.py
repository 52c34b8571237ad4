import asyncio
import time
from collections import deque

import numpy as np
import pytest

from embedloom.serving.batching import TokenBatcher, Waiting, take_batch
from fakes_serving import FakeEncoder, vector_of


def ids(length: int, first: int = 5) -> list[int]:
    return [first] * length


def waiting(loop: asyncio.AbstractEventLoop, *lengths: int) -> Waiting:
    return Waiting([ids(length) for length in lengths], loop.create_future(), 0.0, missing=len(lengths))


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def positions(queue, batch):
    names = {id(request): name for name, request in queue.items()}
    return [(names[id(request)], position) for request, position in batch]


def test_each_waiting_request_gives_one_text_in_turn(loop):
    named = {"bulk": waiting(loop, 4, 4, 4, 4), "query": waiting(loop, 2)}
    queue = deque(named.values())
    assert positions(named, take_batch(queue, 10)) == [("bulk", 0), ("query", 0), ("bulk", 1)]
    assert positions(named, take_batch(queue, 10)) == [("bulk", 2), ("bulk", 3)]
    assert not queue


def test_a_text_that_does_not_fit_opens_the_next_batch(loop):
    named = {"a": waiting(loop, 6), "long": waiting(loop, 7), "b": waiting(loop, 2)}
    queue = deque(named.values())
    assert positions(named, take_batch(queue, 10)) == [("a", 0)]
    assert positions(named, take_batch(queue, 10)) == [("long", 0), ("b", 0)]


def test_a_text_above_the_budget_runs_alone(loop):
    named = {"huge": waiting(loop, 50), "b": waiting(loop, 2)}
    queue = deque(named.values())
    assert positions(named, take_batch(queue, 10)) == [("huge", 0)]
    assert positions(named, take_batch(queue, 10)) == [("b", 0)]


def test_requests_whose_client_left_are_dropped(loop):
    named = {"gone": waiting(loop, 3, 3), "here": waiting(loop, 3)}
    named["gone"].done.cancel()
    queue = deque(named.values())
    assert positions(named, take_batch(queue, 10)) == [("here", 0)]
    assert not queue


def test_concurrent_requests_share_batches_and_get_their_own_vectors():
    encoder = FakeEncoder()
    requests = [[ids(3, 10 * n + k) for k in range(1 + n % 4)] for n in range(20)]

    async def run():
        batcher = TokenBatcher(encoder.embed_tokens, 30, 0.02)
        answers = await asyncio.gather(*(batcher.submit(request) for request in requests))
        await batcher.close()
        return answers

    answers = asyncio.run(run())
    for request, answer in zip(requests, answers, strict=True):
        assert np.array_equal(answer.done.result(), np.stack([vector_of(item) for item in request]))
    texts = sum(map(len, requests))
    assert sum(map(len, encoder.batches)) == texts
    assert len(encoder.batches) == -(-texts // 10)  # 30 tokens hold ten texts of 3
    assert sum(record.texts for answer in answers for record in answer.batches) == texts


def test_a_failing_batch_fails_its_requests_only():
    encoder = FakeEncoder()

    async def run():
        batcher = TokenBatcher(encoder.embed_tokens, 4, 0.0)
        encoder.failure = ValueError("no memory")
        with pytest.raises(ValueError, match="no memory"):
            await batcher.submit([ids(4), ids(4)])
        encoder.failure = None
        answer = await batcher.submit([ids(4)])
        await batcher.close()
        return answer

    assert asyncio.run(run()).done.result().shape == (1, 8)


def test_a_cancelled_request_frees_its_place():
    encoder = FakeEncoder()
    encoder.gate.clear()

    async def run():
        batcher = TokenBatcher(encoder.embed_tokens, 4, 0.0)
        first = asyncio.create_task(batcher.submit([ids(4)]))
        await asyncio.sleep(0.05)  # it is being computed now
        second = asyncio.create_task(batcher.submit([ids(4, 7)] * 100))
        third = asyncio.create_task(batcher.submit([ids(4, 8)]))
        await asyncio.sleep(0.05)
        second.cancel()
        encoder.gate.set()
        await asyncio.gather(first, third)
        await batcher.close()

    asyncio.run(run())
    assert [batch[0][0] for batch in encoder.batches] == [5, 8]


def test_one_query_is_not_stuck_behind_a_bulk_request():
    encoder = FakeEncoder(delay_seconds=0.01)

    async def run():
        batcher = TokenBatcher(encoder.embed_tokens, 40, 0.0)
        bulk = asyncio.create_task(batcher.submit([ids(10)] * 200))
        await asyncio.sleep(0.015)
        started = time.monotonic()
        await batcher.submit([ids(10)])
        waited = time.monotonic() - started
        assert not bulk.done()
        await bulk
        await batcher.close()
        return waited, time.monotonic() - started

    waited, everything = asyncio.run(run())
    assert waited < everything / 4


def test_waits_for_company_only_while_there_is_room():
    encoder = FakeEncoder()

    async def run():
        batcher = TokenBatcher(encoder.embed_tokens, 8, 30.0)
        await asyncio.wait_for(asyncio.gather(batcher.submit([ids(4)]), batcher.submit([ids(4, 6)])), 5)
        await batcher.close()

    asyncio.run(run())
    assert len(encoder.batches) == 1
