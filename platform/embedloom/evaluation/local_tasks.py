"""Local tasks in Parquet files: retrieval and reranking, classification, STS, pairs, bitext, clustering; one subset a language."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from embedloom.core.schemas import Schema, check_unique_ids, checked, content_id
from embedloom.core.storage import Place, located
from embedloom.errors import DataError
from embedloom.evaluation.local_layout import (
    CORPUS,
    QRELS_TO_ENGLISH,
    QUERIES,
    LocalTask,
    language_code,
    same_language,
)
from embedloom.evaluation.retrieval_task import ONLY_SUBSET, Query, RetrievalData, make_retrieval_task
from embedloom.evaluation.specs import TaskSpec

# Reading the Parquet files of local tasks: columns checked, languages and splits chosen.


Rows = list[dict[str, Any]]


def read_columns(path: Path, columns: dict[str, pa.DataType], optional: Sequence[str] = ()) -> pa.Table:
    """The named columns of one file, cast.

    Raises:
        DataError: not Parquet, a column missing, empty values where none are allowed, or of another type.
    """
    schema = Schema(path.stem, columns, frozenset(optional))
    return checked(schema, Place(str(path.parent)).read_table(path.name), str(path))


def rows_of_split(table: pa.Table, split: str, path: Path) -> pa.Table:
    """Rows of one split.

    Raises:
        DataError: there are none; the message names the splits there are.
    """
    chosen = table.filter(pc.equal(table.column("split"), split))
    if not chosen.num_rows:
        there = sorted(set(table.column("split").to_pylist()))
        raise DataError(f"{path}: no row of split {split!r}; the file has {there}")
    return chosen


def by_subset(rows: Rows, key: Any, spec: TaskSpec) -> dict[str, Rows]:
    """Rows by subset name, sorted by name; only those that the task's ``languages`` allow.

    Raises:
        DataError: none of them is left.
    """
    subsets: dict[str, Rows] = {}
    for row in rows:
        subsets.setdefault(key(row), []).append(row)
    kept = {name: subsets[name] for name in sorted(subsets) if wanted(name, spec)}
    if not kept:
        raise DataError(
            f"{spec.where}: languages is {list(spec.languages or ())}; the task has {sorted(subsets)}"
        )
    return kept


def wanted(subset: str, spec: TaskSpec) -> bool:
    """Whether ``languages`` allows a subset; one of a language pair is enough."""
    if spec.languages is None:
        return True
    names = [subset, *subset.split("-")]
    return any(same_language(name, lang) for name in names for lang in spec.languages)


def limited(rows: Rows, limit: int | None, *keys: str) -> Rows:
    """At most ``limit`` rows in their order, chosen by a hash of the named columns."""
    if limit is None or limit >= len(rows):
        return rows
    drawn = sorted(
        range(len(rows)), key=lambda i: content_id("evaluation row", *(str(rows[i][key]) for key in keys))
    )
    return [rows[position] for position in sorted(drawn[:limit])]


def revision_of(files: Sequence[Path], *choices: Any) -> str:
    """Sixteen hex digits over the files' content and what was chosen of them."""
    digest = hashlib.sha256(repr(choices).encode())
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()[:16]


# Local retrieval and reranking tasks: corpus, queries and qrels, one subset a query language.


_TEXT = pa.string()
_CORPUS = {"id": _TEXT, "text": _TEXT, "title": _TEXT, "lang": _TEXT}
_QUERIES = {"id": _TEXT, "text": _TEXT, "lang": _TEXT, "split": _TEXT}
_QRELS = {"query_id": _TEXT, "doc_id": _TEXT, "score": pa.int64()}
Qrels = dict[str, dict[str, int]]


def make_ranked_task(spec: TaskSpec, local: LocalTask) -> AbsTaskRetrieval:
    """The mteb task of a local folder.

    A subset searches the documents in the languages of its own judged documents, so a task with translations of one
    corpus is scored language by language. In reranking, the judged documents of a query are its candidates.

    Raises:
        DataError: missing columns, unknown ids, or no relevant judgement in a subset.
    """
    folder = located(local.path)
    corpus = read_columns(folder / CORPUS, _CORPUS, optional=("title",))
    check_unique_ids(corpus, str(folder / CORPUS))
    queries = read_columns(folder / QUERIES, _QUERIES)
    check_unique_ids(queries, str(folder / QUERIES))
    qrels = _judgements(folder / local.qrels, queries, corpus)
    judged = [
        row for row in rows_of_split(queries, spec.split, folder / QUERIES).to_pylist() if row["id"] in qrels
    ]
    if not judged:
        raise DataError(f"{folder / local.qrels}: judges no query of split {spec.split!r}")
    documents = corpus.to_pylist()
    languages = {row["id"]: row["lang"] for row in documents}
    revision = revision_of(local.files, spec.split, spec.languages)
    reranks = local.type == "reranking"
    subsets = {
        name: _subset(rows, documents, languages, qrels, f"{folder}, {name}", revision, reranks).limited(
            spec.limit
        )
        for name, rows in by_subset(judged, lambda row: row["lang"], spec).items()
    }
    if len({row["lang"] for row in queries.to_pylist()}) == 1 and local.qrels != QRELS_TO_ENGLISH:
        subsets = {ONLY_SUBSET: next(iter(subsets.values()))}
    kind: Literal["Retrieval", "Reranking"] = "Reranking" if reranks else "Retrieval"
    return make_retrieval_task(spec.name, spec.split, subsets, kind, spec.ignore_identical_ids)


def _judgements(path: Path, queries: pa.Table, corpus: pa.Table) -> Qrels:
    known = {
        "query_id": set(queries.column("id").to_pylist()),
        "doc_id": set(corpus.column("id").to_pylist()),
    }
    found: Qrels = {}
    for row in read_columns(path, _QRELS).to_pylist():
        for key, ids in known.items():
            if row[key] not in ids:
                raise DataError(
                    f"{path}: {key} {row[key]!r} is not in {QUERIES if key == 'query_id' else CORPUS}"
                )
        found.setdefault(row["query_id"], {})[row["doc_id"]] = row["score"]
    return found


def _subset(
    queries: Rows,
    documents: Rows,
    languages: dict[str, str],
    qrels: Qrels,
    where: str,
    revision: str,
    reranks: bool,
) -> RetrievalData:
    grades = {row["id"]: qrels[row["id"]] for row in queries}
    if not any(grade > 0 for judged in grades.values() for grade in judged.values()):
        raise DataError(f"{where}: no judgement above 0, so there is nothing to find")
    if reranks:
        wanted = {document for judged in grades.values() for document in judged}
        chosen = [row for row in documents if row["id"] in wanted]
    else:
        searched = {languages[document] for judged in grades.values() for document in judged}
        chosen = [row for row in documents if row["lang"] in searched]
    return RetrievalData(
        documents=[(row["id"], row["title"] or "", row["text"]) for row in chosen],
        queries=[Query(row["id"], row["text"]) for row in queries],
        qrels=grades,
        languages=tuple(sorted({row["lang"] for row in [*queries, *chosen]})),
        revision=revision,
        description=f"Local task {where}",
        candidates={query: list(judged) for query, judged in grades.items()} if reranks else None,
    )


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
    path = located(local.path)
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
