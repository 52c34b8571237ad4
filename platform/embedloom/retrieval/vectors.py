"""Many vectors on disk, searched exactly, block by block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.errors import DataError
from embedloom.retrieval.exact import Matrix, Positions
from embedloom.retrieval.search import DocumentBlock, Engine, TopK, check_vectors, no_results
from embedloom.retrieval.stored import stored_vectors
from embedloom.retrieval.vector_files import common_footer, id_column
from embedloom.storage import Place

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
