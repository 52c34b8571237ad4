"""Round trip: a query is kept if a teacher, searching the whole train split, finds its document again.

The corpus is embedded once, each round's queries once; the search is exact and streams over actors (retrieval).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.compute.shards import run_tasks
from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.retrieval.embed import TextColumns, embed_corpus
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.retrieval.search import TopK
from embedloom.retrieval.sharded import Asked, VectorCatalogue, search_sharded
from embedloom.retrieval.vector_files import check_same_contract, read_vector_file
from embedloom.synthesis.refusals import Round, refusal_table, refusals_of, surviving

ROUND_TRIP_FOLDER = "round_trip"
DOCUMENTS_FOLDER = "documents/train"
_VECTORS_FOLDER = "steps/document_vectors"
_ASKED_FOLDER = "asked"
_ASKED_VECTORS = "asked_vectors"
_ASKED_FILE = "asked.json"
_DOCUMENTS_PER_SHARD = 512
_QUERY_TEXTS = TextColumns(texts=("query",), task_type="task_type", instruction="instruction")
_ASKED_COLUMNS = ["id", "query", "document_id", "task_type", "instruction"]


@dataclass(frozen=True)
class RoundTrip:
    """What the pass needs."""

    place: Place
    corpus: Place
    teacher: EmbedderSource
    pool: PoolConfig
    top_k: int


def refuse_unfound(stage: str, trip: RoundTrip, one: Round) -> None:
    """Write ``round_trip/`` of a round; what is there already is kept."""
    place = trip.place
    rows = _asked_rows(stage, trip, one)
    if not rows:
        return
    common: dict[str, Any] = {"output": place, "model": trip.teacher, "pool": trip.pool}
    embed_corpus(
        stage=f"{stage}: round trip, documents", source=trip.corpus, source_folder=DOCUMENTS_FOLDER, side="document",
        done_folder=_VECTORS_FOLDER, shard_rows=_DOCUMENTS_PER_SHARD, **common,
    )  # fmt: skip
    embed_corpus(  # a shard holds a file, so the vectors of a file have its number
        stage=f"{stage}: round trip, queries", source=place, source_folder=f"{one.folder}/{_ASKED_FOLDER}", side="query",
        done_folder=f"{one.folder}/{_ASKED_VECTORS}", columns=_QUERY_TEXTS, by_file=True, shard_rows=max(rows.values()),
        **common,
    )  # fmt: skip
    done = set(place.names(f"{one.folder}/{ROUND_TRIP_FOLDER}", ".parquet"))
    names = list(rows)
    todo = [n for n, name in enumerate(names) if f"{one.folder}/{ROUND_TRIP_FOLDER}/{name}" not in done]
    if not todo:
        return
    catalogue = VectorCatalogue.read(place, _VECTORS_FOLDER)
    task = _Search(trip, one.folder, catalogue, names, todo)
    for _ in search_sharded(
        stage=stage, catalogue=catalogue, items=len(todo), task=task, k=trip.top_k, pool=trip.pool
    ):
        pass


def _asked_rows(stage: str, trip: RoundTrip, one: Round) -> dict[str, int]:
    """Rows per file of queries that point into the corpus and passed so far; files without any are not written."""
    marker = f"{one.folder}/{_ASKED_FILE}"
    if not trip.place.exists(marker):
        found: dict[str, int] = {}
        for part in run_tasks(stage, _write_asked, one.groups(trip.place), one, trip.place):
            found.update(part)
        trip.place.write_json(marker, found)
    return {name: int(count) for name, count in sorted(trip.place.read_json(marker).items())}


def _write_asked(parts: tuple[str, ...], one: Round, place: Place) -> dict[str, int]:
    refused = refusals_of(place, one, parts)
    found: dict[str, int] = {}
    for part in parts:
        rows = surviving(one.rows(place, part, [*_ASKED_COLUMNS, "positive"]), refused[part])
        # A positive of its own, which no document of the corpus is, cannot be found there.
        rows = rows.filter(
            pa.array([text is None for text in rows.column("positive").to_pylist()], pa.bool_())
        )
        if rows.num_rows:
            place.write_table(f"{one.folder}/{_ASKED_FOLDER}/{part}", rows.select(_ASKED_COLUMNS))
            found[part] = rows.num_rows
    return found


class _Search:
    """Asks for the top k of a part's queries and refuses those whose document is not among them."""

    def __init__(
        self, trip: RoundTrip, folder: str, catalogue: VectorCatalogue, names: list[str], todo: list[int]
    ) -> None:
        self._trip = trip
        self._folder = folder
        self._catalogue = catalogue
        self._names = names
        self._todo = todo

    def read(self, number: int) -> Asked:
        """Vectors of one part's queries."""
        position = self._todo[number]
        file = f"{self._folder}/{_ASKED_VECTORS}/part-{position:06d}.parquet"
        _, vectors, contract_hash = read_vector_file(self._trip.place, file)
        check_same_contract((file, contract_hash), (self._catalogue.source, self._catalogue.contract_hash))
        none = np.empty(0, np.int64)
        return Asked(vectors, none, none)

    def finish(self, number: int, found: TopK, _: Any) -> None:
        """Write the part's refusals."""
        name = self._names[self._todo[number]]
        rows = self._trip.place.read_table(f"{self._folder}/{_ASKED_FOLDER}/{name}").to_pylist()
        table = refusal_table(self._refusals(name, rows, found))
        self._trip.place.write_table(f"{self._folder}/{ROUND_TRIP_FOLDER}/{name}", table)

    def _refusals(self, name: str, rows: list[dict[str, Any]], found: TopK) -> Iterator[dict[str, object]]:
        own = self._catalogue.find([row["document_id"] for row in rows])
        ranked = (found.positions == own[:, None]).any(axis=1)
        for row, here in zip(rows, ranked, strict=True):
            if not here:
                detail = f"its document is not among the teacher's first {self._trip.top_k}: {row['query']}"
                yield {"part": name, "id": row["id"], "reason": "round_trip", "detail": detail[:200]}
