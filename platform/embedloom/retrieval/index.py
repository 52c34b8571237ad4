"""A FAISS index of an artefact's vectors: built file by file, scored against exact search, checked on loading.

``index.faiss`` numbers its vectors as the rows of ``vectors/part-*.parquet`` follow each other; ``index_ids.parquet``
has their ids in that order; ``index.json``, written last, says what the two belong to.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.config.embedding import IndexConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError, MissingDependency
from embedloom.retrieval.ledger import VECTORS_FOLDER
from embedloom.retrieval.search import TopK, check_vectors, merge_top_k, row_scores, top_k
from embedloom.retrieval.stored import Matrix, stored_vectors
from embedloom.retrieval.vector_files import check_same_contract

INDEX_FILE, IDS_FILE, FACTS_FILE = "index.faiss", "index_ids.parquet", "index.json"
_DEPTH = 10  # of the recall
_NOISE = 0.1  # length of the noise added to a query, in lengths of the vector
_ROWS_PER_LIST = 39  # below it FAISS warns that the cells are learnt from too little


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """A loaded index and the ids of its rows."""

    faiss_index: Any
    ids: pa.ChunkedArray
    contract_hash: str
    dimension: int

    def search(self, queries: Matrix, k: int) -> tuple[list[list[str]], Matrix]:
        """Ids and inner products of about the k nearest documents of each query, best first.

        Args:
            queries: float32 [n, dimension], embedded under the same contract.
            k: documents wanted.

        Raises:
            DataError: another dimension, or a query that is zero or not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise DataError(f"queries are {list(queries.shape)}, the index has {self.dimension} dimensions")
        check_vectors(queries, "queries")
        scores, rows = self.faiss_index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        names = [self.ids.take(pa.array(row[row >= 0])).to_pylist() for row in rows]
        return names, scores


def require_faiss() -> None:
    """Raise MissingDependency if FAISS is not installed."""
    if importlib.util.find_spec("faiss") is None:
        raise MissingDependency("faiss", "cpu", "embedding.index")


def build_index(config: IndexConfig, place: Place, contract_hash: str) -> dict[str, Any]:
    """Write the index of ``place/vectors`` and return its facts: kind, device it was built on, rows, recall@10.

    On a GPU that this process may use, with a FAISS that has GPU code, cells (ivf) are learnt and assigned there, and
    graphs (hnsw) built as CAGRA where cuVS is compiled in. The vectors and the finished index are in main memory either
    way, so the file is searched by any FAISS, and only a graph needs all vectors on the GPU.

    Recall is measured on ``sample`` document vectors, each moved by noise of a tenth of its length: the share of
    the ten answers that score no less than the tenth best of the exact search, so equal texts count alike.

    Args:
        config: kind and sizes.
        place: a vectors artefact whose vectors are complete.
        contract_hash: of the vectors.

    Raises:
        MissingDependency: FAISS is not installed.
    """
    require_faiss()
    import faiss

    faiss.omp_set_num_threads(config.threads)
    names = place.names(VECTORS_FOLDER, ".parquet")
    rows = sum(place.parquet_footer(name)[1] for name in names)
    dimension = next(_blocks(place, names))[1].shape[1]
    gpu = gpu_resources()
    if config.kind == "hnsw" and gpu is not None and has_cagra():
        index, device = _graph_by_gpu(config, gpu, place, names, rows, dimension), "gpu"
    elif config.kind == "ivf" and gpu is not None:
        index, device = _cells_by_gpu(config, gpu, place, names, rows, dimension), "gpu"
    else:
        index, device = _empty_index(config, rows, dimension), "cpu"
        if config.kind == "ivf":
            index.train(_sample(place, names, rows, config.training_rows, config.seed))
        for _, vectors in _blocks(place, names):
            index.add(vectors)
    recall = _recall(config, index, place, names, rows)
    _write(index, place)
    ids = pa.concat_tables([place.read_table(name, ["id"]) for name in names])
    place.write_table(IDS_FILE, ids.replace_schema_metadata(None).combine_chunks())
    facts = {
        "kind": config.kind,
        "built_on": device,
        "rows": rows,
        "dimension": dimension,
        "contract_hash": contract_hash,
        f"recall_at_{_DEPTH}": round(recall, 4),
        "recall_queries": min(config.sample, rows),
        "lists": index.nlist if config.kind == "ivf" else None,
    }
    place.write_json(FACTS_FILE, facts)
    return facts


