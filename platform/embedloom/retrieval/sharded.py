"""Exact search over more vectors than one memory holds: block by block from disk, and in shares over actors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.compute.shards import in_flight, reserved, stage_errors
from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.retrieval.search import (
    DocumentBlock,
    Engine,
    Matrix,
    Positions,
    TopK,
    check_vectors,
    merge_top_k,
    no_results,
)
from embedloom.retrieval.stored import stored_vectors
from embedloom.retrieval.vector_files import common_footer, id_column

MEMORY_BYTES = 2 * 2**30  # of vectors one store keeps ready; those beyond it are read again for every search
BLOCK_ROWS = 2**17  # documents searched at once: small files would hand on the threshold too often


@dataclass(frozen=True, slots=True)
class VectorCatalogue:
    """Ids and files of a vectors folder. A document's position is the rank of its id, so ties are broken by id.

    Cheap to hand to many actors: Ray maps ``ids`` and ``positions`` from its object store.
    """

    place: Place
    folder: str
    names: tuple[str, ...]  # files
    rows: tuple[int, ...]  # of each file
    contract_hash: str
    dimension: int
    ids: pa.Array  # sorted
    positions: Positions  # of every row, file after file

    @classmethod
    def read(cls, place: Place, folder: str) -> "VectorCatalogue":
        """Read the ids and footers of all files.

        Raises:
            DataError: no file, an id twice, or files of different contracts or dimensions.
        """
        names = place.names(folder, ".parquet")
        if not names:
            raise DataError(f"{place.uri}/{folder}: no Parquet file")
        contract_hash, dimension = common_footer(place, names)
        columns = [id_column(place.read_table(name, ["id"]), f"{place.uri}/{name}") for name in names]
        ids = pa.concat_arrays(columns)
        order = pc.sort_indices(ids)
        ranked = ids.take(order)
        if len(ids) > 1:
            repeated = pc.equal(ranked[1:], ranked[:-1])
            if pc.any(repeated).as_py():
                raise DataError(
                    f"{place.uri}/{folder}: id {ranked[pc.index(repeated, True).as_py()].as_py()!r} stands twice; ids must be unique"
                )
        positions = np.empty(len(ids), dtype=np.int64)
        positions[order.to_numpy()] = np.arange(len(ids), dtype=np.int64)
        rows = tuple(len(column) for column in columns)
        return cls(place, folder, tuple(names), rows, contract_hash, dimension, ranked, positions)

    @property
    def source(self) -> str:
        """Where it is, for messages."""
        return f"{self.place.uri}/{self.folder}"

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self.ids)

    def find(self, ids: Sequence[str]) -> Positions:
        """Position of each id, -1 where it is not there: int64 [len(ids)]."""
        found = pc.index_in(pa.array(ids, pa.large_string()), value_set=self.ids)
        return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64)

    def blocks(self, wanted: int) -> list[tuple[int, int]]:
        """Runs of consecutive files, (first, one past the last), of at least ``wanted`` rows but for the last."""
        found: list[tuple[int, int]] = []
        first = held = 0
        for number, count in enumerate(self.rows, start=1):
            held += count
            if held >= wanted or number == len(self.rows):
                found.append((first, number))
                first, held = number, 0
        return found

    def read_block(self, files: tuple[int, int]) -> tuple[Positions, Matrix]:
        """Positions [n] and vectors float32 [n, dimension] of a run of files.

        Raises:
            DataError: a vector that is zero or not finite, named by id.
        """
        matrices = []
        for number in range(*files):
            source = f"{self.place.uri}/{self.names[number]}"
            table = self.place.read_table(self.names[number])
            matrices.append(stored_vectors(table, source))
            check_vectors(matrices[-1], source, table.column("id"))
        start, stop = sum(self.rows[: files[0]]), sum(self.rows[: files[1]])
        return self.positions[start:stop], matrices[0] if len(matrices) == 1 else np.concatenate(matrices)


class VectorStore:
    """The vectors of a catalogue, or one share of its blocks; keeps what fits the memory, streams the rest."""

    def __init__(
        self,
        catalogue: VectorCatalogue,
        memory_bytes: int = MEMORY_BYTES,
        share: tuple[int, int] = (0, 1),
        engine: Engine = "auto",
    ) -> None:
        """Open the blocks ``share[0]``, ``share[0] + share[1]``, ... of the catalogue; they are read when needed."""
        self.catalogue = catalogue
        # A corpus with fewer full blocks than shares is cut finer, so that every share has work.
        block_rows = max(1, min(BLOCK_ROWS, -(-len(catalogue) // share[1])))
        self._files = catalogue.blocks(block_rows)[share[0] :: share[1]]
        self._engine: Engine = engine
        self._ready: dict[tuple[int, int], DocumentBlock] = {}
        self._room = memory_bytes

    def search(self, queries: Matrix, k: int) -> TopK:
        """Exact top-k of each query over the blocks; positions are ranks of ids.

        Args:
            queries: float32 [n, dimension].
            k: documents wanted per query.
        """
        return self.search_and_score(queries, k, np.empty(0, np.int64), np.empty(0, np.int64))[0]

    def search_and_score(
        self, queries: Matrix, k: int, rows: Positions, positions: Positions
    ) -> tuple[TopK, Matrix]:
        """Search, and in the same pass score given pairs of a query and a document.

        Args:
            queries: float32 [n, dimension].
            k: documents wanted per query; 0 searches nothing.
            rows: [p] query of each pair.
            positions: [p] document of each pair.

        Returns:
            The top k, and float32 [p] scores, NaN for documents outside this store's blocks.
        """
        check_vectors(queries, "queries")
        best = no_results(len(queries))
        scores = np.full(len(rows), np.nan, dtype=np.float32)
        for block in self._blocks():
            best = block.search(queries, k, best) if k else best
            block.score_into(scores, queries, rows, positions)
        return best, scores

    def _blocks(self) -> Iterator[DocumentBlock]:
        for files in self._files:
            block = self._ready.get(files)
            if block is None:
                positions, vectors = self.catalogue.read_block(files)
                block = DocumentBlock(vectors, positions, self._engine)
                if block.nbytes <= self._room:
                    self._room -= block.nbytes
                    self._ready[files] = block
            yield block


# Exact search over a cluster: the document matrix in shares over actors, partial results merged as they come.
#
# Each actor keeps its share in memory (on its GPU's node, or streamed from disk where it does not fit) and sees every
# block of queries; so the matrix is read once, not once per block. The result is that of one process, bit for bit,
# because a pair's score depends on the pair alone and ties are broken by id.


_AHEAD = 3  # query blocks in flight, so that no actor waits for the others' merge
_RESTARTS = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """One block of queries: vectors [n, d], and pairs (query row, document position) to score besides."""

    queries: Matrix
    rows: Positions
    positions: Positions


class SearchTask(Protocol):
    """What is asked and what becomes of the answers; put into the object store once, used in many tasks."""

    def read(self, number: int) -> Asked:
        """The block of queries of a number."""
        ...

    def finish(self, number: int, found: TopK, scores: Matrix) -> None:
        """Store a block's top k and pair scores (NaN where the document is unknown)."""
        ...


