"""Answers of a shard as they come in, so that a killed process asks no server twice for what it has."""

import json
import time
from dataclasses import asdict
from typing import IO, Any
from uuid import uuid4

from embedloom.compute.generation import GenerationResult
from embedloom.core.storage import Place

_REMOTE_LINES = 32  # answers of one file in an object store, where nothing can be appended
_REMOTE_SECONDS = 2.0


class AnswerJournal:
    """Lines of JSON, one an answer, in files of their own for each process that works on the shard.

    On a disk a line is appended as soon as its answer is there; what is half-written was killed with its process. An object
    store gets a file for every 32 answers or two seconds.
    """

    def __init__(self, place: Place, folder: str) -> None:
        self._place = place
        self._folder = folder
        self._stream: IO[bytes] | None = None
        self._waiting: list[bytes] = []
        self._waits_since = 0.0

    def read(self) -> dict[str, GenerationResult]:
        """Every answer, by the id of its request."""
        found: dict[str, GenerationResult] = {}
        for name in self._place.names(self._folder, ".jsonl"):
            for line in self._place.read_bytes(name).split(b"\n"):
                if (row := _parsed(line)) is not None:
                    found[row["id"]] = GenerationResult(**row)
        return found

    def add(self, result: GenerationResult) -> None:
        """Keep one answer."""
        line = json.dumps(asdict(result), ensure_ascii=True).encode() + b"\n"
        if self._place.is_local:
            self._opened().write(line)
            return
        if not self._waiting:
            self._waits_since = time.monotonic()
        self._waiting.append(line)
        if len(self._waiting) >= _REMOTE_LINES or time.monotonic() - self._waits_since > _REMOTE_SECONDS:
            self._write()

    def close(self) -> None:
        """Keep what is still held."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._waiting:
            self._write()

    def _opened(self) -> IO[bytes]:
        if self._stream is None:
            folder = self._place.local / self._folder
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is the kernel's once it is written, whatever becomes of this process.
            self._stream = (folder / f"{uuid4().hex}.jsonl").open("ab", buffering=0)
        return self._stream

    def _write(self) -> None:
        self._place.write_bytes(f"{self._folder}/{uuid4().hex}.jsonl", b"".join(self._waiting))
        self._waiting = []


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole line; None of one that ends half-written."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return (
        row if isinstance(row, dict) and row.keys() == GenerationResult.__dataclass_fields__.keys() else None
    )