def load_index(place: Place, contract_hash: str, mapped: bool = False) -> VectorIndex:
    """The index of a vectors artefact, checked against what the queries are embedded under.

    Args:
        place: folder with ``index.faiss``, ``index_ids.parquet`` and ``index.json``; local.
        contract_hash: of the queries.
        mapped: whether what can be is mapped from the file, which processes of a node then hold once.

    Raises:
        MissingDependency: FAISS is not installed.
        DataError: no index, files that do not belong together, or another contract.
    """
    require_faiss()
    import faiss

    for name in (FACTS_FILE, INDEX_FILE, IDS_FILE):
        if not place.exists(name):
            raise DataError(f"{place.uri}/{name}: missing; build it with embedding.index")
    facts = place.read_json(FACTS_FILE)
    check_same_contract(
        ("the queries", contract_hash), (f"{place.uri}/{INDEX_FILE}", str(facts.get("contract_hash")))
    )
    try:
        flags = faiss.IO_FLAG_MMAP_IFC if mapped else 0
        index = faiss.read_index(str(place.local / INDEX_FILE), flags)
    except RuntimeError as error:
        raise DataError(f"{place.uri}/{INDEX_FILE}: not readable as a FAISS index") from error
    ids = place.read_table(IDS_FILE, ["id"]).column("id")
    seen = (index.ntotal, len(ids), index.d)
    if seen != (facts["rows"], facts["rows"], facts["dimension"]):
        raise DataError(
            f"{place.uri}/{INDEX_FILE}: {seen[0]} vectors of {seen[2]} dimensions and {seen[1]} ids, "
            f"{FACTS_FILE} says {facts['rows']} of {facts['dimension']}; build it again"
        )
    return VectorIndex(index, ids, contract_hash, int(index.d))


def _blocks(place: Place, names: list[str]) -> Iterator[tuple[int, Matrix]]:
    """Number of the first row and vectors of every file, in order."""
    start = 0
    for name in names:
        vectors = stored_vectors(place.read_table(name), f"{place.uri}/{name}")
        yield start, np.ascontiguousarray(vectors)
        start += len(vectors)


def gpu_resources() -> Any | None:
    """FAISS's handle of a GPU; None where this process has none, or FAISS was compiled without (``faiss-cpu``)."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return None
    return faiss.StandardGpuResources()


def has_cagra() -> bool:
    """Whether FAISS builds graphs on GPUs: CAGRA, of NVIDIA's cuVS."""
    import faiss

    return hasattr(faiss, "GpuIndexCagra") and "CUVS" in faiss.get_compile_options()


