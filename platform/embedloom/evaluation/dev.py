"""Scores outside of an evaluation: on development tasks, of a model that is still in training and of the merges of a search,
and what 8-bit layers cost a model on its run's held-out queries.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import numpy as np

from embedloom.config.cluster import PoolConfig
from embedloom.config.evaluation import EvaluationTask
from embedloom.config.training import DevScoring
from embedloom.core.artefacts import Artefact
from embedloom.core.model_folder import ModelFolder
from embedloom.core.storage import Place, located
from embedloom.core.verdict import Int8Verdict, int8_verdict
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.model import Encoder, Vectors
from embedloom.encoder.registry import NodeModel
from embedloom.errors import ConfigError, StageError
from embedloom.evaluation.evaluator import Evaluator
from embedloom.evaluation.jobs import Unit, VectorTable
from embedloom.evaluation.leaderboard import read_strata
from embedloom.evaluation.results import DECIMALS, read_scores
from embedloom.evaluation.scorers import make_scorers
from embedloom.evaluation.scoring import EncoderModel, run_mteb, score_subset
from embedloom.evaluation.specs import TaskSpec, expand_tasks
from embedloom.evaluation.tasks import build_task, check_task, task_size
from embedloom.evaluation.texts import list_texts

# Development tasks for a model that is still in training: the texts it has to embed, then mteb's scores of the vectors.
#
# Training embeds on all of its workers, as only together they hold a model that is sharded; this module never calls the
# model itself. Tasks are opened in the process that scores them.


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
        task if task.path is None else task.model_copy(update={"path": str(located(task.path).absolute())})
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


# Main scores and per-item scores of one model folder after another, for merge searches on development tasks.


_SHARD_TEXTS = 4096


class DevScorer:
    """Scores model folders on the same tasks; actors stay warm from one to the next."""

    def __init__(
        self,
        tasks: Sequence[EvaluationTask],
        corpus: Artefact | None,
        pool: PoolConfig,
        place: Place,
        dtype: DTypeName,
    ) -> None:
        """Check the tasks; start nothing.

        Args:
            tasks: what to score on.
            corpus: of the run, for ``heldout`` tasks.
            pool: actors and what each reserves.
            place: scratch folder of results and vectors; a folder scored before is read back from it.
            dtype: compute type.

        Raises:
            UserError: a task that cannot be scored.
        """
        self._tasks = expand_tasks(tasks)
        for task in self._tasks:
            check_task(task, corpus)
        self._place = place
        self._evaluator = Evaluator(
            self._tasks, corpus, pool, place, place.child("vectors"), dtype, _SHARD_TEXTS
        )

    def __enter__(self) -> "DevScorer":
        """The scorer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the actors."""
        self._evaluator.__exit__(kind, error, trace)

    def __call__(
        self, name: str, folder: Path | NodeModel
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Score one model folder.

        Args:
            name: of the model, in progress lines; results are kept under the folder's fingerprint.
            folder: a model folder.

        Returns:
            Main score by task, and by task the value of each item (``split/subset/item``); a task whose score is no
            mean of items (STS, pair classification) has none.

        Raises:
            StageError: a task could not be scored.
        """
        (scorer,), contracts = make_scorers({name: folder}, (), None)
        named = scorer.under(f"{name}-{scorer.revision}")
        units = [Unit(named, task) for task in self._tasks]
        failures = self._evaluator.score(units, contracts)
        if failures:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
            raise StageError(f"{name}: could not be scored: {reasons}")
        scores = {unit.task.name: read_scores(self._place, unit)["main_score"] for unit in units}
        items = {
            unit.task.name: {
                f"{stratum.key}/{item}": float(value)
                for stratum in read_strata(self._place, unit)
                if stratum.targets is None
                for item, value in zip(stratum.items, stratum.values, strict=True)
            }
            for unit in units
        }
        return scores, items


# What 8-bit linear layers cost a model on its run's held-out queries; ``int8.json`` beside the weights keeps it.


def measure_int8(folder: Path, corpus: Artefact, threads: int, split: str = "test") -> Int8Verdict:
    """Rank the held-out queries' documents with float32 and with int8 layers, queries and documents alike.

    Texts get the instructions that the endpoint sends by default.

    Args:
        folder: the model.
        corpus: of the run that made it.
        threads: to compute with.
        split: of the held-out queries.

    Returns:
        The content of ``int8.json``, not written yet.

    Raises:
        DataError: the corpus has no such queries.
        ConfigError: this CPU has no kernel for int8.
    """
    spec = TaskSpec("heldout", split=split)
    task = build_task(spec, corpus)
    scores = {}
    types: tuple[DTypeName, ...] = (
        "int8",
        "float32",
    )  # int8 first: where it is not to be had, that is known at once
    for dtype in types:
        model = EncoderModel(Encoder.load(folder, threads=threads, dtype=dtype), f"embedloom/{dtype}", "1")
        model.instructed = spec.instructed
        scores[dtype] = _ndcg(run_mteb(model, task)[f"{task.metadata.name}.json"], split)
    return int8_verdict(
        ModelFolder(folder).weights, scores["float32"], scores["int8"], task_size(task)["queries"]
    )


def _ndcg(result: bytes, split: str) -> float:
    """nDCG@10 out of mteb's result file of one task without subsets."""
    (entry,) = json.loads(result)["scores"][split]
    return float(entry["ndcg_at_10"])
