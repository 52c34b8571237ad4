"""A device that takes a set time a token, on any clock: what a GPU is to the host that feeds it."""

import threading
import time
from collections.abc import Callable


class SimulatedDevice:
    """Computes what it is given one after another, and counts how long it had nothing to do between the first and the last.

    Nothing is counted of the first ``warm_tokens``, while those who feed it are still starting.
    """

    def __init__(
        self,
        tokens_per_second: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        warm_tokens: int = 0,
    ) -> None:
        self._warm_tokens = warm_tokens
        self._rate, self._clock, self._sleep = tokens_per_second, clock, sleep
        self._lock = threading.Lock()
        self._free_at: float | None = None
        self.busy_seconds = self.idle_seconds = 0.0

    def start(self, tokens: int) -> Callable[[], None]:
        """Queue so many tokens; what is returned waits until they are done."""
        with self._lock:
            now = self._clock()
            before = now if self._free_at is None else self._free_at
            if self._warm_tokens <= 0:
                self.idle_seconds += max(0.0, now - before)
                self.busy_seconds += tokens / self._rate
            self._warm_tokens -= tokens
            done = self._free_at = max(now, before) + tokens / self._rate
        return lambda: self._sleep(max(0.0, done - self._clock()))

    @property
    def idle_share(self) -> float:
        """Of the time from the first batch to the end of the last, 0 to 1."""
        whole = self.busy_seconds + self.idle_seconds
        return self.idle_seconds / whole if whole else 0.0


class SimulatedTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
