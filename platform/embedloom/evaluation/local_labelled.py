"""Local classification, STS, pair classification, bitext and clustering tasks, one subset a language."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from embedloom.errors import DataError
from embedloom.evaluation.languages import language_code
from embedloom.evaluation.local_layout import LocalTask
from embedloom.evaluation.local_tables import (
    Rows,
    by_subset,
    limited,
    read_columns,
    revision_of,
    rows_of_split,
)
from embedloom.evaluation.retrieval_task import ONLY_SUBSET
from embedloom.evaluation.specs import TaskSpec

_TEXT = pa.string()
_PAIR = {"sentence1": _TEXT, "sentence2": _TEXT}
_WHERE = {"lang": _TEXT, "split": _TEXT}
TRAIN = "train"
# Labels of pairs; what is in neither list ("neutral" of NLI) is left out of the task, as mteb's NLI tasks do.
SAME_LABELS = frozenset({"1", "true", "entailment", "paraphrase", "duplicate", "equivalent"})
OTHER_LABELS = frozenset({"0", "false", "contradiction", "not_paraphrase", "not_duplicate", "not_equivalent"})
LEFT_OUT_LABELS = frozenset({"neutral"})

Splits = dict[str, Dataset]


def make_labelled_task(spec: TaskSpec, local: LocalTask) -> AbsTask:
    """The mteb task of a local Parquet file.

    Raises:
        DataError: missing columns or splits, labels nobody knows, or a subset with nothing to tell apart.
    """
    path = Path(local.path)
    base, kind, main_score, columns, fill = _BUILDERS[local.type]
    table = read_columns(path, columns)
    rows = rows_of_split(table, spec.split, path).to_pylist()
    subsets = by_subset(rows, _language_pair if local.type == "bitext" else _language, spec)
    filled = {name: fill(part, table, spec, path) for name, part in subsets.items()}
    if local.type != "bitext" and len(set(table.column("lang").to_pylist())) == 1:
        filled = {ONLY_SUBSET: next(iter(filled.values()))}
        codes: Any = [language_code(next(iter(subsets)))]
    else:
        codes = {name: _codes(part[0]) for name, part in subsets.items()}
    metadata = TaskMetadata(
        name=spec.name,
        description=f"Local task {path.parent.name}/{path.name}",
        dataset={
            "path": f"local/{spec.name}",
            "revision": revision_of(local.files, spec.split, spec.languages, spec.limit),
        },
        type=kind,
        category="t2c" if kind in ("Classification", "Clustering") else "t2t",
        eval_splits=[spec.split],
        eval_langs=codes,
        main_score=main_score,
        is_public=False,
    )
    attributes: dict[str, Any] = {"metadata": metadata}
    if local.type == "clustering":  # mteb's own default embeds 4 % of the texts
        attributes["max_fraction_of_documents_to_embed"] = None
    if local.type == "sts":
        scores = table.column("score").to_pylist()
        attributes |= {"min_score": min(scores), "max_score": max(scores)}
    task: AbsTask = type(f"Local_{spec.name}", (base,), attributes)()
    task.dataset = {name: DatasetDict(splits) for name, splits in filled.items()}
    task.data_loaded = True
    return task


def _language(row: dict[str, Any]) -> str:
    return str(row["lang"])


def _language_pair(row: dict[str, Any]) -> str:
    return f"{row['lang1']}-{row['lang2']}"


def _codes(row: dict[str, Any]) -> list[str]:
    return sorted({language_code(row[key]) for key in ("lang", "lang1", "lang2") if key in row})


def _classification(rows: Rows, table: pa.Table, spec: TaskSpec, path: Path) -> Splits:
    """Training texts of the subset's own language, else (zero-shot transfer) of all languages there are."""
    numbers = {label: number for number, label in enumerate(sorted(set(table.column("label").to_pylist())))}
    train = rows_of_split(table, TRAIN, path).to_pylist()
    train = [row for row in train if row["lang"] == rows[0]["lang"]] or train

    def labelled(chosen: Rows) -> Dataset:
        return Dataset.from_dict(
            {"text": [row["text"] for row in chosen], "label": [numbers[row["label"]] for row in chosen]}
        )

    if len({row["label"] for row in train}) < 2:
        raise DataError(
            f"{path}, {rows[0]['lang']}: the training split has one label; a classifier needs two"
        )
    return {TRAIN: labelled(train), spec.split: labelled(limited(rows, spec.limit, "text"))}


def _sts(rows: Rows, table: pa.Table, spec: TaskSpec, path: Path) -> Splits:
    return {spec.split: _columns(limited(rows, spec.limit, *_PAIR), *_PAIR, "score")}


def _pairs(rows: Rows, table: pa.Table, spec: TaskSpec, path: Path) -> Splits:
    judged = [{**row, "labels": _pair_label(row["label"], path)} for row in rows]
    kept = [row for row in judged if row["labels"] is not None]
    if {row["labels"] for row in kept} != {0, 1}:
        raise DataError(
            f"{path}, {rows[0]['lang']}: needs pairs of both kinds, {sorted(SAME_LABELS)} and {sorted(OTHER_LABELS)}"
        )
    return {spec.split: _columns(limited(kept, spec.limit, *_PAIR), *_PAIR, "labels")}


def _pair_label(label: str, path: Path) -> int | None:
    name = label.lower()
    if name in SAME_LABELS or name in OTHER_LABELS:
        return int(name in SAME_LABELS)
    if name in LEFT_OUT_LABELS:
        return None
    allowed = sorted(SAME_LABELS | OTHER_LABELS | LEFT_OUT_LABELS)
    raise DataError(f"{path}: label {label!r} says neither same nor different; allowed: {', '.join(allowed)}")


def _bitext(rows: Rows, table: pa.Table, spec: TaskSpec, path: Path) -> Splits:
    return {spec.split: _columns(limited(rows, spec.limit, *_PAIR), *_PAIR)}


def _clustering(rows: Rows, table: pa.Table, spec: TaskSpec, path: Path) -> Splits:
    chosen = limited(rows, spec.limit, "text")
    if len({row["label"] for row in chosen}) < 2:
        raise DataError(
            f"{path}, {rows[0]['lang']}: split {spec.split!r} has one label; clustering needs two"
        )
    content = {"sentences": [row["text"] for row in chosen], "labels": [row["label"] for row in chosen]}
    return {spec.split: Dataset.from_dict(content)}


def _columns(rows: Rows, *names: str) -> Dataset:
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names})


Fill = Callable[[Rows, pa.Table, TaskSpec, Path], Splits]
_LABELLED = {"text": _TEXT, "label": _TEXT, **_WHERE}
# type -> mteb's base class, type and main score, the columns, and what fills a subset
_BUILDERS: dict[str, tuple[type[AbsTask], str, str, dict[str, pa.DataType], Fill]] = {
    "classification": (AbsTaskClassification, "Classification", "accuracy", _LABELLED, _classification),
    "sts": (AbsTaskSTS, "STS", "cosine_spearman", {**_PAIR, "score": pa.float64(), **_WHERE}, _sts),
    "pair_classification": (
        AbsTaskPairClassification, "PairClassification", "max_ap", {**_PAIR, "label": _TEXT, **_WHERE}, _pairs,
    ),
    "bitext": (
        AbsTaskBitextMining, "BitextMining", "f1",
        {**_PAIR, "lang1": _TEXT, "lang2": _TEXT, "split": _TEXT}, _bitext,
    ),
    "clustering": (AbsTaskClustering, "Clustering", "v_measure", _LABELLED, _clustering),
}  # fmt: skip