class _Share:
    """Actor that searches one share of the blocks."""

    def __init__(self, catalogue: VectorCatalogue, share: tuple[int, int], memory: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._store = VectorStore(catalogue, memory, share)

    def search(self, asked: Asked, k: int) -> tuple[TopK, Matrix]:
        return self._store.search_and_score(asked.queries, k, asked.rows, asked.positions)


def merge_shares(parts: list[tuple[TopK, Matrix]], k: int) -> tuple[TopK, Matrix]:
    """Top k and pair scores of all shares: a pair's score comes from the one share that has its document."""
    best = merge_top_k([top for top, _ in parts], k)
    scores = np.stack([scores for _, scores in parts])
    found = ~np.isnan(scores)
    return best, np.where(
        found.any(axis=0), np.take_along_axis(scores, found.argmax(axis=0)[None], axis=0)[0], np.nan
    )


def _read(task: SearchTask, number: int) -> Asked:
    return task.read(number)


def _conclude(task: SearchTask, number: int, k: int, *parts: tuple[TopK, Matrix]) -> int:
    task.finish(number, *merge_shares(list(parts), k))
    return number


def search_sharded(
    *,
    stage: str,
    catalogue: VectorCatalogue,
    items: int,
    task: SearchTask,
    k: int,
    pool: PoolConfig,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[int]:
    """Search blocks of queries over the pool's actors and yield each block's number once it is finished.

    Args:
        stage: named in errors.
        catalogue: the documents.
        items: number of query blocks.
        task: gives the blocks and stores the results, in Ray tasks.
        k: documents wanted per query; 0 only scores the pairs.
        pool: actors and what each reserves.
        memory_bytes: vectors an actor keeps; the rest of its share is read again for every block.

    Raises:
        UserError: bad vectors, or one that the task raised.
        StageError: anything else went wrong in an actor or a task.
    """
    import ray

    shares = max(1, min(pool.max_actors, len(catalogue.names)))
    actor = ray.remote(**reserved(pool), max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(_Share)
    shared = ray.put(catalogue)
    actors = [actor.remote(shared, (n, shares), memory_bytes, pool.compute_threads) for n in range(shares)]
    light = ray.remote(num_cpus=0.25, max_retries=_RESTARTS)
    reading, concluding, work = light(_read), light(_conclude), ray.put(task)

    def submitted() -> Iterator[Any]:
        for number in range(items):
            asked = reading.remote(work, number)
            yield concluding.remote(work, number, k, *(each.search.remote(asked, k) for each in actors))

    try:
        with stage_errors(stage):
            yield from in_flight(submitted(), _AHEAD, stage)
    finally:
        for each in actors:
            ray.kill(each)
