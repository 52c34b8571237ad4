import asyncio
import threading
import time

import numpy as np
import pytest

from embedloom.serving.scheduling import ComputeStreams, LaneLimits, TokenBatcher
from fakes_serving import FakeEncoder, vector_of


def ids(length: int, first: int = 5) -> list[int]:
    return [first] * length


def batcher_of(
    encoder: FakeEncoder, max_batch_tokens: int, wait_seconds: float = 0.0, streams: int = 1
) -> TokenBatcher:
    limits = LaneLimits(max_batch_tokens, wait_seconds, 10**6, query_lane_tokens=20, query_lane_share=0.5)
    threads = ComputeStreams(streams).threads
    return TokenBatcher(lambda token_ids, alone: encoder.embed_tokens(token_ids), limits, threads)


def submit(batcher: TokenBatcher, token_ids):
    place = batcher.scheduler.reserve(sum(map(len, token_ids)))
    return batcher.submit(token_ids, place)


def test_concurrent_requests_share_batches_and_get_their_own_vectors():
    encoder = FakeEncoder()
    requests = [[ids(3, 10 * n + k) for k in range(1 + n % 4)] for n in range(20)]

    async def run():
        batcher = batcher_of(encoder, 30, 0.02)
        answers = await asyncio.gather(*(submit(batcher, request) for request in requests))
        await batcher.close()
        return answers

    answers = asyncio.run(run())
    for request, (vectors, _) in zip(requests, answers, strict=True):
        assert np.array_equal(vectors, np.stack([vector_of(item) for item in request]))
    texts = sum(map(len, requests))
    assert sum(map(len, encoder.batches)) == texts
    assert len(encoder.batches) == -(-texts // 10)  # 30 tokens hold ten texts of 3
    assert sum(record.texts for _, request in answers for record in request.batches) == texts


def test_a_failing_batch_fails_its_requests_only():
    encoder = FakeEncoder()

    async def run():
        batcher = batcher_of(encoder, 4)
        encoder.failure = ValueError("no memory")
        with pytest.raises(ValueError, match="no memory"):
            await submit(batcher, [ids(4), ids(4)])
        assert batcher.scheduler.queued_tokens() == 0
        encoder.failure = None
        vectors, _ = await submit(batcher, [ids(4)])
        await batcher.close()
        return vectors

    assert asyncio.run(run()).shape == (1, 8)
    assert len(encoder.batches) == 2  # the failed request's second text was not computed


def test_a_cancelled_request_frees_its_place():
    encoder = FakeEncoder()
    encoder.gate.clear()

    async def run():
        batcher = batcher_of(encoder, 4)
        first = asyncio.create_task(submit(batcher, [ids(4)]))
        await asyncio.sleep(0.05)  # it is being computed now
        second = asyncio.create_task(submit(batcher, [ids(4, 7)] * 100))
        third = asyncio.create_task(submit(batcher, [ids(4, 8)]))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.sleep(0)
        waiting = batcher.scheduler.queued_tokens()
        encoder.gate.set()
        await asyncio.gather(first, third)
        await batcher.close()
        return waiting

    assert asyncio.run(run()) == 4
    assert [batch[0][0] for batch in encoder.batches] == [5, 8]


def test_one_query_is_not_stuck_behind_a_bulk_request():
    encoder = FakeEncoder(delay_seconds=0.01)

    async def run():
        batcher = batcher_of(encoder, 40)
        bulk = asyncio.create_task(submit(batcher, [ids(10)] * 200))
        await asyncio.sleep(0.015)
        before = len(encoder.batches)
        await submit(batcher, [ids(10, 7)])
        assert not bulk.done()
        await bulk
        await batcher.close()
        return before

    before = asyncio.run(run())
    own = next(number for number, batch in enumerate(encoder.batches) if ids(10, 7) in batch)
    assert own <= before + 2  # of fifty: at once but for what was being computed, or picked, when it came


def test_waits_for_company_only_while_there_is_room():
    encoder = FakeEncoder()

    async def run():
        batcher = batcher_of(encoder, 8, 30.0)
        await asyncio.wait_for(asyncio.gather(submit(batcher, [ids(4)]), submit(batcher, [ids(4, 6)])), 5)
        await batcher.close()

    asyncio.run(run())
    assert len(encoder.batches) == 1


def test_close_ends_those_who_wait():
    encoder = FakeEncoder()

    async def run():
        batcher = batcher_of(encoder, 8, 30.0)
        waiting = asyncio.create_task(submit(batcher, [ids(2)]))
        await asyncio.sleep(0.01)
        started = time.monotonic()
        await batcher.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return time.monotonic() - started

    assert asyncio.run(run()) < 5


def test_streams_compute_side_by_side_and_share_what_waits():
    sizes = []
    together = threading.Barrier(2)

    def run(token_ids, alone):
        assert not alone
        sizes.append(sum(map(len, token_ids)))
        together.wait(10)  # passes only while two batches are being computed
        return np.stack([vector_of(item) for item in token_ids])

    async def answer():
        limits = LaneLimits(4096, 0.0, 10**6, query_lane_tokens=50, query_lane_share=0.5)
        batcher = TokenBatcher(run, limits, ComputeStreams(2).threads)
        answers = await asyncio.gather(*(submit(batcher, [ids(40, n)]) for n in range(8)))
        await batcher.close()
        return answers

    answers = asyncio.run(answer())
    assert sizes == [160, 160]  # of 320 tokens that waited
    for number, (vectors, _) in enumerate(answers):
        assert np.array_equal(vectors, [vector_of(ids(40, number))])


def test_a_few_tokens_are_not_cut_in_two():
    encoder = FakeEncoder()

    async def run():
        batcher = batcher_of(encoder, 4096, 30.0, streams=2)
        batcher.scheduler.limits.wait_seconds = 0.05
        await asyncio.gather(*(submit(batcher, [ids(10, n)]) for n in range(6)))
        await batcher.close()

    asyncio.run(run())
    assert [len(batch) for batch in encoder.batches] == [6]


def test_a_lone_batch_is_told_so_and_always_runs_in_the_first_thread():
    seen = []

    def run(token_ids, alone):
        seen.append((alone, threading.current_thread().name))
        return np.stack([vector_of(item) for item in token_ids])

    async def answer():
        limits = LaneLimits(4096, 0.0, 10**6, query_lane_tokens=50, query_lane_share=0.5)
        batcher = TokenBatcher(run, limits, ComputeStreams(2).threads)
        for _ in range(5):
            await submit(batcher, [ids(10)])
        await batcher.close()

    asyncio.run(answer())
    assert seen == [(True, "encode-0_0")] * 5


def test_a_failing_batch_leaves_its_stream_free_for_the_next():
    encoder = FakeEncoder()

    async def run():
        batcher = batcher_of(encoder, 4, streams=2)
        encoder.failure = ValueError("no memory")
        for _ in range(5):
            with pytest.raises(ValueError, match="no memory"):
                await submit(batcher, [ids(4)])
        encoder.failure = None
        await asyncio.gather(*(submit(batcher, [ids(4)]) for _ in range(4)))
        await batcher.close()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert len(encoder.batches) == 9
