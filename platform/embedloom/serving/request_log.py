"""One JSON line a request, on stderr: what was asked and what it cost, and its texts only where that is wanted."""

import asyncio
import contextlib
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from pydantic_core import to_json

RequestLog = Literal["none", "facts", "texts"]
SCOPE_KEY = "embedloom.facts"
logger = logging.getLogger("embedloom.serving.requests")
_TEXT_CHARACTERS = 1000  # of one logged text
_FLUSH_SECONDS = 0.1


@dataclass(slots=True)
class Facts:
    """What handlers learn about a request; the front writes it down when the request is over."""

    client: Any = None  # keys.Client, where keys are wanted
    values: dict[str, Any] = field(default_factory=dict)
    texts: list[str] | None = None


def facts_of(scope: Any) -> Facts:
    """The facts of the request being handled."""
    facts: Facts = scope.setdefault(SCOPE_KEY, Facts())
    return facts


def write_line(
    mode: RequestLog, facts: Facts, request_id: str, method: str, path: str, status: int, seconds: float
) -> None:
    """Log one request that is over."""
    if mode == "none":
        return
    line: dict[str, Any] = {
        "time": round(time.time(), 3),
        "request_id": request_id,
        "method": method,
        "path": path,
        "status": status,
        "seconds": round(seconds, 6),
    }
    if facts.client is not None:
        line["key"] = facts.client.name
    line |= facts.values
    if mode == "texts" and facts.texts is not None:
        line["texts"] = [text[:_TEXT_CHARACTERS] for text in facts.texts]
    logger.info("%s", to_json(line).decode())


class LineBuffer(logging.Handler):
    """Writes the lines of a tenth of a second at once; a process that is killed loses those.

    Every write gives up Python's lock, and the event loop then waits for the computing threads to get it back: a line at
    a time, that was a third of what the loop did under load, and 5 to 8 % of the requests. (``MemoryHandler`` of logging
    hands its records on one by one.)
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line; the first one sees to it that all are written."""
        self._lines.append(self.format(record))
        if len(self._lines) > 1:
            return
        try:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)
        except RuntimeError:  # no event loop, so nothing that a write holds up
            self.flush()

    def flush(self) -> None:
        """Write what is kept; ``logging`` does so too when the process ends."""
        with self.lock or contextlib.nullcontext():
            lines, self._lines = self._lines, []
            if lines:
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._stream.flush()


def log_to_stderr() -> None:
    """Write the lines to this process's stderr, which Ray keeps beside a replica's other output."""
    if not logger.handlers:
        handler = LineBuffer(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
