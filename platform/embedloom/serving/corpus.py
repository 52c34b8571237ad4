"""An embedded corpus to search: its FAISS index, or exact search over its vectors, and the texts behind the rows.

Loads torch through ``retrieval``; a gateway without a corpus never imports it.
"""

from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.artefacts import Artefact
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.fill_in import VECTORS_FOLDER
from embedloom.retrieval.index import FACTS_FILE, load_index
from embedloom.retrieval.search import DocumentBlock
from embedloom.retrieval.vector_files import check_same_contract, read_vectors
from embedloom.serving.corpus_texts import CorpusText, CorpusTexts, open_texts
from embedloom.serving.messages import Vectors
from embedloom.serving.replies import CorpusCard, SearchHit
from embedloom.storage import Place

Rows = np.ndarray[Any, np.dtype[np.int64]]


class _Searcher(Protocol):
    """Anything that finds rows."""

    kind: str

    def rows(self, query: Vectors, count: int) -> tuple[Rows, Vectors]:
        """Rows and scores of the nearest vectors, best first: [<= count] each."""
        ...


class _Exact:
    """Every vector compared; equal scores in the order of their ids."""

    kind = "exact"

    def __init__(self, ids: pa.Array, vectors: Vectors) -> None:
        order = pc.sort_indices(ids).to_numpy()
        ranks = np.empty(len(ids), dtype=np.int64)
        ranks[order] = np.arange(len(ids), dtype=np.int64)
        self._row_of_rank = order
        self._block = DocumentBlock(vectors, ranks)

    def rows(self, query: Vectors, count: int) -> tuple[Rows, Vectors]:
        best = self._block.search(query[None], count)
        return self._row_of_rank[best.positions[0]].astype(np.int64), best.scores[0]


class _Faiss:
    """What the artefact's index finds."""

    def __init__(self, index: Any, kind: str) -> None:
        self.kind = kind
        self._index = index

    def rows(self, query: Vectors, count: int) -> tuple[Rows, Vectors]:
        scores, rows = self._index.search(np.ascontiguousarray(query[None], dtype=np.float32), count)
        found = rows[0] >= 0  # an approximate index may come back with fewer
        return rows[0][found], scores[0][found]


class SearchCorpus:
    """A vectors artefact, ready to be asked with vectors of the model that made it."""

    def __init__(
        self,
        ids: pa.Array,
        searcher: _Searcher,
        dimension: int,
        normalize: bool,
        contract_hash: str,
        texts: CorpusTexts | None,
    ) -> None:
        self.contract_hash = contract_hash
        self.card = CorpusCard(
            documents=len(ids), dimension=dimension, index=searcher.kind, texts=texts is not None
        )
        self._ids = ids
        self._searcher = searcher
        self._dimension = dimension
        self._normalize = normalize
        self._texts = texts

    def search(self, query: Vectors, count: int, with_texts: bool) -> list[SearchHit]:
        """The nearest documents, best first.

        Args:
            query: float32 [the model's dimension]; cut to the corpus's where its vectors are cut.
            count: documents wanted.
            with_texts: whether titles, texts and where they come from come along.
        """
        query = query[: self._dimension]
        if self._normalize:
            query = query / max(float(np.linalg.norm(query)), 1e-12)
        rows, scores = self._searcher.rows(query, min(count, len(self._ids)))
        ids = self._ids.take(pa.array(rows)).to_pylist()
        read = self._texts.read if self._texts is not None and with_texts else _unknown
        return [
            SearchHit(id=own, score=float(score), **asdict(text))
            for own, score, text in zip(ids, scores, read(rows), strict=True)
        ]


def _unknown(rows: Rows) -> list[CorpusText]:
    return [CorpusText()] * len(rows)


def load_corpus(
    place: Place, documents: str | None, contract_hash: str, model: str, normalize: bool
) -> SearchCorpus:
    """Open a vectors artefact for search, checked against the model that will embed the queries.

    Args:
        place: the artefact.
        documents: the input it was embedded from; None: look beside it.
        contract_hash: of the served model.
        model: what ``ModelFolder.id`` says of the served model.
        normalize: whether its vectors have unit length.

    Raises:
        DataError: no finished artefact of documents, or one of another contract or other weights.
        MissingDependency: it has an index and FAISS is not installed.
    """
    artefact = check_corpus(place, contract_hash, model)
    if place.exists(FACTS_FILE):
        index = load_index(place, contract_hash)
        ids, dimension = index.ids.combine_chunks(), index.dimension
        searcher: _Searcher = _Faiss(index.faiss_index, str(place.read_json(FACTS_FILE)["kind"]))
    else:
        names, vectors = read_vectors(place, VECTORS_FOLDER, contract_hash)
        ids, dimension = pa.array(names, pa.string()), int(vectors.shape[1])
        searcher = _Exact(ids, vectors)
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks)
    texts = open_texts(artefact, documents)
    return SearchCorpus(ids, searcher, dimension, normalize, contract_hash, texts)


def check_corpus(place: Place, contract_hash: str, model: str) -> Artefact:
    """The artefact, if the served model made it.

    Raises:
        ConfigError: it is of queries.
        DataError: see ``load_corpus``.
    """
    artefact = Artefact.open(place, "vectors")
    details = artefact.manifest["details"]
    check_same_contract(("the served model", contract_hash), (place.uri, str(details.get("contract_hash"))))
    if details.get("model_id") != model:
        raise DataError(
            f"serving.corpus: {place.uri}: embedded by model {details.get('model_id')!r}, the served model is {model!r}; "
            "vectors of different weights cannot be compared, embed the corpus with the served model"
        )
    side = dict(details.get("recipe") or {}).get("side", "document")
    if side != "document":
        raise ConfigError(f"serving.corpus: {place.uri}: its vectors are of side {side!r}; allowed: document")
    return artefact
