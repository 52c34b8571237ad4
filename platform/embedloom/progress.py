"""Progress: one line at a time with rate and time left, and the same numbers as JSON lines.

Lines go to stderr, so that the last line on stdout is the artefact's path.
"""

import json
import sys
import time
from pathlib import Path
from typing import IO, Any


def duration(seconds: float) -> str:
    """``75`` → ``1m15s``; hours appear from one hour on."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Counts ``unit``s of one stage towards ``total`` and prints at most one line every ``every_seconds``."""

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        every_seconds: float = 10.0,
        metrics_file: Path | None = None,
        stream: IO[str] | None = None,
    ) -> None:
        self.stage = stage
        self.total = total
        self.unit = unit
        self.done = done
        self._first = done
        self._every = every_seconds
        self._metrics_file = metrics_file
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._last_print = self._started

    def advance(self, amount: int, **values: Any) -> None:
        """Add finished units; ``values`` (loss, rejects, ...) stand at the end of the line."""
        self.done += amount
        now = time.monotonic()
        finished = self.total is not None and self.done >= self.total
        if self._metrics_file is not None:
            record = {
                "stage": self.stage,
                "done": self.done,
                "seconds": round(now - self._started, 3),
                **values,
            }
            with self._metrics_file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        if finished or now - self._last_print >= self._every:
            self._last_print = now
            _write(self._stream, self.line(now, values))

    def line(self, now: float, values: dict[str, Any]) -> str:
        """The progress line at monotonic time ``now``."""
        elapsed = now - self._started
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        parts = [
            f"{self.done:,}/{self.total:,} {self.unit}"
            if self.total is not None
            else f"{self.done:,} {self.unit}"
        ]
        parts.append(f"{rate:,.1f} {self.unit}/s")
        parts.extend(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        )
        parts.append(duration(elapsed))
        if self.total is not None and rate > 0 and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return f"[{self.stage}] " + " · ".join(parts)


def note(stage: str, message: str) -> None:
    """Print one line about a stage to stderr."""
    _write(sys.stderr, f"[{stage}] {message}")


def _write(stream: IO[str], line: str) -> None:
    stream.write(line + "\n")
    stream.flush()
