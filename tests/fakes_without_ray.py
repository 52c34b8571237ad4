"""Every data stage without Ray: tasks, actors and searches run one after another in this process."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from fakes_serial import serial_stream, serial_tasks

_MODULES = ("corpus.stage", "synthesis.stage", "mining.stage", "merging.stage", "retrieval.corpora")


def serial_search(
    *, stage: str, catalogue: Any, items: int, task: Any, k: int, pool: Any, memory_bytes: int = 2**30
) -> Iterator[int]:
    """In place of retrieval.sharded.search_sharded; one share."""
    from embedloom.retrieval.sharded import VectorStore, choose, rank

    store = VectorStore(catalogue, memory_bytes, (0, 1))
    for number in range(items):
        asked = task.read(number)
        near, pairs = choose([store.nominate(asked.queries, k, asked.rows, asked.positions)], k)
        task.finish(number, rank(near, [store.score(asked.queries, *near.unscored())], k), pairs)
        yield number


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the serial ones in place wherever a stage imported the real ones."""
    for name in _MODULES:
        importlib.import_module(f"embedloom.{name}")
    serial = {"run_tasks": serial_tasks, "stream": serial_stream, "search_sharded": serial_search}
    for name, module in list(sys.modules.items()):
        if name.startswith("embedloom."):
            for attribute, replacement in serial.items():
                if hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, replacement)
