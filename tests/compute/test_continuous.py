"""The decoding loop over a stepper that needs as many steps as a request's number says."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedloom.compute.generation import EngineLostError
from embedloom.compute.vllm_engine import ContinuousBatches
from embedloom.errors import DataError


class Countdown:
    """A request is (name, steps); ends with its name after so many steps, at most ``room`` at a time."""

    def __init__(self, room: int = 4) -> None:
        self.room = room
        self.left: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.busy: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def add(self, key: str, request: tuple[str, int]) -> None:
        if request[1] < 0:
            raise DataError(f"{request[0]}: {request[1]} steps")
        self.left[key], self.names[key] = request[1], request[0]

    def step(self) -> list[tuple[str, str]]:
        self.gate.wait()
        served = list(self.left)[: self.room]
        self.busy.append(len(served))
        if any(self.names[key] == "bomb" for key in served):
            raise RuntimeError("out of memory\nlong trace")
        for key in served:
            self.left[key] -= 1
        ended = [key for key in served if self.left[key] <= 0]
        for key in ended:
            del self.left[key]
        return [(key, self.names[key]) for key in ended]

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.left.pop(key)


def loop(stepper: Countdown) -> ContinuousBatches[tuple[str, int], str]:
    return ContinuousBatches(lambda: stepper)


def test_results_come_in_the_order_of_the_requests():
    assert loop(Countdown()).generate([("slow", 5), ("fast", 1), ("middle", 3)]) == ["slow", "fast", "middle"]
    assert loop(Countdown()).generate([]) == []


def test_a_long_tail_of_one_batch_does_not_leave_the_engine_idle():
    """Three batches of one long and three short requests: 3 x 10 steps one after another, 12 side by side."""
    batches = [[(f"long {n}", 10), *((f"short {n}-{m}", 2) for m in range(3))] for n in range(3)]
    alone, together = Countdown(), Countdown()
    runner = loop(alone)
    for batch in batches:
        runner.generate(batch)
    assert len(alone.busy) == 30

    together.gate.clear()
    runner = loop(together)
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(runner.generate, batch) for batch in batches]
        together.gate.set()
        found = [job.result() for job in jobs]
    assert found == [[name for name, _ in batch] for batch in batches]
    assert len(together.busy) < 20
    assert sum(together.busy) == sum(alone.busy) == 3 * (10 + 3 * 2)


def test_a_batch_with_an_impossible_request_fails_alone():
    stepper = Countdown()
    runner = loop(stepper)
    stepper.gate.clear()
    with ThreadPoolExecutor(2) as threads:
        good = threads.submit(runner.generate, [("good", 3)])
        bad = threads.submit(runner.generate, [("fine", 1), ("impossible", -1)])
        stepper.gate.set()
        assert good.result() == ["good"]
        with pytest.raises(DataError, match="impossible: -1 steps"):
            bad.result()
    assert stepper.left == {}, "the fine request of the bad batch was dropped"


def test_a_failing_step_loses_every_batch_and_the_loop():
    runner = loop(Countdown())
    with pytest.raises(
        EngineLostError, match=r"^the engine died with 2 requests: RuntimeError: out of memory$"
    ):
        runner.generate([("bomb", 2), ("bystander", 9)])
    with pytest.raises(EngineLostError):
        runner.generate([("later", 1)])


def test_a_stepper_that_cannot_be_opened_says_why():
    def missing() -> Countdown:
        raise DataError("no such model")

    with pytest.raises(DataError, match="no such model"):
        ContinuousBatches(missing)


def test_the_stepper_is_opened_in_the_thread_that_steps_it():
    threads: list[str] = []

    class Noting(Countdown):
        def step(self) -> list[tuple[str, str]]:
            threads.append(threading.current_thread().name)
            return super().step()

    def open_noting() -> Noting:
        threads.append(threading.current_thread().name)
        return Noting()

    ContinuousBatches(open_noting).generate([("one", 2)])
    assert len(threads) == 3 and set(threads) == {"decoding"}
