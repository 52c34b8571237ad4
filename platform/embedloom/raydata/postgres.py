"""A sink for PostgreSQL with pgvector."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from embedloom.errors import ConfigError, MissingDependency, StageError, first_line
from embedloom.raydata.sinks import VectorSink, check_size, column_error, vector_size


class PgvectorSink(VectorSink):
    """Rows into a table of PostgreSQL, a transaction for each thousand; needs the extension pgvector on the server."""

    def __init__(
        self, conninfo: str, table: str, *, id_column: str = "id", vector_column: str = "vector"
    ) -> None:
        """Describe the table; nothing is connected yet.

        Args:
            conninfo: of libpq, such as ``host=db dbname=search user=loader`` or a URL. It travels to the tasks: leave the
                password to ``PGPASSWORD`` or ``~/.pgpass`` where they run.
            table: made if it is not there, with a column for every column of the rows; ``schema.table`` for another schema.
                Of a table that is there, the column of ids must be unique.
            id_column: texts or whole numbers.
            vector_column: what ``embedloom.embed`` made.

        Raises:
            MissingDependency: no psycopg or pgvector.
        """
        for package in ("psycopg", "pgvector"):
            if importlib.util.find_spec(package) is None:
                raise MissingDependency(package, "pgvector", "PgvectorSink")
        super().__init__(PostgresStore(conninfo, table), id_column=id_column, vector_column=vector_column)


@dataclass(frozen=True, slots=True)
class PostgresStore:
    """A table."""

    conninfo: str
    table: str
    rows: int = 1024

    @property
    def _where(self) -> str:
        return f"PostgreSQL table {self.table!r}"

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """A transaction, committed in the end."""
        import psycopg

        try:
            with psycopg.connect(self.conninfo) as connection:
                yield connection
        except psycopg.Error as error:
            raise StageError(f"{self._where}: {first_line(error)}") from error

    def _name(self) -> Any:
        from psycopg import sql

        return sql.Identifier(*self.table.split("."))

    def _columns(self, connection: Any) -> dict[str, int]:
        """Columns of the table by name with the size their type states (a vector's dimensions); none if it is not there."""
        found = connection.execute(
            "SELECT attname, atttypmod FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
            [self._name().as_string(connection)],
        )
        return dict(found.fetchall())

    def prepare(self, schema: pa.Schema, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.prepare``."""
        from psycopg import sql

        size = vector_size(schema, vector_column)
        with self._connection() as connection:
            there = self._columns(connection)
            if there:
                check_size(there.get(vector_column), size, f"{self._where}, column {vector_column!r},")
                for name in schema.names:
                    if name not in there:
                        raise column_error(self._where, name, there)
                return
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            columns = [
                sql.SQL("{} {}{}").format(
                    sql.Identifier(field.name),
                    sql.SQL(f"vector({size})" if field.name == vector_column else sql_type(field)),
                    sql.SQL(" PRIMARY KEY" if field.name == id_column else ""),
                )
                for field in schema
            ]
            connection.execute(
                sql.SQL("CREATE TABLE {} ({})").format(self._name(), sql.SQL(", ").join(columns))
            )

    def upsert(self, rows: pa.Table, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.upsert``; one transaction. Rows go by id, so that two tasks never wait for each other in a circle."""
        from pgvector.psycopg import register_vector
        from psycopg import sql

        names = [sql.Identifier(name) for name in rows.column_names]
        key, listed = sql.Identifier(id_column), sql.SQL(", ").join(names)
        changes = [
            sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name))
            for name in rows.column_names
            if name != id_column
        ]
        words = {"table": self._name(), "columns": listed, "key": key, "changes": sql.SQL(", ").join(changes)}
        with self._connection() as connection:
            register_vector(connection)
            connection.execute(
                sql.SQL(
                    "CREATE TEMP TABLE incoming ON COMMIT DROP AS SELECT {columns} FROM {table} LIMIT 0"
                ).format(**words)
            )
            self._copy(connection, rows, listed, vector_column)
            connection.execute(
                sql.SQL(
                    "INSERT INTO {table} ({columns}) SELECT {columns} FROM incoming ORDER BY {key} "
                    "ON CONFLICT ({key}) DO UPDATE SET {changes}"
                ).format(**words)
            )

    def _copy(self, connection: Any, rows: pa.Table, listed: Any, vector_column: str) -> None:
        """Rows into the temporary table, in PostgreSQL's binary form."""
        from psycopg import sql
        from psycopg.types.json import Jsonb

        types = ["vector" if field.name == vector_column else sql_type(field) for field in rows.schema]
        values = [
            [None if value is None else Jsonb(value) for value in column.to_pylist()]
            if kind == "jsonb"
            else _vectors(column)
            if kind == "vector"
            else column.to_pylist()
            for kind, column in zip(types, rows.columns, strict=True)
        ]
        statement = sql.SQL("COPY incoming ({}) FROM STDIN (FORMAT BINARY)").format(listed)
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types(["float8" if kind == "double precision" else kind for kind in types])
            for row in zip(*values, strict=True):
                copy.write_row(row)

    def present(self, ids: list[Any], id_column: str) -> set[Any]:
        """See ``VectorStore.present``."""
        from psycopg import sql

        with self._connection() as connection:
            if id_column not in self._columns(connection):
                return set()
            question = sql.SQL("SELECT {0} FROM {1} WHERE {0} = ANY(%s)").format(
                sql.Identifier(id_column), self._name()
            )
            return {row[0] for row in connection.execute(question, [ids])}


def _vectors(column: pa.ChunkedArray) -> list[Any]:
    flat = column.combine_chunks().flatten().to_numpy()
    return list(flat.reshape(len(column), -1))


def sql_type(field: pa.Field) -> str:
    """PostgreSQL's type of a column.

    Raises:
        ConfigError: a type that has none here.
    """
    kind = field.type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    known = (
        ("text", (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)),
        ("int8", (pa.types.is_integer,)),
        ("double precision", (pa.types.is_floating,)),
        ("bool", (pa.types.is_boolean,)),
        ("bytea", (pa.types.is_binary, pa.types.is_large_binary)),
        ("date", (pa.types.is_date,)),
        (
            "jsonb",
            (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_struct),
        ),
    )
    for name, tests in known:
        if any(test(kind) for test in tests):
            return name
    if pa.types.is_timestamp(kind):
        return "timestamp" if kind.tz is None else "timestamptz"
    raise ConfigError(
        f"column {field.name!r} is {kind}; allowed: text, numbers, booleans, times, binary, lists and structs; drop it with "
        "Dataset.drop_columns"
    )
