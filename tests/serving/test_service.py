import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from embedloom.serving.messages import EncodeJob, Part, Refusal
from embedloom.serving.service import BatchSettings, EncoderService
from fakes_serving import FakeEncoder, vector_of

SETTINGS = BatchSettings(max_batch_tokens=256, batch_wait_seconds=0.0)


def job(side: str, truncate: str = "none", **part) -> EncodeJob:
    return EncodeJob((Part(side, **part),), truncate)


def encode(encoder: FakeEncoder, job: EncodeJob):
    async def run():
        service = EncoderService(encoder, SETTINGS)
        result = await service.encode(job)
        await service.close()
        return result

    return asyncio.run(run())


def test_queries_carry_the_instruction_and_documents_do_not():
    encoder = FakeEncoder()
    document = encode(encoder, job("document", texts=["ab"]))
    query = encode(encoder, job("query", texts=["ab"], instruction="Find"))
    assert document.tokens == 3  # BOS, a, b
    assert query.tokens == 1 + len("Instruct: Find\nQuery: ab")
    assert np.array_equal(query.vectors, encoder.embed(["ab"], "query", instruction="Find"))


def test_symmetric_task_puts_the_instruction_on_documents_too():
    encoder = FakeEncoder(limit=128)
    result = encode(encoder, job("document", texts=["ab"], task_type="sts"))
    assert np.array_equal(result.vectors, encoder.embed(["ab"], "document", "sts"))


def test_too_long_names_item_length_and_limit():
    result = encode(FakeEncoder(limit=16), job("document", texts=["ok", "x" * 20]))
    assert isinstance(result, Refusal)
    assert "input[1] has 21 tokens, the limit for a document is 16" in result.message
    assert result.code == "context_length_exceeded"


def test_text_at_the_limit_is_taken():
    assert encode(FakeEncoder(limit=16), job("document", texts=["x" * 15])).tokens == 16


def test_truncate_end_cuts_to_the_limit():
    result = encode(FakeEncoder(limit=16), job("document", texts=["x" * 40], truncate="end"))
    assert result.tokens == 16
    same = encode(FakeEncoder(limit=16), job("document", texts=["x" * 15]))
    assert np.array_equal(result.vectors, same.vectors)


def test_token_ids_are_embedded_as_they_are():
    result = encode(FakeEncoder(), job("query", token_ids=[[7, 8, 9], [4]]))
    assert np.array_equal(result.vectors, np.stack([vector_of([7, 8, 9]), vector_of([4])]))
    assert result.tokens == 4


@pytest.mark.parametrize(
    ("ids", "truncate", "words"),
    [
        ([[1], [5, 300]], "none", "input[1] holds token id 300"),
        ([[1] * 65], "none", "65 tokens"),
        ([[300] * 65], "end", "300"),
    ],
)
def test_bad_token_ids_are_refused(ids, truncate, words):
    result = encode(FakeEncoder(), job("document", token_ids=ids, truncate=truncate))
    assert isinstance(result, Refusal)
    assert words in result.message


def test_token_ids_can_be_truncated():
    assert encode(FakeEncoder(), job("document", token_ids=[[1] * 65], truncate="end")).tokens == 64


def test_settings_can_change_while_running():
    encoder = FakeEncoder()

    async def run():
        service = EncoderService(encoder, SETTINGS)
        service.configure(BatchSettings(max_batch_tokens=64, batch_wait_seconds=0.0))
        await service.encode(job("document", token_ids=[[2] * 32] * 4))
        await service.close()

    asyncio.run(run())
    assert [len(batch) for batch in encoder.batches] == [2, 2]


def test_describes_the_model():
    info = asyncio.run(EncoderService(FakeEncoder(matryoshka=[4, 8]), SETTINGS).describe())
    assert (info.dimension, info.matryoshka_dimensions, info.max_query_tokens) == (8, (4, 8), 64)
    assert info.contract_hash == FakeEncoder().contract.hash


