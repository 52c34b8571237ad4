"""Candidates: one teacher's search over all queries, every hit kept with its score, and the result read back."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.compute.shards import PART_PATTERN
from embedloom.config.cluster import PoolConfig
from embedloom.config.mining import MiningConfig
from embedloom.core.artefacts import Artefact
from embedloom.core.progress import Progress, note
from embedloom.core.prompting import LABEL_TASK_TYPES
from embedloom.core.schemas import check_table
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.mining.documents import ChunkedDocuments, DocumentTexts
from embedloom.mining.queries import CORPUS, GIVEN_FOLDER, QUERIES_FOLDER, UNSEARCHED, inline_id
from embedloom.retrieval.embed import TextColumns, embed_corpus
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.retrieval.search import TopK
from embedloom.retrieval.sharded import Asked, VectorCatalogue, search_sharded
from embedloom.retrieval.vector_files import CUT_COUNTS, check_same_contract, cut_line, read_vector_file

# One teacher's pass over all queries: embed, search, and keep every candidate with its score.


DOCUMENTS_FOLDER = "documents/train"
CANDIDATES_FOLDER = "candidates"
SCORES_FOLDER = "positive_scores"
SCORES_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("teacher", pa.string()),
        ("positive_score", pa.float32()),  # of the pair's own positive
        ("lowest_score", pa.float32()),  # of all known positives of the query
        ("given_scores", pa.list_(pa.float32())),  # of the negatives that came with the pair
    ]
)
_GIVEN_TEXTS = TextColumns(texts=("text",), task_type="task_type", instruction="instruction")


class TeacherPass:
    """Embeds and searches for one teacher; every step continues where it stopped."""

    def __init__(
        self,
        number: int,
        source: EmbedderSource,
        config: MiningConfig,
        place: Place,
        corpus: Place,
        pool: PoolConfig,
        ahead: Place | None = None,
    ) -> None:
        self.number = number
        self._source = source
        self._config = config
        self._place = place
        self._corpus = corpus
        self._pool = pool
        self._folder = f"teachers/{number}"
        self._ahead = None if ahead is None else ahead.child(str(number))

    def embed(self, queries: dict[str, Any]) -> dict[str, int]:
        """Write query and document vectors; tokens by side, and what the teacher's limits cut."""
        common: dict[str, Any] = {
            "output": self._place, "model": self._source, "pool": self._pool, "shard_rows": self._config.shard_rows,
        }  # fmt: skip
        name = self._source.name
        # Query parts are of any length, and a part's vectors must be its own.
        asked = embed_corpus(
            stage=f"mine queries, {name}", source=self._place, source_folder=QUERIES_FOLDER, side="query",
            done_folder=f"{self._folder}/queries", columns=_GIVEN_TEXTS, by_file=True, ahead=self._ahead,
            **common,
        )  # fmt: skip
        found = [asked]
        if CORPUS in queries["parts"]:
            done = embed_corpus(
                stage=f"mine documents, {name}", source=self._corpus, source_folder=DOCUMENTS_FOLDER, side="document",
                done_folder=self._vectors(CORPUS), **common,
            )  # fmt: skip
            found.append(done)
        for group in queries["given"]:
            done = embed_corpus(
                stage=f"mine given texts, {name}", source=self._place, source_folder=f"{GIVEN_FOLDER}/{group}",
                side="document", done_folder=self._vectors(group), columns=_GIVEN_TEXTS, **common,
            )  # fmt: skip
            found.append(done)
        cost = sum(map(Counter, found), Counter[str]())
        note("mine", f"{name}: {cut_line(cost['rows'], cost)}")
        documents = cost["tokens"] - asked["tokens"]
        cut = {key: cost[key] for key in CUT_COUNTS if key in cost}
        return {"queries": asked["tokens"], "documents": documents, **cut}

    def search(self, queries: dict[str, Any], parts: list[str]) -> str:
        """Write ``candidates/`` and ``positive_scores/`` of every part; returns the contract hash."""
        if UNSEARCHED in queries["given"]:
            self._search(UNSEARCHED, parts, parts, f"{self._folder}/given_scores", 0)
        for collection, names in queries["parts"].items():
            self._search(collection, names, parts, CANDIDATES_FOLDER, self._config.top_k)
        first = self._place.names(f"{self._folder}/queries", ".parquet")[0]
        return read_vector_file(self._place, first)[2]

    def part(self, parts: list[str], name: str) -> str:
        """Name of this teacher's results for a part of the queries: all teachers share the folders."""
        return PART_PATTERN.format(self.number * len(parts) + parts.index(name))

    def _vectors(self, collection: str) -> str:
        return f"{self._folder}/documents/{collection}"

    def _search(self, collection: str, names: list[str], parts: list[str], folder: str, k: int) -> None:
        given = folder.endswith("given_scores")
        done = set(self._place.names(folder, ".parquet"))
        todo = [name for name in names if f"{folder}/{name if given else self.part(parts, name)}" not in done]
        if not todo:
            return
        catalogue = VectorCatalogue.read(self._place, self._vectors(collection))
        task = (_GivenTask if given else _SearchTask)(self, catalogue, todo, parts)
        progress = Progress(
            f"mine {collection}, {self._source.name}", len(names), "parts", done=len(names) - len(todo)
        )
        for _ in search_sharded(
            stage="mine", catalogue=catalogue, items=len(todo), task=task, k=k, pool=self._pool,
            memory_bytes=int(self._config.memory_gib * 2**30),
        ):  # fmt: skip
            progress.advance(1)

    def query_rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of one part of the queries."""
        return list(self._place.read_table(f"{QUERIES_FOLDER}/{name}").to_pylist())

    def query_vectors(self, name: str, rows: list[dict[str, Any]], catalogue: VectorCatalogue) -> Any:
        """Vectors of these rows: [rows, d].

        Raises:
            DataError: another contract than the documents', or vectors of other rows.
        """
        file = f"{self._folder}/queries/{name}"
        ids, vectors, contract_hash = read_vector_file(self._place, file)
        check_same_contract((file, contract_hash), (catalogue.source, catalogue.contract_hash))
        if ids != [row["id"] for row in rows]:
            raise DataError(
                f"{self._place.uri}/{file}: its ids are not those of {QUERIES_FOLDER}/{name}; delete the mining folder to build it again"
            )
        return vectors

    def given_scores(self, name: str, rows: int) -> list[list[float]]:
        """Scores of the texts that came with each query of a part, as ``_GivenTask`` wrote them."""
        file = f"{self._folder}/given_scores/{name}"
        if not self._place.exists(file):
            return [[] for _ in range(rows)]
        return list(self._place.read_table(file).column("scores").to_pylist())

    def write(self, name: str, table: pa.Table) -> None:
        """Store a table of the artefact."""
        self._place.write_table(name, table)

    @property
    def teacher(self) -> str:
        """Its name."""
        return self._source.name

    @property
    def scores_folder(self) -> str:
        """Where the scores of given texts go."""
        return f"{self._folder}/given_scores"


def given_texts(row: dict[str, Any]) -> list[str]:
    """Texts of a query that are scored but not searched: its positive, if the collection lacks it, and negatives."""
    if row["collection"] != CORPUS:
        return []
    return [text for text in [row["positive"] or "", *(row["negatives"] or [])] if text.strip()]


class _Task(ABC):
    """What one part asks and what becomes of the answer; travels to Ray tasks through the object store."""

    def __init__(
        self, owner: TeacherPass, catalogue: VectorCatalogue, todo: list[str], parts: list[str]
    ) -> None:
        self._owner = owner
        self._catalogue = catalogue
        self._todo = todo
        self._parts = parts

    @abstractmethod
    def wanted(self, row: dict[str, Any]) -> Iterable[str]:
        """Document ids to score with a query."""

    def pairs(self, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
        """Query row and document position of every pair that the catalogue knows."""
        numbers = [number for number, row in enumerate(rows) for _ in self.wanted(row)]
        positions = self._catalogue.find([identifier for row in rows for identifier in self.wanted(row)])
        return np.array(numbers, dtype=np.int64), positions

    def read(self, number: int) -> Asked:
        """The question of one part."""
        rows = self._owner.query_rows(self._todo[number])
        return Asked(self._owner.query_vectors(self._todo[number], rows, self._catalogue), *self.pairs(rows))


class _GivenTask(_Task):
    """Scores of given texts."""

    def wanted(self, row: dict[str, Any]) -> Iterable[str]:
        return [inline_id(text, row["task_type"], row["instruction"]) for text in given_texts(row)]

    def finish(self, number: int, _: TopK, scores: Any) -> None:
        """Write one list of scores a query."""
        name = self._todo[number]
        rows = self._owner.query_rows(name)
        asked, _positions = self.pairs(rows)
        lists = [scores[asked == row].tolist() for row in range(len(rows))]
        table = pa.table(
            {"query_id": [row["id"] for row in rows], "scores": pa.array(lists, pa.list_(pa.float32()))}
        )
        self._owner.write(f"{self._owner.scores_folder}/{name}", table)


class _SearchTask(_Task):
    """Candidates of every query, and the scores of its positives."""

    def wanted(self, row: dict[str, Any]) -> Iterable[str]:
        return list(dict.fromkeys([row["document_id"], *row["known_positives"]]))

    def finish(self, number: int, found: TopK, scores: Any) -> None:
        """Write the part's scores, then its candidates, whose file marks it done."""
        name = self._todo[number]
        rows = self._owner.query_rows(name)
        given = self._owner.given_scores(name, len(rows))
        asked, _ = self.pairs(rows)
        table = [
            _score_row(row, self._owner.teacher, scores[asked == place], given[place])
            for place, row in enumerate(rows)
        ]
        part = self._owner.part(self._parts, name)
        self._owner.write(f"{SCORES_FOLDER}/{part}", pa.Table.from_pylist(table, schema=SCORES_SCHEMA))
        self._owner.write(f"{CANDIDATES_FOLDER}/{part}", self._candidates(rows, found))

    def _candidates(self, rows: list[dict[str, Any]], found: TopK) -> pa.Table:
        width = found.positions.shape[1]
        offsets = pa.array(
            np.arange(0, len(rows) * width + 1, width) if width else np.zeros(len(rows) + 1), pa.int32()
        )
        names = self._catalogue.ids.take(pa.array(found.positions.reshape(-1))).cast(pa.string())
        columns = {
            "query_id": pa.array([row["id"] for row in rows], pa.string()),
            "document_ids": pa.ListArray.from_arrays(offsets, names),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(found.scores.reshape(-1))),
            "teacher": pa.array([self._owner.teacher] * len(rows), pa.string()),
            "contract_hash": pa.array([self._catalogue.contract_hash] * len(rows), pa.string()),
        }
        return check_table("candidates", pa.table(columns), "mined candidates")