def _empty_index(config: IndexConfig, rows: int, dimension: int) -> Any:
    import faiss

    if config.kind == "flat":
        return faiss.IndexFlatIP(dimension)
    if config.kind == "hnsw":
        graph: Any = faiss.IndexHNSWFlat(dimension, config.neighbours, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = config.build_width, config.search_width
        return graph
    lists = config.lists or max(1, min(int(4 * math.sqrt(rows)), rows // _ROWS_PER_LIST))
    if lists > rows:
        raise DataError(f"embedding.index.lists: {lists} cells for {rows} vectors; allowed: at most {rows}")
    quantizer = faiss.IndexFlatIP(dimension)
    index: Any = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.nprobe = config.seed + 1234, min(config.probes, lists)
    index.cp.min_points_per_centroid = 1
    return index


def _cells_by_gpu(
    config: IndexConfig, gpu: Any, place: Place, names: list[str], rows: int, dimension: int
) -> Any:
    """An IVF index in main memory whose products of vectors and centroids, nearly all its work, are made on a GPU."""
    faiss = _faiss()

    index = _empty_index(config, rows, dimension)
    index.clustering_index = faiss.index_cpu_to_gpu(gpu, 0, faiss.IndexFlatIP(dimension))
    index.train(_sample(place, names, rows, config.training_rows, config.seed))
    index.clustering_index = None
    centroids = faiss.index_cpu_to_gpu(gpu, 0, index.quantizer)
    for _, vectors in _blocks(place, names):
        _, cells = centroids.search(vectors, 1)
        # By pointers: numpy arrays are not taken here.
        index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(cells))
    return index


def _graph_by_gpu(
    config: IndexConfig, gpu: Any, place: Place, names: list[str], rows: int, dimension: int
) -> Any:
    """An HNSW index in main memory over the graph that CAGRA builds on a GPU, which must hold all the vectors."""
    faiss = _faiss()

    settings = faiss.GpuIndexCagraConfig()
    settings.graph_degree = 2 * config.neighbours  # HNSW has twice the links at its lowest level
    settings.intermediate_graph_degree = 2 * settings.graph_degree
    cagra = faiss.GpuIndexCagra(gpu, dimension, faiss.METRIC_INNER_PRODUCT, settings)
    vectors = np.empty((rows, dimension), np.float32)
    for start, part in _blocks(place, names):
        vectors[start : start + len(part)] = part
    cagra.train(vectors)
    graph = faiss.IndexHNSWCagra(dimension, config.neighbours, faiss.METRIC_INNER_PRODUCT)
    graph.base_level_only = False  # with the upper levels, so that searches start near
    cagra.copyTo(graph)
    graph.hnsw.efSearch = config.search_width
    return graph


def _faiss() -> Any:
    """The module without its types, which know nothing of GPUs."""
    return importlib.import_module("faiss")


def _sample(place: Place, names: list[str], rows: int, size: int, seed: int) -> Matrix:
    """``size`` of the vectors (all, if there are fewer), drawn by seed, in row order."""
    chosen = np.sort(np.random.default_rng(seed).choice(rows, min(size, rows), replace=False))
    found = []
    for start, vectors in _blocks(place, names):
        here = chosen[(chosen >= start) & (chosen < start + len(vectors))]
        found.append(vectors[here - start])
    return np.concatenate(found)


def _recall(config: IndexConfig, index: Any, place: Place, names: list[str], rows: int) -> float:
    """Share of the index's first ten that exact search ranks no lower than tenth."""
    queries = _sample(place, names, rows, config.sample, config.seed + 1)
    noise = np.random.default_rng(config.seed + 2).standard_normal(queries.shape)
    lengths = np.linalg.norm(queries, axis=1) / np.linalg.norm(noise, axis=1)
    queries = np.ascontiguousarray(queries + _NOISE * noise * lengths[:, None], dtype=np.float32)
    _, found = index.search(queries, min(_DEPTH, rows))
    exact: TopK | None = None
    scores = np.full(found.shape, -np.inf, dtype=np.float32)
    for start, vectors in _blocks(place, names):
        positions = np.arange(start, start + len(vectors), dtype=np.int64)
        best = top_k(queries, vectors, _DEPTH, positions=positions)
        exact = best if exact is None else merge_top_k([exact, best], _DEPTH)
        here = (found >= start) & (found < start + len(vectors))
        scores = np.maximum(scores, row_scores(queries, vectors, np.where(here, found - start, -1)))
    assert exact is not None  # noqa: S101 - an artefact has at least one vector
    return float((scores >= exact.scores[:, -1:]).mean())


def _write(index: Any, place: Place) -> None:
    """Write the index whole or not at all; into an object store it goes through memory."""
    import faiss

    if not place.is_local:
        place.write_bytes(INDEX_FILE, faiss.serialize_index(index).tobytes())
        return
    temporary: Path = place.local / f"_tmp-{os.getpid()}-{INDEX_FILE}"
    faiss.write_index(index, str(temporary))
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(place.local / INDEX_FILE)
