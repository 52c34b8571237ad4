"""What every query, text or pair of a task contributed to its score, caught while mteb scores it.

Paired tests need more than one number a task. A table row is one item: ``value`` is what the model got for it and
``target``, for statistics that are no mean, what it should have got.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)

from embedloom.evaluation.statistics import Statistic

SCHEMA = pa.schema(
    [("split", pa.string()), ("subset", pa.string()), ("item", pa.string()), ("statistic", pa.string()),
     ("value", pa.float64()), ("target", pa.float64())]
)  # fmt: skip
# Metrics that are means over queries: mteb's key -> trec_eval's.
_PER_QUERY = {"ndcg_at_": "ndcg_cut_", "map_at_": "map_cut_", "recall_at_": "recall_", "precision_at_": "P_"}


@dataclass(slots=True)
class ItemLog:
    """Rows of ``SCHEMA``, growing while mteb runs."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, split: str, subset: str, statistic: Statistic, values: dict[str, float], targets: Any = None
    ) -> None:
        """Append one item for every value."""
        right = [None] * len(values) if targets is None else [float(target) for target in targets]
        self.rows += [
            {
                "split": split,
                "subset": subset,
                "item": item,
                "statistic": statistic,
                "value": float(value),
                "target": target,
            }
            for (item, value), target in zip(values.items(), right, strict=True)
        ]

    def table(self) -> pa.Table:
        """All rows."""
        return pa.Table.from_pylist(self.rows, schema=SCHEMA)


@contextmanager
def watched(task: AbsTask) -> Iterator[ItemLog]:
    """Catch the items of everything mteb scores on ``task`` inside the block.

    mteb hands per-query scores to ``task_specific_scores`` and predictions to the hook that would write them to a
    file; both are methods of the task, and the instance's own attribute shadows them for the while.
    """
    log = ItemLog()
    specific = getattr(task, "task_specific_scores", None)

    def per_query(scores: Any, *arguments: Any, hf_split: str, hf_subset: str) -> Any:
        metric = _query_metric(task.metadata.main_score)
        if metric is not None:
            log.add(hf_split, hf_subset, "mean", {query: found[metric] for query, found in scores.items()})
        return specific(scores, *arguments, hf_split=hf_split, hf_subset=hf_subset) if specific else {}

    def predicted(predictions: Any, model: Any, folder: Any, hf_split: str, hf_subset: str) -> None:
        _log_predictions(log, task, predictions, hf_split, hf_subset)

    hooks: dict[str, Callable[..., Any]] = {"_save_task_predictions": predicted}
    if isinstance(task, AbsTaskRetrieval):
        hooks["task_specific_scores"] = per_query
    for name, hook in hooks.items():
        setattr(task, name, hook)
    try:
        yield log
    finally:
        for name in hooks:
            delattr(task, name)


def log_clustering(log: ItemLog, split: str, scores: dict[str, Any]) -> None:
    """Clustering has no score of a single text: its items are the v-measures of mteb's repeated samples."""
    levels = scores.get("v_measures")
    if isinstance(levels, dict):
        values = {f"{level} {n}": value for level, found in levels.items() for n, value in enumerate(found)}
        log.add(split, scores["hf_subset"], "mean", values)


def _query_metric(main_score: str) -> str | None:
    for ours, theirs in _PER_QUERY.items():
        if main_score.startswith(ours):
            return theirs + main_score.removeprefix(ours)
    return None


def _log_predictions(log: ItemLog, task: AbsTask, predictions: Any, split: str, subset: str) -> None:
    data = (task.dataset or {}).get(subset, task.dataset)
    if isinstance(task, AbsTaskClassification) and task.metadata.type == "Classification":
        labels = np.asarray(data[split][task.label_column_name])
        if all(len(run) == len(labels) for run in predictions):
            log.add(split, subset, "mean", _numbered((np.asarray(predictions) == labels).mean(axis=0)))
    elif isinstance(task, AbsTaskSTS):
        log.add(split, subset, "spearman", _numbered(predictions["cosine_scores"]), data[split]["score"])
    elif isinstance(task, AbsTaskPairClassification):
        rows = data[split][0] if len(data[split]) == 1 else data[split]
        scores = _numbered(predictions["similarity_scores"])
        log.add(split, subset, "average_precision", scores, rows[task.label_column_name])
    elif isinstance(task, AbsTaskBitextMining) and list(predictions) == ["sentence1-sentence2"]:
        gold = data[split].get("gold") if isinstance(data[split], dict) else None  # mteb's BUCC alone has one
        found = predictions["sentence1-sentence2"]
        right = {
            str(n): float(match["corpus_id"] == (n if gold is None else gold[n][1]))
            for n, match in enumerate(found)
        }
        log.add(split, subset, "mean", right)


def _numbered(values: Any) -> dict[str, float]:
    return {str(number): float(value) for number, value in enumerate(values)}