def timed(encoder: FakeEncoder, *jobs: EncodeJob, tokens_per_second: int = 100):
    """Answers of a service that believes its encoder to be so fast, and what it believes afterwards."""

    async def run():
        service = EncoderService(
            encoder, BatchSettings(max_batch_tokens=256, batch_wait_seconds=0.0, request_timeout_seconds=10)
        )
        service._batcher.scheduler.speed.state(tokens_per_second, 1.0)
        answers = await asyncio.gather(*(service.encode(one) for one in jobs))
        service._streams.threads[0].submit(int).result()  # whatever was measured again
        rate = service._batcher.scheduler.speed.tokens_per_second
        await service.close()
        return answers, rate

    return asyncio.run(run())


def test_what_the_measured_rate_cannot_answer_in_time_is_refused_at_once():
    bulk = job("document", token_ids=[[7] * 63] * 5)  # 315 tokens: 3.15 s of the 10
    answers, _ = timed(FakeEncoder(), bulk, bulk, bulk, bulk)
    assert [getattr(answer, "code", "answered") for answer in answers] == ["answered"] * 2 + [
        "overloaded"
    ] * 2
    assert "630 tokens are waiting here" in answers[2].message and answers[2].retry_after_seconds >= 1


def test_a_request_that_is_too_much_for_the_time_it_has_is_told_so():
    (answer,), rate = timed(FakeEncoder(), job("document", token_ids=[[7] * 63] * 16))
    assert answer.code == "overloaded"
    assert "1008 tokens take about 10.1 s here, too long for the 10 s that a request has" in answer.message
    assert rate > 1000  # measured again: it is fast after all


def test_a_request_that_waited_elsewhere_has_less_time():
    def is_refused(seconds_left: float) -> bool:
        # Each in a service of its own: what one answer took is the next one's rate.
        one = replace(job("document", texts=["x" * 62]), deadline=time.time() + seconds_left)
        (answer,), _ = timed(FakeEncoder(), one)
        return isinstance(answer, Refusal)

    assert [is_refused(left) for left in (-1, 0.5, 60, 500)] == [True, True, False, False]


def test_a_request_that_became_too_late_is_not_computed():
    encoder = FakeEncoder()
    encoder.gate.clear()

    async def run():
        service = EncoderService(
            encoder, BatchSettings(max_batch_tokens=64, batch_wait_seconds=0.0, request_timeout_seconds=10)
        )
        first = asyncio.create_task(service.encode(job("document", texts=["a" * 62])))
        while not encoder.batches:
            await asyncio.sleep(0.001)
        deadline = time.time() + 0.2
        late = replace(job("document", texts=["b" * 62]), deadline=deadline)
        second = asyncio.create_task(service.encode(late))
        while not service.queued_tokens()["query"]:
            await asyncio.sleep(0.001)
        while time.time() <= deadline:  # no rate was known when it was admitted
            await asyncio.sleep(0.01)
        encoder.gate.set()
        answers = await asyncio.gather(first, second)
        await service.close()
        return answers

    first, second = asyncio.run(run())
    assert not isinstance(first, Refusal)
    assert second.code == "overloaded" and "more slowly than when it took the request" in second.message
    assert len(encoder.batches) == 1


def test_only_one_thread_tokenises_at_a_time():
    """Fast tokenizers refuse a second borrower, so a short text must not overtake a bulk request's tokenising."""

    class Guarded(FakeEncoder):
        def __init__(self) -> None:
            super().__init__(limit=4096)
            self.busy = threading.Lock()
            self.threads: set[str] = set()
            whole = self.tokenizer

            def tokenizer(texts, **options):
                assert self.busy.acquire(blocking=False), "borrowed twice"
                try:
                    self.threads.add(threading.current_thread().name.split("_")[0])
                    time.sleep(0.02 * (len(texts) > 1))
                    return whole(texts, **options)
                finally:
                    self.busy.release()

            self.tokenizer = tokenizer

    async def run():
        encoder = Guarded()
        service = EncoderService(encoder, SETTINGS)
        short, bulk = job("document", texts=["ab"]), job("document", texts=["ab", "cd"])
        await service.encode(short)
        assert encoder.threads == {threading.current_thread().name}
        first = asyncio.ensure_future(service.encode(bulk))
        await asyncio.sleep(0.005)
        first.cancel()  # its call goes on in the thread
        await asyncio.gather(*(service.encode(short) for _ in range(5)), service.encode(bulk))
        assert len(encoder.threads) == 2
        await asyncio.sleep(0.05)
        assert service._tokenizing == 0
        await service.close()

    asyncio.run(run())
