"""Sinks for ``Dataset.write_datasink``: rows with vectors into files and databases, each id once, however often it is written.

A killed or retried task is run again by Ray, and a killed job by its user. Whatever is written twice replaces itself, by id, and
``missing`` leaves what is there already out of a dataset before it is embedded.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink

from embedloom.errors import ConfigError, DataError
from embedloom.raydata.embedding import scale_column
from embedloom.retrieval.stored import SCALE_COLUMN, stored_vectors

if TYPE_CHECKING:
    from ray.data import Dataset


class VectorStore(Protocol):
    """Where rows go: small and picklable; connects where it is called.

    Tables have the sink's column of ids and vectors as ``fixed_size_list<float32>``, no nulls in either, and any others.
    """

    @property
    def rows(self) -> int:
        """Rows of one request or transaction."""
        ...

    def prepare(self, schema: pa.Schema, id_column: str, vector_column: str) -> None:
        """Make the table or collection if it is not there, else check that these rows fit it; called on the driver.

        Raises:
            DataError: what is there holds vectors of another size, or has other columns.
        """
        ...

    def upsert(self, rows: pa.Table, id_column: str, vector_column: str) -> None:
        """Write rows of different ids; each replaces what is there under its id. All of them, or an error."""
        ...

    def present(self, ids: list[Any], id_column: str) -> set[Any]:
        """Which ids are there."""
        ...


class VectorSink(Datasink[int]):
    """Rows with vectors into a store, each id once; for ``Dataset.write_datasink``.

    Vectors are written as float32; int8 and binary ones are brought back by their scales. All other columns go along. Two rows of
    one id are an error in one batch; in different ones the later stays.
    """

    def __init__(self, store: VectorStore, *, id_column: str = "id", vector_column: str = "vector") -> None:
        """Describe the columns.

        Args:
            store: where the rows go.
            id_column: texts or whole numbers, without nulls.
            vector_column: what ``embedloom.embed`` made.
        """
        self.store = store
        self.id_column, self.vector_column = id_column, vector_column

    def missing(self, dataset: "Dataset", *, batch_size: int = 8192, num_cpus: float = 0.5) -> "Dataset":
        """The rows of a dataset whose ids are not in the store yet; lazy, asked batch by batch in tasks.

        Before ``embedloom.embed`` it makes a job that was killed go on where it ended. Ids decide, not texts: where texts were
        changed, leave it out, and every row is embedded and replaced.

        Args:
            dataset: any with the column of ids.
            batch_size: ids that are asked for at once.
            num_cpus: that a task reserves; it mostly waits.
        """
        return dataset.map_batches(
            without_present,
            fn_kwargs={"store": self.store, "id_column": self.id_column},
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=num_cpus,
        )

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """Prepare the store.

        Raises:
            DataError: the rows have no ids or vectors, or do not fit what is there.
        """
        if schema is None or not len(schema):
            return
        rows = float_rows(_arrow(schema).empty_table(), self.id_column, self.vector_column)
        self.store.prepare(rows.schema, self.id_column, self.vector_column)

    def write(self, blocks: Iterable[Block], ctx: Any) -> int:
        """Write blocks; returns how many rows they had.

        Raises:
            DataError: an id that is null or stands twice in a batch, or a vector that is none.
        """
        written = 0
        for block in blocks:
            for rows in _batches(BlockAccessor.for_block(block).to_arrow(), self.store.rows):
                rows = float_rows(rows, self.id_column, self.vector_column)
                check_ids(rows.column(self.id_column), self.id_column)
                self.store.upsert(rows, self.id_column, self.vector_column)
                written += rows.num_rows
        return written


def _batches(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    return (table.slice(start, rows) for start in range(0, table.num_rows, rows))


def _arrow(schema: Any) -> pa.Schema:
    """Arrow's schema, out of Ray's or pandas' own."""
    return (
        schema if isinstance(schema, pa.Schema) else pa.schema(zip(schema.names, schema.types, strict=True))
    )


class Presence(Protocol):
    """What knows which ids are there."""

    def present(self, ids: list[Any], id_column: str) -> set[Any]:
        """Which of these."""
        ...


def without_present(batch: pa.Table, store: Presence, id_column: str) -> pa.Table:
    """A batch without the rows whose ids are in a store.

    Raises:
        DataError: no such column.
    """
    if id_column not in batch.column_names:
        raise DataError(f"id_column: no column {id_column!r}; columns found: {batch.column_names}")
    ids = batch.column(id_column).to_pylist()
    there = store.present(ids, id_column)
    return batch.filter(pa.array([one not in there for one in ids], pa.bool_()))


def float_rows(rows: pa.Table, id_column: str, vector_column: str) -> pa.Table:
    """The rows with their vectors as ``fixed_size_list<float32>``, and without the scales that brought them there.

    Raises:
        DataError: a column that is missing or of another type, or null or unequal vectors.
    """
    for key, name in (("id_column", id_column), ("vector_column", vector_column)):
        if name not in rows.column_names:
            raise DataError(f"{key}: no column {name!r}; columns found: {rows.column_names}")
    kind = rows.schema.field(id_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise DataError(f"id_column: column {id_column!r} is {kind}; allowed: text or whole numbers")
    column = _plain(rows.column(vector_column))
    if column.null_count:
        raise DataError(
            f"vector_column: column {vector_column!r} holds {column.null_count} nulls; drop rows without a text"
        )
    scale = scale_column(vector_column)
    named = {"id": rows.column(id_column), "vector": column}
    if scale in rows.column_names and not pa.types.is_floating(column.type.value_type):
        named[SCALE_COLUMN] = rows.column(scale)
        rows = rows.drop_columns([scale])
    vectors = stored_vectors(pa.table(named), f"column {vector_column!r}")
    width = vectors.shape[1] or int(getattr(column.type, "list_size", 0))
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    place = rows.column_names.index(vector_column)
    return rows.set_column(place, vector_column, pa.FixedSizeListArray.from_arrays(flat, width))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of Ray's tensors, which numpy batches become, as lists; any other as it is."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    storage = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    shape = getattr(column.type, "shape", None)
    if pa.types.is_fixed_size_list(storage.type) or shape is None:
        return storage
    fixed = pa.list_(storage.type.value_type, int(np.prod(shape)))
    return storage.cast(fixed)


def check_ids(ids: pa.ChunkedArray, name: str) -> None:
    """Refuse ids that cannot name a row.

    Raises:
        DataError: a null, or an id that stands twice.
    """
    if ids.null_count:
        raise DataError(f"id_column: column {name!r} holds {ids.null_count} nulls; every row needs an id")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        shown = twice[0]["values"].as_py()
        raise DataError(
            f"id_column: id {shown!r} stands {twice[0]['counts'].as_py()} times in one batch; ids must be unique"
        )


def vector_size(schema: pa.Schema, vector_column: str) -> int:
    """Dimensions of a column of vectors; 0 where only rows say it."""
    return int(getattr(schema.field(vector_column).type, "list_size", 0))


def check_size(found: int | None, wanted: int, where: str) -> None:
    """Raise DataError if a store holds vectors of another size than those to be written."""
    if found != wanted:
        raise DataError(
            f"{where} holds vectors of {found} dimensions, those to be written have {wanted}; allowed: the same model and "
            "dimensions, or another name"
        )


def column_error(where: str, name: str, allowed: Iterable[str]) -> ConfigError:
    """What is said of a column that a store has not."""
    return ConfigError(
        f"{where} has no column {name!r}; columns there: {', '.join(allowed)}; drop it with Dataset.drop_columns, or add it there"
    )
