"""The tables that pass between stages: column names, types, and the check every reader and writer runs.

Ids are strings. An id made here is a content hash, so the same text has the same id in every run.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import pyarrow as pa

from embedloom.errors import DataError

TASK_TYPES = (
    "retrieval",
    "reranking",
    "instruction_reranking",
    "classification",
    "multilabel_classification",
    "clustering",
    "sts",
    "pair_classification",
    "bitext",
)
ORIGINS = ("public", "synthetic", "in_domain")
GRADE = "grade"  # key of a pair's attributes: how relevant its document is, above 0; 1 where none is given
ID_HEX_DIGITS = 24  # 96 bits: a collision among 10^10 rows has a chance of about 10^-9


ByTask = dict[str, dict[str, float]]  # model -> task -> score


class ScoredPrompts(TypedDict):
    """What stood before the queries of one task for one model."""

    sent: list[str]  # different ones, "{text}" in place of the text
    default: str  # what the endpoint sends where a request names no task
    of: str  # whose prompts they are: default, own, published
    stated: bool  # whether the task's config says so


class ScoreTable(TypedDict):
    """``scores.json`` of an evaluation: scores between 0 and 1 of models and baselines, by task."""

    order: dict[
        str, list[str]
    ]  # "tasks", "models", "baselines" as the config has them; JSON on disk is sorted
    models: ByTask  # main scores
    baselines: ByTask
    metrics: dict[str, dict[str, dict[str, dict[str, float]]]]  # group -> model -> task -> metric -> value
    subsets: NotRequired[dict[str, dict[str, dict[str, dict[str, float]]]]]  # of tasks in several languages
    types: NotRequired[dict[str, str]]  # task -> type, as mteb names it
    prompts: NotRequired[dict[str, dict[str, ScoredPrompts]]]  # task -> model
    intervals: NotRequired[
        dict[str, dict[str, dict[str, list[float]]]]
    ]  # group -> model -> task -> [low, high]
    ranking: NotRequired[dict[str, Any]]
    teacher: NotRequired[str]  # model of the baseline of that name


@dataclass(frozen=True, slots=True)
class Schema:
    """Columns of one kind of table; ``optional`` may be absent, every other must be there without nulls."""

    kind: str
    columns: dict[str, pa.DataType]
    optional: frozenset[str] = frozenset()

    @property
    def required(self) -> list[str]:
        """Names of the columns that must be there."""
        return [name for name in self.columns if name not in self.optional]

    def arrow(self) -> pa.Schema:
        """All columns, optional ones nullable, in the order they are written."""
        return pa.schema(
            [pa.field(name, dtype, nullable=name in self.optional) for name, dtype in self.columns.items()]
        )


_TEXTS = pa.list_(pa.string())
_SCORES = pa.list_(pa.float32())

SCHEMAS: dict[str, Schema] = {
    schema.kind: schema
    for schema in (
        Schema(
            "documents",
            {
                "id": pa.string(),
                "text": pa.string(),
                "title": pa.string(),
                "lang": pa.string(),
                "source": pa.string(),
            },
            frozenset({"title", "lang"}),
        ),
        Schema(
            "pairs",
            {
                "id": pa.string(),
                "query": pa.string(),
                "document_id": pa.string(),
                "positive": pa.string(),
                "negatives": _TEXTS,
                "task_type": pa.string(),
                "instruction": pa.string(),
                "lang": pa.string(),
                "document_lang": pa.string(),
                "origin": pa.string(),
                "generator": pa.string(),
                "prompt_hash": pa.string(),
                # JSON of what was drawn for a synthetic row: persona, length, target scores; of a judged pair its
                # ``grade``, where that is not 1.
                "attributes": pa.string(),
                # What training sources call the row's pairs; null: the origin.
                "dataset": pa.string(),
            },
            frozenset({"positive", "negatives", "generator", "prompt_hash", "attributes", "dataset"}),
        ),
        Schema(
            "candidates",
            {
                "query_id": pa.string(),
                "document_ids": _TEXTS,
                "scores": _SCORES,
                "teacher": pa.string(),
                "contract_hash": pa.string(),
            },
        ),
        Schema(
            "examples",
            {
                "id": pa.string(),
                "query": pa.string(),
                "query_instruction": pa.string(),
                "positive": pa.string(),
                "positive_score": pa.float32(),
                "negatives": _TEXTS,
                "negative_scores": _SCORES,
                "document_instruction": pa.string(),
                "task_type": pa.string(),
                "dataset": pa.string(),
            },
            frozenset({"document_instruction"}),
        ),
        # Of the documents that were cut: which chunk, from 1, of how many each row is.
        Schema(
            "chunks",
            {"id": pa.string(), "document_id": pa.string(), "chunk": pa.int32(), "chunks": pa.int32()},
        ),
        Schema(
            "rejects",
            {"id": pa.string(), "reason": pa.string(), "detail": pa.string()},
        ),
    )
}


# Beside examples that several teachers were asked about, row for row: what each of them says of the documents.
TEACHER_SCORES_FOLDER = "teacher_scores"
TEACHER_SCORES_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("teachers", pa.list_(pa.string())),
        ("positive_scores", pa.list_(pa.float32())),  # of each teacher
        (
            "negative_scores",
            pa.list_(pa.list_(pa.float32())),
        ),  # of each teacher, of each negative; null: none
    ]
)


def content_id(*parts: str) -> str:
    """Hash the parts into an id; ``("ab", "c")`` and ``("a", "bc")`` differ."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:ID_HEX_DIGITS]


