"""Sinks for Lance datasets and LanceDB tables."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from embedloom.errors import ConfigError, MissingDependency, StageError, first_line
from embedloom.raydata.sinks import VectorSink, check_size, column_error, vector_size

_ROWS = 65_536  # a version and a fragment each
_RETRIES = 30  # of a commit that others overtook


class LanceSink(VectorSink):
    """Rows into a Lance dataset, merged by id; every write is a version of it."""

    def __init__(self, uri: str, *, id_column: str = "id", vector_column: str = "vector") -> None:
        """Describe the dataset; nothing is opened yet.

        Args:
            uri: a folder, or an address such as s3://bucket/docs.lance; made if it is not there.
            id_column: texts or whole numbers.
            vector_column: what ``embedloom.embed`` made.

        Raises:
            MissingDependency: no pylance.
        """
        if importlib.util.find_spec("lance") is None:
            raise MissingDependency("pylance", "lance", "LanceSink")
        super().__init__(LanceStore(uri), id_column=id_column, vector_column=vector_column)


class LanceDBSink(VectorSink):
    """Rows into a LanceDB table, merged by id."""

    def __init__(
        self,
        uri: str,
        table: str,
        *,
        api_key_env: str | None = None,
        id_column: str = "id",
        vector_column: str = "vector",
    ) -> None:
        """Describe the table; nothing is opened yet.

        Args:
            uri: a folder, s3://bucket/folder, or db://NAME of LanceDB Cloud.
            table: made if it is not there.
            api_key_env: variable that holds the key of LanceDB Cloud where tasks run.
            id_column: texts or whole numbers.
            vector_column: what ``embedloom.embed`` made.

        Raises:
            MissingDependency: no lancedb.
        """
        if importlib.util.find_spec("lancedb") is None:
            raise MissingDependency("lancedb", "lancedb", "LanceDBSink")
        store = LanceDBStore(uri, table, api_key_env)
        super().__init__(store, id_column=id_column, vector_column=vector_column)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Lance raises OSError, ValueError and RuntimeError alike."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise StageError(f"{where}: {first_line(error)}") from error


def check_schema(there: pa.Schema, schema: pa.Schema, vector_column: str, where: str) -> None:
    """Check that rows fit a table that is there.

    Raises:
        DataError, ConfigError: vectors of another size, or a column that it has not.
    """
    size = vector_size(there, vector_column) if vector_column in there.names else None
    check_size(size, vector_size(schema, vector_column), where)
    for name in schema.names:
        if name not in there.names:
            raise column_error(where, name, there.names)


def id_filter(ids: list[Any], id_column: str) -> str:
    """SQL that finds rows of these ids."""
    values = (str(one) if isinstance(one, int) else "'" + str(one).replace("'", "''") + "'" for one in ids)
    return f"`{id_column}` IN ({', '.join(values)})"


@dataclass(frozen=True, slots=True)
class LanceStore:
    """A dataset."""

    uri: str
    rows: int = _ROWS

    @property
    def _where(self) -> str:
        return f"Lance dataset {self.uri}"

    def _open(self) -> Any | None:
        import lance

        try:
            return lance.dataset(self.uri)
        except (ValueError, FileNotFoundError) as error:
            if "not found" in str(error).lower():
                return None
            raise StageError(f"{self._where}: {first_line(error)}") from error

    def prepare(self, schema: pa.Schema, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.prepare``."""
        import lance

        there = self._open()
        if there is not None:
            check_schema(there.schema, schema, vector_column, self._where)
            return
        with _told(self._where):
            lance.write_dataset(schema.empty_table(), self.uri, mode="create")

    def upsert(self, rows: pa.Table, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.upsert``; one version."""
        import lance

        with _told(self._where):
            merge = lance.dataset(self.uri).merge_insert(id_column)
            merge.when_matched_update_all().when_not_matched_insert_all().conflict_retries(_RETRIES).execute(
                rows
            )

    def present(self, ids: list[Any], id_column: str) -> set[Any]:
        """See ``VectorStore.present``."""
        there = self._open()
        if there is None or not ids:
            return set()
        with _told(self._where):
            found = there.to_table(columns=[id_column], filter=id_filter(ids, id_column))
        return set(found.column(id_column).to_pylist())


@dataclass(frozen=True, slots=True)
class LanceDBStore:
    """A table."""

    uri: str
    table: str
    api_key_env: str | None
    rows: int = _ROWS

    @property
    def _where(self) -> str:
        return f"LanceDB table {self.table!r} at {self.uri}"

    def _connect(self) -> Any:
        import lancedb

        key = os.environ.get(self.api_key_env) if self.api_key_env else None
        if self.api_key_env and not key:
            raise ConfigError(
                f"api_key_env: the environment variable {self.api_key_env!r} is not set where this runs"
            )
        return lancedb.connect(self.uri, api_key=key)

    def _open(self, database: Any) -> Any | None:
        try:
            return database.open_table(self.table)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            if "not found" in str(error).lower():
                return None
            raise StageError(f"{self._where}: {first_line(error)}") from error

    def prepare(self, schema: pa.Schema, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.prepare``."""
        database = self._connect()
        there = self._open(database)
        if there is not None:
            check_schema(there.schema, schema, vector_column, self._where)
            return
        with _told(self._where):
            database.create_table(self.table, schema=schema)

    def upsert(self, rows: pa.Table, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.upsert``; one version."""
        with _told(self._where):
            merge = self._connect().open_table(self.table).merge_insert(id_column)
            merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def present(self, ids: list[Any], id_column: str) -> set[Any]:
        """See ``VectorStore.present``."""
        there = self._open(self._connect())
        if there is None or not ids:
            return set()
        with _told(self._where):
            asked = there.search().where(id_filter(ids, id_column)).select([id_column]).limit(len(ids))
            return set(asked.to_arrow().column(id_column).to_pylist())
