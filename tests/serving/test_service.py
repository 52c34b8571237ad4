import asyncio
import threading
import time

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
