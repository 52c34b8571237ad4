"""A device is fed so that it never waits for the host once it has work, and gives what a waiting host would get."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedloom.encoder.feeding import Queue, batch_tokens, batches_behind
from embedloom.encoder.model import Encoder, MemoryLimit, run_batches
from embedloom.errors import DataError
from fakes_device import SimulatedDevice, SimulatedTime


@given(st.integers(0, 12), st.integers(0, 3))
def test_every_result_is_taken_once_in_order_and_only_when_so_many_others_were_started(batches, behind):
    events = []

    def start(batch):
        events.append(("started", batch[0]))
        return lambda: np.full(1, batch[0], np.float32)

    queue = Queue(start, lambda batch, found: events.append(("taken", batch[0], found[0])), behind)
    for number in range(batches):
        queue([number])
    queue.finish()
    taken = [event[1:] for event in events if event[0] == "taken"]
    assert taken == [(number, number) for number in range(batches)]
    for number in range(batches):
        started = [
            event[1] for event in events[: events.index(("taken", number, number))] if event[0] == "started"
        ]
        assert max(started) == min(number + behind, batches - 1)


def idle(behind, host_seconds, batches=20, tokens=100):
    """Idle seconds of a device of 100 tokens a second whose host takes so long to lay a batch out."""
    clock = SimulatedTime()
    device = SimulatedDevice(100.0, clock, clock.sleep)

    def start(batch):
        clock.sleep(host_seconds)
        wait = device.start(tokens)

        def result():
            wait()
            return np.zeros(1, np.float32)

        return result

    queue = Queue(start, lambda batch, found: None, behind)
    for number in range(batches):
        queue([number])
    queue.finish()
    assert device.busy_seconds == pytest.approx(batches * tokens / 100)
    return device.idle_seconds


def test_a_device_waits_for_its_host_only_where_the_host_waits_for_each_batch():
    """A batch computes for 1 s and is laid out in 0.3: by hand, 19 gaps of 0.3 s, or none."""
    assert idle(behind=0, host_seconds=0.3) == pytest.approx(19 * 0.3)
    assert idle(behind=1, host_seconds=0.3) == pytest.approx(0)
    # A host slower than the device is what no queue can help; a batch ahead hides one batch's computing of it.
    assert idle(behind=1, host_seconds=1.5) == pytest.approx(19 * 0.5)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 100), st.integers(40, 2000))
def test_a_batch_that_does_not_fit_loses_none_of_those_before_it(lengths, memory, budget):
    done = []

    def start(batch):
        if max(lengths[position] for position in batch) * len(batch) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return lambda: np.zeros(1, np.float32)

    queue = Queue(start, lambda batch, found: done.extend(batch), 1)
    run_batches(lengths, budget, MemoryLimit(), queue)
    queue.finish()
    assert sorted(done) == list(range(len(lengths)))


def test_an_error_of_a_batch_is_raised_where_its_result_is_taken():
    def start(batch):
        def result():
            if batch == [1]:
                raise DataError("the device lost it")
            return np.zeros(1, np.float32)

        return result

    taken = []
    queue = Queue(start, lambda batch, found: taken.append(batch), 1)
    queue([0])
    queue([1])
    with pytest.raises(DataError, match="the device lost it"):
        queue([2])
    assert taken == [[0]]


def test_vectors_taken_a_batch_behind_are_bit_for_bit_those_of_a_host_that_waits(tiny_model: Path):
    """Lists and arrays of ids, several batches; the device's own copy and turn are all that a GPU adds."""
    encoder = Encoder.load(tiny_model, dtype="float32", device="cpu")
    assert encoder.behind == 0
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 250, rng.integers(1, 60)).tolist() for _ in range(90)]
    expected = encoder.embed_tokens(ids, 300)
    encoder.behind = 1
    np.testing.assert_array_equal(encoder.embed_tokens(ids, 300), expected)
    arrays = [np.asarray(own, dtype=np.int32) for own in ids]
    np.testing.assert_array_equal(encoder.embed_tokens(arrays, 300), expected)
    lengths = [len(own) for own in ids]
    for one, other in zip(encoder._pad(arrays, lengths), encoder._pad(ids, lengths), strict=True):
        assert torch.equal(one, other)


def test_a_gpu_gets_sixteen_times_the_tokens_and_a_cpu_what_it_had():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (batch_tokens(cpu), batches_behind(cpu)) == (4096, 0)
    assert (batch_tokens(gpu), batches_behind(gpu)) == (65_536, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_fed_by_two_threads_gives_the_vectors_of_one(tiny_model: Path):
    from concurrent.futures import ThreadPoolExecutor

    encoder = Encoder.load(tiny_model, dtype="float32", device="cuda")
    ids = [[3 + (n * k) % 200 for k in range(1 + n % 50)] for n in range(400)]
    alone = encoder.embed_tokens(ids, 512)
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: encoder.embed_tokens(ids, 512), range(4)))
    for found in both:
        np.testing.assert_array_equal(found, alone)
