"""Several batches in one decoding loop: a batch's last, longest text does not leave the engine idle.

An engine that decodes step by step is fed from an inbox: callers hand in a batch and wait for it, the loop's own
thread admits what has arrived and steps while anything is unfinished. A batch is admitted whole before the next
step, so with one batch at a time the schedule depends on the batch alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Generic, Protocol, TypeVar

from embedloom.engines.protocol import EngineLostError
from embedloom.errors import EmbedloomError, first_line

Request = TypeVar("Request", contravariant=True)
Result = TypeVar("Result")
One = TypeVar("One")
Out = TypeVar("Out")


class Stepper(Protocol[Request, Result]):
    """An engine that decodes one token of every admitted request per step."""

    def add(self, key: str, request: Request) -> None:
        """Admit a request; raises one of our errors if it can never be served."""
        ...

    def step(self) -> list[tuple[str, Result]]:
        """Decode once; the requests that ended."""
        ...

    def drop(self, keys: Sequence[str]) -> None:
        """Forget admitted requests."""
        ...


@dataclass(slots=True)
class _Batch(Generic[One, Out]):
    requests: Sequence[One]
    answer: "Future[list[Out]]" = field(default_factory=Future)
    results: dict[int, Out] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


class ContinuousBatches(Generic[One, Out]):
    """Runs a stepper in a thread of its own; ``generate`` may be called by several threads at once."""

    def __init__(self, open_stepper: Callable[[], Stepper[One, Out]]) -> None:
        """Open the stepper in the loop's thread, where it will be used, and wait for it.

        Raises:
            Exception: whatever ``open_stepper`` raised.
        """
        self._open_stepper = open_stepper
        self._opened: Future[Stepper[One, Out]] = Future()
        self._inbox: SimpleQueue[_Batch[One, Out]] = SimpleQueue()
        self._places: dict[str, tuple[_Batch[One, Out], int]] = {}
        self._admitted = 0
        self._lock = Lock()
        self._lost: EngineLostError | None = None
        Thread(target=self._run, name="decoding", daemon=True).start()
        self._opened.result()

    def generate(self, requests: Sequence[One]) -> list[Out]:
        """Results in the order of the requests, once all of them ended.

        Raises:
            EmbedloomError: a request of this batch can never be served.
            EngineLostError: a step failed, now or earlier.
        """
        if not requests:
            return []
        batch: _Batch[One, Out] = _Batch(requests)
        with self._lock:  # or a batch could slip in after the loop has failed all it saw
            if self._lost is not None:
                raise self._lost
            self._inbox.put(batch)
        return batch.answer.result()

    def _run(self) -> None:
        try:
            stepper = self._open_stepper()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(stepper)
        while True:
            try:
                while not self._places or not self._inbox.empty():
                    self._admit(self._inbox.get(), stepper)
                for key, result in stepper.step():
                    self._finish(key, result)
            except Exception as error:  # engines raise many types; none of them is about one batch alone
                self._fail(error)
                return

    def _admit(self, batch: _Batch[One, Out], stepper: Stepper[One, Out]) -> None:
        for position, request in enumerate(batch.requests):
            key = str(self._admitted)
            self._admitted += 1
            try:
                stepper.add(key, request)
            except EmbedloomError as error:
                stepper.drop(batch.keys)
                for known in batch.keys:
                    del self._places[known]
                batch.answer.set_exception(error)
                return
            batch.keys.append(key)
            self._places[key] = (batch, position)

    def _finish(self, key: str, result: Out) -> None:
        batch, position = self._places.pop(key)
        batch.results[position] = result
        if len(batch.results) == len(batch.requests):
            batch.answer.set_result([batch.results[number] for number in range(len(batch.requests))])

    def _fail(self, error: Exception) -> None:
        message = (
            f"the engine died with {len(self._places)} requests: {type(error).__name__}: {first_line(error)}"
        )
        with self._lock:
            self._lost = EngineLostError(message)
            waiting = {id(batch): batch for batch, _ in self._places.values()}
            while not self._inbox.empty():
                batch = self._inbox.get()
                waiting[id(batch)] = batch
        for batch in waiting.values():
            batch.answer.set_exception(self._lost)
