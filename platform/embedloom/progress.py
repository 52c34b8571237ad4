"""Progress: one line at a time with rate and time left, and the same numbers as JSON lines.

Lines go to stderr, so that the last line on stdout is the artefact's path. While a stage is built they also go to its
log file in the run's folder, with the time and what libraries warn of.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from embedloom.storage import Place

LOG_FOLDER = "logs"
_LINES = logging.getLogger("embedloom.progress")
_LINES.propagate = False  # stderr has the line already
_LINES.addHandler(logging.NullHandler())


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


@contextmanager
def stage_log(run: Place, stage: str) -> Iterator[None]:
    """Keep what is said while a stage is built in ``logs/<stage>.log`` of the run's folder; a rerun adds to it.

    Progress lines of this process, warnings of libraries, and the traceback if it ends with an error. What actors
    print is in Ray's own log files.
    """
    name = f"{LOG_FOLDER}/{stage.replace('/', '-')}.log"
    with tempfile.TemporaryDirectory(prefix="embedloom-log-") as temporary:
        path = run.local / name if run.is_local else Path(temporary) / "stage.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not run.is_local and run.exists(name):
            path.write_bytes(run.read_bytes(name))
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        loggers = (_LINES, logging.getLogger())
        level = _LINES.level
        _LINES.setLevel(logging.INFO)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        except BaseException:
            _LINES.exception("%s did not finish", stage)
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            _LINES.setLevel(level)
            handler.close()
            if not run.is_local:
                run.write_bytes(name, path.read_bytes())


def _write(stream: IO[str], line: str) -> None:
    stream.write(line + "\n")
    stream.flush()
    _LINES.info(line)
