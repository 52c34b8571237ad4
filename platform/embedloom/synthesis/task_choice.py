"""Which brainstormed task an attempt is written for: another generator's, for the stated share of the rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embedloom.errors import StageError
from embedloom.ngrams import hash64
from embedloom.storage import Place
from embedloom.synthesis.quotas import Cell


@dataclass(frozen=True, slots=True)
class Task:
    """A brainstormed sentence and who wrote it."""

    id: str
    generator: str
    text: str


def picks_other(ordinal: int, share: float) -> bool:
    """Whether this ordinal's task is another generator's: exactly ``share`` of any long stretch, evenly spread."""
    return math.floor((ordinal + 1) * share) > math.floor(ordinal * share)


class TaskChoice:
    """Draws the tasks of one cell by hash; where one side has no task, the other side's are drawn from."""

    def __init__(self, tasks: Sequence[Task], cell: Cell, cross_model: float, seed: int) -> None:
        ordered = sorted(tasks, key=lambda task: task.id)
        self._others = [task for task in ordered if task.generator != cell.generator]
        self._own = [task for task in ordered if task.generator == cell.generator]
        if not ordered:
            raise StageError(f"synthesize: no task was brainstormed for family {cell.family}")
        self._cell = cell
        self._share = cross_model
        self._seed = seed

    @classmethod
    def read(cls, place: Place, folder: str, cell: Cell, cross_model: float, seed: int) -> "TaskChoice":
        """The tasks of the cell's family in a folder."""
        tasks = [
            Task(row["id"], row["generator"], row["text"])
            for name in place.names(folder, ".parquet")
            for row in place.read_table(name).to_pylist()
            if row["family"] == cell.family
        ]
        return cls(tasks, cell, cross_model, seed)

    def pick(self, ordinal: int) -> Task:
        """The task of an attempt."""
        chosen = self._others or self._own if picks_other(ordinal, self._share) else self._own or self._others
        return chosen[hash64(f"{self._seed}:{self._cell.name}:{ordinal}:task") % len(chosen)]
