"""Development tasks for a model that is still in training: the texts it has to embed, then mteb's scores of the vectors.

Training embeds on all of its workers, as only together they hold a model that is sharded; this module never calls the
model itself. Tasks are opened in the process that scores them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from embedloom.artefacts import Artefact
from embedloom.config.training_options import DevScoring
from embedloom.config.use import EvaluationTask
from embedloom.encoder.model import Encoder, Vectors
from embedloom.errors import ConfigError, StageError
from embedloom.evaluation.results import DECIMALS
from embedloom.evaluation.scoring import score_subset
from embedloom.evaluation.specs import TaskSpec, expand_tasks
from embedloom.evaluation.tasks import build_task, check_task
from embedloom.evaluation.texts import list_texts
from embedloom.evaluation.vector_store import VectorTable
from embedloom.evaluation.wrapper import EncoderModel


@dataclass(frozen=True, slots=True)
class DevTasks:
    """Which tasks, and what of them counts; picklable."""

    specs: tuple[TaskSpec, ...]
    corpus: Artefact | None
    metric: str

    def open(self, encoder: Encoder) -> "DevBench":
        """Load the tasks and list their texts."""
        return DevBench(self, encoder)


class DevBench:
    """Loaded tasks and the distinct texts of all of them."""

    def __init__(self, tasks: DevTasks, encoder: Encoder) -> None:
        datasets.disable_progress_bars()
        self._metric = tasks.metric
        self._tasks = [build_task(spec, tasks.corpus) for spec in tasks.specs]
        self._instructed = [spec.instructed for spec in tasks.specs]
        lists = [
            list_texts(task, None, encoder.contract, instructed)
            for task, instructed in zip(self._tasks, self._instructed, strict=True)
        ]
        keys = np.concatenate([own.keys for own in lists])
        _, first = np.unique(keys, axis=0, return_index=True)
        kept = np.sort(first)
        self._keys = keys[kept]
        entries = [(own.task_type, entry) for own in lists for entry in own.entries]
        chosen = [entries[position] for position in kept]
        self.token_ids: list[list[int]] = [[] for _ in chosen]
        for side in ("query", "document"):
            rows = [row for row, (_, entry) in enumerate(chosen) if entry.side == side]
            ids = encoder.tokenize(
                [chosen[row][1].text for row in rows], side,
                [chosen[row][0] for row in rows], [chosen[row][1].instruction for row in rows],
            )  # fmt: skip
            for row, own in zip(rows, ids, strict=True):
                self.token_ids[row] = own
        self._model = _VectorsOnly(encoder, "embedloom/in-training", "none")

    def score(self, vectors: Vectors) -> dict[str, float]:
        """The metric of every task, a mean over its splits and language subsets.

        Args:
            vectors: of ``token_ids``, in order.
        """
        self._model.known = VectorTable(self._keys, vectors)
        scores = {}
        for task, instructed in zip(self._tasks, self._instructed, strict=True):
            self._model.instructed = instructed
            files, _ = score_subset(self._model, task)
            splits = json.loads(files[f"{task.metadata.name}.json"])["scores"].values()
            values = [float(entry[self._metric]) for entries in splits for entry in entries]
            scores[task.metadata.name] = round(sum(values) / len(values), DECIMALS)
        return scores


class _VectorsOnly(EncoderModel):
    """Knows the vectors it was given and makes none."""

    def _embed(self, texts: list[str], role: Any, instruction: Any) -> Vectors:
        raise StageError(
            f"dev scoring: mteb asks for {len(texts)} texts that are not among the task's, first {texts[0][:80]!r}"
        )


def dev_tasks(config: DevScoring, judged: tuple[EvaluationTask, ...], corpus: Artefact | None) -> DevTasks:
    """The tasks of ``training.dev``, checked; nothing is loaded.

    Args:
        config: ``training.dev``.
        judged: ``evaluation.tasks``, none of which may be among them, not even as part of a benchmark.
        corpus: of the run, for its own dev split.

    Raises:
        ConfigError: a task that the run is judged on, or that ranks no documents.
        DataError: a task that is not there.
    """
    # Training workers have another working directory.
    own = [
        task
        if task.path is None
        else task.model_copy(update={"path": str(Path(task.path).expanduser().absolute())})
        for task in config.tasks
    ]
    specs = expand_tasks(own)
    if any(spec.kind == "mteb" for spec in specs):
        tested = {spec.name for spec in expand_tasks([t for t in judged if t.kind in ("mteb", "benchmark")])}
        for spec in specs:
            if spec.kind == "mteb" and spec.name in tested:
                raise ConfigError(
                    f"training.dev.tasks: {spec.name!r} is among evaluation.tasks; choosing weights by it would tune "
                    "them to the test; allowed: tasks that are not evaluated"
                )
    for spec in specs:
        if not check_task(spec, corpus):
            raise ConfigError(
                f"training.dev.tasks: {spec.name!r} ranks no documents, so it has no {config.metric}; "
                "allowed: retrieval and reranking tasks"
            )
    readable = corpus and Artefact(corpus.place.absolute(), corpus.manifest)
    return DevTasks(tuple(specs), readable, config.metric)