def table_from_rows(kind: str, rows: Iterable[dict[str, object]]) -> pa.Table:
    """Build a checked table of ``kind``; absent optional columns become nulls.

    Raises:
        DataError: a row lacks a required column, or a value does not fit its type.
    """
    schema = SCHEMAS[kind].arrow()
    listed = list(rows)
    unknown = {key for row in listed for key in row} - set(schema.names)
    if unknown:
        raise DataError(f"{kind} row has unknown column {sorted(unknown)[0]!r}; columns are {schema.names}")
    try:
        table = pa.Table.from_pylist(listed, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{kind} row does not fit its schema: {error}") from error
    return check_table(kind, table, source=f"new {kind} rows")


def check_table(kind: str, table: pa.Table, source: str) -> pa.Table:
    """Return ``table`` with exactly the columns of ``kind``, cast and ordered; extra columns are dropped.

    Args:
        kind: one of ``SCHEMAS``.
        table: any Arrow table.
        source: the file or stage, named in the error.

    Raises:
        DataError: a required column is missing, holds nulls, or cannot be cast.
    """
    return checked(SCHEMAS[kind], table, source)


def checked(schema: Schema, table: pa.Table, source: str) -> pa.Table:
    """``check_table`` by any schema."""
    columns = []
    for name, dtype in schema.columns.items():
        if name not in table.column_names:
            if name not in schema.optional:
                raise DataError(
                    f"{source}: no column {name!r}; a {schema.kind} table needs {schema.required}, found {table.column_names}"
                )
            columns.append(pa.nulls(table.num_rows, dtype))
            continue
        column = table.column(name)
        if name not in schema.optional and column.null_count:
            raise DataError(
                f"{source}: column {name!r} has {column.null_count} nulls; a {schema.kind} table allows none there"
            )
        columns.append(cast_column(column, dtype, f"{source}: column {name!r}"))
    return pa.table(columns, schema=schema.arrow())


def cast_column(column: pa.ChunkedArray, dtype: pa.DataType, where: str) -> pa.ChunkedArray:
    """A column as another type.

    Raises:
        DataError: its values have no such form; the message begins with ``where``.
    """
    try:
        return column.cast(dtype)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where} is {column.type}, expected {dtype}: {error}") from error


def check_unique_ids(table: pa.Table, source: str, column: str = "id") -> None:
    """Raise DataError naming the first id that stands twice in ``column``."""
    counts = table.column(column).value_counts()
    for entry in counts.to_pylist():
        if entry["counts"] > 1:
            raise DataError(
                f"{source}: {column} {entry['values']!r} stands {entry['counts']} times; ids must be unique"
            )
