"""Reading a mining artefact back: what was found for every query, and the texts behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from embedloom.artefacts import Artefact
from embedloom.engines.shards import PART_PATTERN
from embedloom.instructions import LABEL_TASK_TYPES
from embedloom.mining.documents import ChunkedDocuments, DocumentTexts
from embedloom.mining.given import CORPUS, GIVEN_FOLDER
from embedloom.mining.teacher_pass import CANDIDATES_FOLDER, DOCUMENTS_FOLDER, SCORES_FOLDER, part_names
from embedloom.storage import Place


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
