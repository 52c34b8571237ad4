"""Exact search over more vectors than one memory holds: block by block from disk, and in shares over actors."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.compute.shards import in_flight, no_place, reserved, stage_errors
from embedloom.config.cluster import PoolConfig
from embedloom.core.ids import IdIndex
from embedloom.core.storage import Place
from embedloom.errors import DataError, StageError
from embedloom.retrieval.search import (
    DocumentBlock,
    Engine,
    Matrix,
    Near,
    Positions,
    TopK,
    check_vectors,
    nearest,
    no_results,
    nothing_near,
    pick_engine,
)
from embedloom.retrieval.stored import stored_vectors
from embedloom.retrieval.vector_files import common_footer, id_column

MEMORY_BYTES = 2 * 2**30  # of vectors one store keeps ready; those beyond it are read again for every search
BLOCK_ROWS = 2**17  # documents searched at once: small files would hand on the threshold too often
_DEVICE_ROWS = (
    2**20
)  # on a GPU: after every block its nominees are merged on the CPU, in milliseconds that the GPU waits


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
    index: IdIndex  # of the ids

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
        index = IdIndex.of(ranked)
        return cls(place, folder, tuple(names), rows, contract_hash, dimension, ranked, positions, index)

    @property
    def source(self) -> str:
        """Where it is, for messages."""
        return f"{self.place.uri}/{self.folder}"

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self.ids)

    def find(self, ids: Sequence[str]) -> Positions:
        """Position of each id, -1 where it is not there: int64 [len(ids)]."""
        return self.index.find(ids)

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
        vectors = matrices[0] if len(matrices) == 1 else np.concatenate(matrices)
        return self.positions_of(files), vectors

    def positions_of(self, files: tuple[int, int]) -> Positions:
        """Positions [n] of the rows of a run of files."""
        return self.positions[sum(self.rows[: files[0]]) : sum(self.rows[: files[1]])]


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
        most = BLOCK_ROWS
        if pick_engine(engine) == "bf16":
            # Four at least fit the memory, so that what does not is little.
            most = max(most, min(_DEVICE_ROWS, memory_bytes // (16 * catalogue.dimension)))
        block_rows = max(1, min(most, -(-len(catalogue) // share[1])))
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
        check_vectors(queries, "queries")
        best = no_results(len(queries))
        for _, block in self._blocks():
            best = block.search(queries, k, best)
        return best

    def nominate(self, queries: Matrix, k: int, rows: Positions, positions: Positions) -> tuple[Near, Matrix]:
        """Documents that may be among the best k, and in the same pass the scores of given pairs.

        Blocks that are not kept in memory score their nominees at once; the others leave it to ``score``, for those
        that are still near when all shares are known.

        Args:
            queries: float32 [n, dimension].
            k: documents wanted per query; 0 searches nothing.
            rows: [p] query of each pair.
            positions: [p] document of each pair.

        Returns:
            The nominees by position, and float32 [p] scores, NaN for documents outside this store's blocks.
        """
        check_vectors(queries, "queries")
        near = nothing_near(len(queries))
        scores = np.full(len(rows), np.nan, dtype=np.float32)
        for files, block in self._blocks():
            near = block.nominate(queries, k, near, exact=files not in self._ready) if k else near
            block.score_into(scores, queries, rows, positions)
        return near, scores

    def score(self, queries: Matrix, rows: Positions, positions: Positions) -> Matrix:
        """Scores of pairs of a query and a document: float32 [p], NaN for documents outside this store's blocks.

        Args:
            queries: float32 [n, dimension].
            rows: [p] query of each pair.
            positions: [p] document of each pair.
        """
        scores = np.full(len(rows), np.nan, dtype=np.float32)
        for files in self._files:
            # Read again, in an actor that was started anew, but not for pairs of other blocks.
            if files in self._ready or np.isin(self.catalogue.positions_of(files), positions).any():
                self._block(files).score_into(scores, queries, rows, positions)
        return scores

    def _blocks(self) -> Iterator[tuple[tuple[int, int], DocumentBlock]]:
        for files in self._files:
            yield files, self._block(files)

    def _block(self, files: tuple[int, int]) -> DocumentBlock:
        block = self._ready.get(files)
        if block is None:
            positions, vectors = self.catalogue.read_block(files)
            block = DocumentBlock(vectors, positions, self._engine)
            if block.nbytes <= self._room:
                self._room -= block.nbytes
                self._ready[files] = block
        return block


# Exact search over a cluster: the document matrix in shares over actors, partial results merged as they come.
#
# Each actor keeps its share in memory (on its GPU's node, or streamed from disk where it does not fit) and sees every
# block of queries; so the matrix is read once, not once per block. The result is that of one process, bit for bit,
# because a pair's score depends on the pair alone and ties are broken by id.
#
# Shares only nominate, with what each score lies between; who is still near once all shares are merged, k and a few, is
# scored exactly by the share that holds it. To score k of every share took hours of CPUs beside idle GPUs.


_AHEAD = 3  # query blocks in flight, so that no actor waits for the others' merge
_CHOOSING = 1  # of them nominated before the first is scored: an actor takes its calls in order
_RESTARTS = 3
_LOOK_SECONDS = 10.0  # between looks at where actors are


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

    def nominate(self, asked: Asked, k: int) -> tuple[Near, Matrix]:
        return self._store.nominate(asked.queries, k, asked.rows, asked.positions)

    def score(self, asked: Asked, chosen: tuple[Near, Matrix]) -> Matrix:
        return self._store.score(asked.queries, *chosen[0].unscored())


def choose(parts: Sequence[tuple[Near, Matrix]], k: int) -> tuple[Near, Matrix]:
    """Who is near over all shares, and the pair scores: a pair's comes from the one share that has its document.

    Args:
        parts: what ``VectorStore.nominate`` gave of each share.
        k: documents wanted per query.
    """
    return nearest([near for near, _ in parts], k), _of_any([scores for _, scores in parts])


def rank(near: Near, scores: Sequence[Matrix], k: int) -> TopK:
    """The top k of who is near.

    Args:
        near: of all shares.
        scores: what ``VectorStore.score`` gave of each share for those not scored yet.
        k: documents wanted per query.

    Raises:
        StageError: a document that no share scored.
    """
    found = _of_any(scores)
    if np.isnan(found).any():
        raise StageError(f"search: {int(np.isnan(found).sum())} nominated documents were scored by no share")
    return near.scored(found).best(k)


def _of_any(shares: Sequence[Matrix]) -> Matrix:
    """Of each pair the score of the share that has one, else NaN."""
    scores = np.stack(shares)
    found = ~np.isnan(scores)
    return np.where(
        found.any(axis=0), np.take_along_axis(scores, found.argmax(axis=0)[None], axis=0)[0], np.nan
    )


def _read(task: SearchTask, number: int) -> Asked:
    return task.read(number)


def _choose(k: int, *parts: tuple[Near, Matrix]) -> tuple[Near, Matrix]:
    return choose(parts, k)


def _conclude(task: SearchTask, number: int, k: int, chosen: tuple[Near, Matrix], *scores: Matrix) -> int:
    task.finish(number, rank(chosen[0], scores, k), chosen[1])
    return number


class _Placement:
    """Ends a search whose actors have no place: one share without an actor would be waited for without end."""

    def __init__(self, stage: str, actors: Sequence[Any], pool: PoolConfig) -> None:
        self._stage, self._actors, self._pool = stage, actors, pool
        self._since: dict[int, float] = {}

    def __call__(self) -> None:
        """Look where they are, the lost ones that are to be started again too.

        Raises:
            StageError: some had no place for the pool's ``start_budget``.
        """
        import ray
        from ray.core.generated.gcs_pb2 import ActorTableData

        placed = (ActorTableData.ALIVE, ActorTableData.DEAD)  # calls of dead ones fail by themselves
        homeless = {n for n, one in enumerate(self._actors) if one._get_local_state() not in placed}
        now = time.monotonic()
        self._since = {n: self._since.get(n, now) for n in homeless}
        if any(now - since >= self._pool.start_budget for since in self._since.values()):
            what = f"only {len(self._actors) - len(homeless)} of the {len(self._actors)} actors that share the search"
            raise no_place(self._stage, what, self._pool, ray.cluster_resources(), ray.available_resources())


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
        StageError: anything else went wrong in an actor or a task, or an actor had no place in time.
    """
    import ray

    shares = max(1, min(pool.max_actors, len(catalogue.names)))
    actor = ray.remote(**reserved(pool), max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(_Share)
    shared = ray.put(catalogue)
    actors = [actor.remote(shared, (n, shares), memory_bytes, pool.compute_threads) for n in range(shares)]
    light = ray.remote(num_cpus=0.25, max_retries=_RESTARTS)
    reading, choosing, concluding, work = light(_read), light(_choose), light(_conclude), ray.put(task)

    def concluded(number: int, asked: Any, chosen: Any) -> Any:
        return concluding.remote(
            work, number, k, chosen, *(each.score.remote(asked, chosen) for each in actors)
        )

    def submitted() -> Iterator[Any]:
        nominated: deque[tuple[int, Any, Any]] = deque()
        for number in range(items):
            asked = reading.remote(work, number)
            found = [each.nominate.remote(asked, k) for each in actors]
            nominated.append((number, asked, choosing.remote(k, *found)))
            if len(nominated) > _CHOOSING:
                yield concluded(*nominated.popleft())
        while nominated:
            yield concluded(*nominated.popleft())

    try:
        with stage_errors(stage):
            watch = _Placement(stage, actors, pool)
            yield from in_flight(submitted(), _AHEAD, stage, watch=(watch, _LOOK_SECONDS))
    finally:
        for each in actors:
            ray.kill(each)
