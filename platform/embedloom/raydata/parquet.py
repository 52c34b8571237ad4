"""Sinks that are files: Parquet parts, and a FAISS index over them."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embedloom.config.base import validate
from embedloom.config.embedding import IndexConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.raydata.sinks import VectorSink, check_size, column_error, vector_size, without_present
from embedloom.retrieval.index import build_index, require_faiss
from embedloom.retrieval.ledger import VECTORS_FOLDER

if TYPE_CHECKING:
    from ray.data import Dataset

_ROWS = 65_536  # a file
_DIGEST_BYTES = 16
Digests = np.ndarray[Any, np.dtype[np.bytes_]]


class ParquetSink(VectorSink):
    """Rows into Parquet files below a folder or an address such as s3://bucket/vectors; each file is there whole or not at all.

    A file is named by the ids that it holds, so that a task which is run again replaces its own file. Parquet cannot replace single
    rows: a job that goes on after a kill writes ``sink.missing(dataset)``, and when all is written, an id that stands in
    two files is an error.
    """

    def __init__(
        self, path: str, *, rows_per_file: int = _ROWS, id_column: str = "id", vector_column: str = "vector"
    ) -> None:
        """Describe the folder.

        Args:
            path: a folder that all nodes see, or an address that fsspec knows.
            rows_per_file: at most; Ray Data gathers so many, of several blocks, before it starts a task that writes.
            id_column: texts or whole numbers.
            vector_column: what ``embedloom.embed`` made.
        """
        self.store: ParquetStore
        store = ParquetStore(Place(path).absolute(), rows=rows_per_file)
        super().__init__(store, id_column=id_column, vector_column=vector_column)

    @property
    def min_rows_per_write(self) -> int:
        """Rows that Ray Data gathers for a file."""
        return self.store.rows

    def missing(self, dataset: "Dataset", *, batch_size: int = 8192, num_cpus: float = 0.5) -> "Dataset":
        """See ``VectorSink.missing``. What is there is read when this is called, in a task: 16 bytes an id, once a node."""
        import ray

        known = KnownIds(
            ray.remote(written_ids).options(num_cpus=num_cpus).remote(self.store, self.id_column)
        )
        return dataset.map_batches(
            without_present,
            fn_kwargs={"store": known, "id_column": self.id_column},
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=num_cpus,
        )

    def on_write_complete(self, write_result: Any) -> None:
        """Check that each id was written once.

        Raises:
            DataError: an id that stands in two files.
        """
        import ray

        ray.get(ray.remote(written_ids).remote(self.store, self.id_column))


class FaissSink(ParquetSink):
    """Rows into Parquet files below ``vectors/``, and when all are written, a FAISS index of all that lie there.

    ``index.faiss`` numbers vectors as ``index_ids.parquet`` does, and ``index.json`` says what they belong to;
    ``embedloom.retrieval.index.load_index`` reads them. One task builds it, and holds all vectors.
    """

    def __init__(
        self,
        path: str,
        kind: str = "flat",
        *,
        contract_hash: str = "",
        rows_per_file: int = _ROWS,
        id_column: str = "id",
        vector_column: str = "vector",
        **settings: Any,
    ) -> None:
        """Describe the index.

        Args:
            path: a folder that all nodes see; in its files the columns are called ``id`` and ``vector``.
            kind: ``flat``, ``ivf`` or ``hnsw``.
            contract_hash: of the prompts the texts went through; checked when the index is loaded.
            rows_per_file: as ``ParquetSink`` has it.
            id_column: texts or whole numbers.
            vector_column: what ``embedloom.embed`` made.
            settings: keys of ``embedding.index``, such as ``neighbours``.

        Raises:
            ConfigError: a kind or setting that is not allowed.
            MissingDependency: no FAISS.
        """
        require_faiss()
        self._config = validate(IndexConfig, {"kind": kind, **settings}, "FaissSink")
        self._contract_hash = contract_hash
        super().__init__(path, id_column=id_column, vector_column=vector_column)
        self.store = ParquetStore(self.store.place, VECTORS_FOLDER, renamed=True, rows=rows_per_file)

    def on_write_complete(self, write_result: Any) -> None:
        """Build the index.

        Raises:
            DataError: an id that stands in two files.
        """
        super().on_write_complete(write_result)
        import ray

        build = ray.remote(build_index).options(num_cpus=1)
        ray.get(build.remote(self._config, self.store.place, self._contract_hash))


@dataclass(frozen=True, slots=True)
class ParquetStore:
    """A folder of files."""

    place: Place
    folder: str = ""
    renamed: bool = False  # the two columns are called id and vector in the files
    rows: int = _ROWS

    def names(self) -> list[str]:
        """The files that are there."""
        return self.place.names(self.folder, ".parquet")

    def id_name(self, id_column: str) -> str:
        """What the column of ids is called in the files."""
        return "id" if self.renamed else id_column

    def prepare(self, schema: pa.Schema, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.prepare``; compared with the first file that is there."""
        self.place.sweep()
        wanted = self._as_stored(schema.empty_table(), id_column, vector_column).schema
        vector = "vector" if self.renamed else vector_column
        for name in self.names()[:1]:
            there, _ = self.place.parquet_footer(name)
            where = f"{self.place.uri}/{name}"
            if vector not in there.names:
                raise column_error(where, vector, there.names)
            check_size(vector_size(there, vector), vector_size(wanted, vector), where)

    def _as_stored(self, rows: pa.Table, id_column: str, vector_column: str) -> pa.Table:
        given = {id_column: "id", vector_column: "vector"} if self.renamed else {}
        return rows.rename_columns([given.get(name, name) for name in rows.column_names])

    def upsert(self, rows: pa.Table, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.upsert``; one file."""
        digests = sorted(id_digest(one) for one in rows.column(id_column).to_pylist())
        name = f"part-{hashlib.blake2b(b''.join(digests), digest_size=_DIGEST_BYTES).hexdigest()}.parquet"
        stored = self._as_stored(rows, id_column, vector_column)
        self.place.write_table(f"{self.folder}/{name}" if self.folder else name, stored)

    def present(self, ids: list[Any], id_column: str) -> set[Any]:
        """See ``VectorStore.present``."""
        return those_in(ids, written_ids(self, id_column))


@dataclass(frozen=True, slots=True)
class KnownIds:
    """Digests of ids in Ray's object store; each node has one copy."""

    reference: Any  # ray.ObjectRef of Digests; ray ships no types

    def present(self, ids: list[Any], id_column: str) -> set[Any]:
        """See ``VectorStore.present``."""
        import ray

        return those_in(ids, ray.get(self.reference))


def id_digest(one: Any) -> bytes:
    """128 bits of an id; a number and a text of the same digits differ."""
    return hashlib.blake2b(repr(one).encode(), digest_size=_DIGEST_BYTES).digest()


def those_in(ids: list[Any], digests: Digests) -> set[Any]:
    """Which ids have their digest among sorted ones."""
    if not len(digests):
        return set()
    wanted = np.array([id_digest(one) for one in ids], dtype=f"S{_DIGEST_BYTES}")
    places = np.minimum(np.searchsorted(digests, wanted), len(digests) - 1)
    return {one for one, same in zip(ids, digests[places] == wanted, strict=True) if same}


def written_ids(store: ParquetStore, id_column: str) -> Digests:
    """Digests of all ids in a folder's files, sorted: [n], 16 bytes each.

    Raises:
        DataError: an id that stands twice.
    """
    name, found = store.id_name(id_column), [np.empty(0, dtype=f"S{_DIGEST_BYTES}")]
    for file in store.names():
        ids = store.place.read_table(file, [name]).column(name).to_pylist()
        found.append(np.array([id_digest(one) for one in ids], dtype=f"S{_DIGEST_BYTES}"))
    digests: Digests = np.sort(np.concatenate(found))
    twice = digests[1:][digests[1:] == digests[:-1]]
    if len(twice):
        raise DataError(_repeated(store, name, twice))
    return digests


def _repeated(store: ParquetStore, name: str, twice: Digests) -> str:
    where: dict[Any, list[str]] = {}
    for file in store.names():
        ids = store.place.read_table(file, [name]).column(name).to_pylist()
        for one in those_in(ids, np.unique(twice)):
            where.setdefault(one, []).append(file)
    one, files = next(iter(where.items()))
    return (
        f"{store.place.uri}: id {one!r} stands in {' and '.join(files[:2])} ({len(where)} such ids); write sink.missing(dataset) "
        "into a folder that holds rows already, and give every row an id of its own"
    )
