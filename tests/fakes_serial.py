"""Synthesis without Ray: tasks and actors run one after another in the test's own process, through pickles as Ray would."""

import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import embedloom.synthesis.stage  # noqa: F401 - so that every module that runs tasks is there to be patched
from embedloom.compute.shards import PLAIN, Handling


def serial_tasks(stage: str, function: Any, items: Any, *shared: Any, cpus: float = 0.5) -> Iterator[Any]:
    """In place of engines.tasks.run_tasks."""
    for item in items:
        yield function(*pickle.loads(pickle.dumps((item, *shared))))


def serial_stream(
    *, stage: str, items: Any, read: Any, write: Any, written: Any, worker: Any, worker_arguments: Any,
    done_folder: str, pool: Any, handling: Handling = PLAIN, name: Any = str,
) -> Iterator[int]:  # fmt: skip
    """In place of engines.pool.stream; one actor of each pool."""
    actor = worker(**worker_arguments) if worker else None
    linked = [link.worker(**link.arguments) for link in handling.links]
    for position, item in enumerate(items):
        item = pickle.loads(pickle.dumps(item))
        assert not written(item)
        table = read(item)
        tables = {"": table if handling.prepare is None else handling.prepare(table)}
        if actor is not None:
            tables = actor(tables[""])
        if handling.finish is not None:
            tables = handling.finish(tables)
        for folder, table in tables.items():
            write(item, folder, table)
        for one in linked:
            one(name(item))
        yield position


def patch_serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put both in place, wherever they were imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("embedloom.synthesis") and hasattr(module, "run_tasks"):
            monkeypatch.setattr(module, "run_tasks", serial_tasks)
    monkeypatch.setattr("embedloom.compute.shards.stream", serial_stream)
