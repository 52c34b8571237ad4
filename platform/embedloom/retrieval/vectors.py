"""Vectors on disk: read with their contract checked, searched exactly, file by file."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.errors import DataError
from embedloom.retrieval.exact import Matrix, Positions
from embedloom.retrieval.parts import PartReader
from embedloom.retrieval.search import DocumentBlock, Engine, TopK, check_vectors
from embedloom.storage import Place

# Schema metadata of every vectors file.
CONTRACT_KEY = b"contract_hash"
MODEL_KEY = b"model"
TOKENS_KEY = b"tokens"
MEMORY_BYTES = 2 * 2**30  # of vectors one store keeps ready; those beyond it are read again for every search
BLOCK_ROWS = 2**17  # documents searched at once: small files would hand on the threshold too often


class VectorStore:
    """The vectors of a folder. A document's position is the rank of its id, so ties are broken by id."""

    def __init__(self, place: Place, folder: str, memory_bytes: int = MEMORY_BYTES) -> None:
        """Read the ids and footers of all files; vectors are read when they are needed.

        Raises:
            DataError: no file, an id twice, or files of different contracts or dimensions.
        """
        self.source = f"{place.uri}/{folder}"
        # What is searched is kept ready for the next queries, so keeping the files as well would keep them twice.
        self._parts = PartReader(place, folder, ["id", "vector"], memory_bytes=0)
        self.contract_hash, self.dimension = _common_footer(place, self._parts.names)
        ids = pa.concat_arrays(
            [_id_column(place.read_table(name, ["id"]), f"{place.uri}/{name}") for name in self._parts.names]
        )
        order = pc.sort_indices(ids)
        self.ids = ids.take(order)
        if len(ids) > 1:
            repeated = pc.equal(self.ids[1:], self.ids[:-1])
            if pc.any(repeated).as_py():
                raise DataError(
                    f"{self.source}: id {self.ids[pc.index(repeated, True).as_py()].as_py()!r} stands twice; ids must be unique"
                )
        self._checked: set[int] = set()
        self._blocks = _cut_blocks(self._parts.rows, BLOCK_ROWS)
        self._ready: dict[tuple[tuple[int, int], Engine], DocumentBlock] = {}
        self._room = memory_bytes
        self._positions = np.empty(len(ids), dtype=np.int64)
        self._positions[order.to_numpy()] = np.arange(len(ids), dtype=np.int64)

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self.ids)

    def search(self, queries: Matrix, k: int, engine: Engine = "auto") -> TopK:
        """Exact top-k of each query over all files; positions are ranks of ids.

        Args:
            queries: float32 [n, dimension].
            k: documents wanted per query.
            engine: see ``top_k``.
        """
        check_vectors(queries, "queries")
        best: TopK | None = None
        for block in self._prepared(engine):
            best = block.search(queries, k, best)
        if best is None:
            raise DataError(f"{self.source}: no vectors")
        return best

    def _prepared(self, engine: Engine) -> Iterator[DocumentBlock]:
        """Blocks of consecutive files, ready to be searched; kept while they fit the memory."""
        for files in self._blocks:
            block = self._ready.get((files, engine))
            if block is None:
                parts = [self._block(number) for number in range(*files)]
                positions = np.concatenate([positions for positions, _ in parts])
                block = DocumentBlock(np.concatenate([vectors for _, vectors in parts]), positions, engine)
                if block.nbytes <= self._room:
                    self._room -= block.nbytes
                    self._ready[files, engine] = block
            yield block

    def find(self, ids: Sequence[str]) -> Positions:
        """Position of each id, -1 where it is not there: int64 [len(ids)]."""
        found = pc.index_in(pa.array(ids, pa.large_string()), value_set=self.ids)
        return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64)

    def names(self, positions: Positions) -> list[str]:
        """Ids at these positions [n]."""
        return [str(name) for name in self.ids.take(pa.array(positions)).to_pylist()]

    def take(self, positions: Positions) -> Matrix:
        """Vectors at these positions [n]: float32 [n, dimension]."""
        result = np.empty((len(positions), self.dimension), dtype=np.float32)
        for number in range(len(self._parts)):
            here = self._rows_of(number)
            order = np.argsort(here)
            slot = np.minimum(np.searchsorted(here, positions, sorter=order), len(here) - 1)
            rows = order[slot]
            hit = here[rows] == positions
            if hit.any():
                result[hit] = self._block(number)[1][rows[hit]]
        return result

    def _rows_of(self, number: int) -> Positions:
        start = self._parts.starts[number]
        return self._positions[start : start + self._parts.rows[number]]

    def _block(self, number: int) -> tuple[Positions, Matrix]:
        name = f"{self._parts.place.uri}/{self._parts.names[number]}"
        table = self._parts.table(number)
        vectors = vector_matrix(table, name)
        if number not in self._checked:
            check_vectors(vectors, name, table.column("id"))
            self._checked.add(number)
        return self._rows_of(number), vectors


