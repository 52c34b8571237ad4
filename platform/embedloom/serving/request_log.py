"""One JSON line a request, on stderr: what was asked and what it cost, and its texts only where that is wanted."""

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import to_json

RequestLog = Literal["none", "facts", "texts"]
SCOPE_KEY = "embedloom.facts"
logger = logging.getLogger("embedloom.serving.requests")
_TEXT_CHARACTERS = 1000  # of one logged text


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


def log_to_stderr() -> None:
    """Write the lines to this process's stderr, which Ray keeps beside a replica's other output."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