def _score_row(row: dict[str, Any], teacher: str, known: Any, given: list[float]) -> dict[str, Any]:
    """Scores of one query. ``known`` follows ``wanted``: the own positive first, NaN where the catalogue lacks it."""
    inside = row["positive"] is None or row["collection"] != CORPUS
    own = float(known[0]) if inside else given[0]
    scores = [own, *(float(score) for score in known if not np.isnan(score))]
    return {
        "query_id": row["id"],
        "teacher": teacher,
        "positive_score": own,
        "lowest_score": min(scores),
        "given_scores": given if inside else given[1:],
    }


def part_names(queries: dict[str, Any]) -> list[str]:
    """All parts of the queries, in order."""
    return sorted(Path(name).name for names in queries["parts"].values() for name in names)


# Reading a mining artefact back: what was found for every query, and the texts behind it.


@dataclass(frozen=True, slots=True)
class Found:
    """What one teacher found for one query."""

    ids: list[str]
    scores: list[float]
    positive: float
    lowest: float
    given: list[float]
    teacher: str


@dataclass(frozen=True, slots=True)
class Mined:
    """Where scored candidates and their texts lie; small and picklable."""

    scored: Place  # holds ``candidates/`` and ``positive_scores/``
    parts: tuple[str, ...]  # of the queries
    teachers: int
    texts: tuple[tuple[Place, str], ...]  # folders of documents and of texts that came with pairs
    corpus: Place | None = None  # whose ``chunks`` say which documents are pieces of one

    @classmethod
    def of(cls, mined: Artefact, corpus: Artefact) -> "Mined":
        """The teachers' candidates of a mining artefact."""
        details = mined.manifest["details"]
        documents = [(corpus.place, DOCUMENTS_FOLDER)] if CORPUS in details["parts"] else []
        given = [(mined.place, f"{GIVEN_FOLDER}/{name}") for name in details["given"]]
        parts = tuple(part_names(details))
        return cls(mined.place, parts, len(details["teachers"]), (*documents, *given), corpus.place)

    def rescored(self, artefact: Artefact) -> "Mined":
        """The same queries and texts with the scores of a rescoring artefact."""
        return replace(self, scored=artefact.place, teachers=1)

    def found(self, part: str) -> list[list[Found]]:
        """Every teacher's results for a part of the queries, query by query."""
        return [
            self._read(PART_PATTERN.format(number * len(self.parts) + self.parts.index(part)))
            for number in range(self.teachers)
        ]

    def open_texts(self) -> DocumentTexts:
        """The texts by id; reads all ids."""
        return DocumentTexts(list(self.texts))

    def open_chunks(self, texts: DocumentTexts) -> ChunkedDocuments | None:
        """Which of the texts are pieces of one document; None where nothing says."""
        return None if self.corpus is None else ChunkedDocuments(texts, self.corpus)

    def _read(self, name: str) -> list[Found]:
        candidates = self.scored.read_table(f"{CANDIDATES_FOLDER}/{name}").to_pylist()
        scores = self.scored.read_table(f"{SCORES_FOLDER}/{name}").to_pylist()
        return [
            Found(c["document_ids"], c["scores"], s["positive_score"], s["lowest_score"], s["given_scores"], s["teacher"])
            for c, s in zip(candidates, scores, strict=True)
        ]  # fmt: skip


def positive_texts(texts: DocumentTexts, queries: Sequence[dict[str, Any]]) -> list[str]:
    """Text of each query's own positive, out of its collection or as it came with the pair."""
    positions = texts.find([row["document_id"] for row in queries])
    found = texts.texts(positions[positions >= 0].tolist())
    return [row["positive"] or found[int(at)] for at, row in zip(positions, queries, strict=True)]


def negatives_given(row: dict[str, Any]) -> bool:
    """Whether a query's negatives come with it, and the corpus is not searched for them."""
    return bool(row["negatives"]) or (row["task_type"] in LABEL_TASK_TYPES and row["collection"] == CORPUS)