def _cut_blocks(rows: list[int], wanted: int) -> list[tuple[int, int]]:
    """Runs of consecutive files, as (first, one past the last), with at least ``wanted`` rows but for the last."""
    blocks: list[tuple[int, int]] = []
    first = held = 0
    for number, count in enumerate(rows, start=1):
        held += count
        if held >= wanted or number == len(rows):
            blocks.append((first, number))
            first, held = number, 0
    return blocks


def read_vector_file(place: Place, name: str) -> tuple[list[str], Matrix, str]:
    """Ids, float32 [n, dimension] and contract hash of one file.

    Raises:
        DataError: not a vectors table, or a vector that is zero or not finite, named by id.
    """
    table = place.read_table(name)
    source = f"{place.uri}/{name}"
    ids = [str(value) for value in _id_column(table, source).to_pylist()]
    vectors = vector_matrix(table, source)
    check_vectors(vectors, source, ids)
    return ids, vectors, _contract_hash(table.schema, source)


def check_same_contract(queries: tuple[str, str], documents: tuple[str, str]) -> None:
    """Refuse to compare vectors that went through different prompts.

    Args:
        queries: name and contract hash of the query vectors.
        documents: the same of the document vectors.

    Raises:
        DataError: the hashes differ; both are named.
    """
    if queries[1] != documents[1]:
        raise DataError(
            f"{queries[0]} has contract_hash {queries[1]!r}, {documents[0]} has {documents[1]!r}; "
            "vectors of different prompts cannot be compared, embed both with one model"
        )


def vector_matrix(table: pa.Table, source: str) -> Matrix:
    """Column ``vector`` as float32 [n, d]; without a copy if it is stored so.

    Raises:
        DataError: no such column, another type, nulls, or lists of different lengths, named by id.
    """
    if "vector" not in table.column_names:
        raise DataError(
            f"{source}: no column 'vector'; a vectors table has id and vector, found {table.column_names}"
        )
    column = table.column("vector")
    if not (
        pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type)
    ) or not pa.types.is_floating(column.type.value_type):
        raise DataError(
            f"{source}: column 'vector' is {column.type}, expected fixed_size_list of float32 or float16"
        )
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    expected = int(lengths[0]) if len(lengths) else 0
    if (lengths != expected).any() or (len(lengths) and not expected):
        row = int(np.flatnonzero((lengths != expected) | (lengths == 0))[0])
        raise DataError(
            f"{source}: the vector of id {table.column('id')[row].as_py()!r} has {lengths[row]} dimensions, the first has {expected}"
        )
    blocks = [np.asarray(chunk.flatten().to_numpy(zero_copy_only=False)) for chunk in column.chunks]
    values: np.ndarray[Any, Any] = (
        blocks[0] if len(blocks) == 1 else np.concatenate([np.empty(0, np.float32), *blocks])
    )
    return np.asarray(values, dtype=np.float32).reshape(table.num_rows, -1 if table.num_rows else 0)


def _id_column(table: pa.Table, source: str) -> pa.Array:
    if "id" not in table.column_names or table.column("id").null_count:
        raise DataError(
            f"{source}: a vectors table needs column 'id' without nulls, found {table.column_names}"
        )
    return pa.concat_arrays(
        [chunk.cast(pa.large_string()) for chunk in table.column("id").chunks]
        or [pa.array([], pa.large_string())]
    )


def _contract_hash(schema: pa.Schema, source: str) -> str:
    found = (schema.metadata or {}).get(CONTRACT_KEY)
    if found is None:
        raise DataError(
            f"{source}: no {CONTRACT_KEY.decode()} in the file metadata, so how its texts were prompted is unknown"
        )
    return str(found.decode())


def _common_footer(place: Place, names: list[str]) -> tuple[str, int]:
    """Contract hash and dimension that all files share."""
    first: tuple[str, int] | None = None
    for name in names:
        schema, rows = place.parquet_footer(name)
        source = f"{place.uri}/{name}"
        if "vector" not in schema.names:
            raise DataError(
                f"{source}: no column 'vector'; a vectors table has id and vector, found {schema.names}"
            )
        kind = schema.field("vector").type
        # A list without a fixed size says its dimension only in its rows.
        size = (
            kind.list_size
            if pa.types.is_fixed_size_list(kind)
            else vector_matrix(place.read_table(name), source).shape[1]
        )
        if rows == 0:
            continue
        found = (_contract_hash(schema, source), int(size))
        first = first or found
        if found[0] != first[0]:
            check_same_contract((source, found[0]), (f"{place.uri}/{names[0]}", first[0]))
        if found[1] != first[1]:
            raise DataError(f"{source}: column 'vector' has {found[1]} dimensions, {names[0]} has {first[1]}")
    if first is None:
        raise DataError(f"{place.uri}: {names[0]} and the files beside it hold no vectors")
    return first
