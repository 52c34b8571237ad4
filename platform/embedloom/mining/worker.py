"""The actor of the mining stage: a shard of queries in; candidates, examples, audit and rejects out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.errors import DataError
from embedloom.mining.documents import DocumentTexts
from embedloom.mining.queries import inline_id
from embedloom.mining.select import Selection, select_negatives
from embedloom.records import check_table, table_from_rows
from embedloom.retrieval.exact import Matrix, pair_scores
from embedloom.retrieval.search import TopK
from embedloom.retrieval.vectors import VectorStore, check_same_contract, read_vector_file
from embedloom.storage import Place

QUERY_VECTORS = "query_vectors"
DOCUMENT_VECTORS = "document_vectors"
INLINE_VECTORS = "inline_vectors"
DOCUMENTS_FOLDER = "documents/train"
EXAMPLES_FOLDER = "examples"
AUDIT_FOLDER = "audit"
REJECTS_FOLDER = "rejects"
CANDIDATES_FOLDER = "candidates"

AUDIT_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("dataset", pa.string()),
        ("positive_score", pa.float32()),
        ("negatives", pa.int32()),
        ("given", pa.bool_()),  # the negatives came with the pair
        ("removed_as_positive", pa.int32()),
        ("removed_by_margin", pa.int32()),
        ("naive", pa.int32()),
        ("naive_removed", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class MiningRules:
    """What a worker needs of the config and the teacher's contract."""

    teacher: str
    top_k: int
    negatives: int
    margin_ratio: float
    symmetric_task_types: tuple[str, ...]


class MiningWorker:
    """Searches, scores and selects for one shard of ``queries/`` at a time."""

    def __init__(self, rules: MiningRules, place: Place, corpus: Place, has_inline: bool) -> None:
        self.rules = rules
        self.place = place
        self.documents = VectorStore(place, DOCUMENT_VECTORS)
        self.texts = DocumentTexts(corpus, DOCUMENTS_FOLDER, self.documents)
        self.inline = VectorStore(place, INLINE_VECTORS) if has_inline else None

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Mine one shard; the candidates are named last, so their file marks it done."""
        queries = rows.to_pylist()
        vectors = self._query_vectors(queries)
        found = self.documents.search(vectors, self.rules.top_k)
        positives, scores = self._positives(queries, vectors)
        selected = self._select(queries, vectors, found, positives, scores)
        negatives = self.texts.texts(key for one in selected for key in one.ids if isinstance(key, int))
        examples, audit, rejects = [], [], []
        for row, positive, score, one in zip(queries, positives, scores, selected, strict=True):
            reason = _reject_reason(row, positive, one)
            if reason is not None:
                rejects.append({"id": row["id"], "reason": reason, "detail": row["document_id"]})
            else:
                examples.append(self._example(row, positive or "", score, one, negatives))
            if positive is not None:
                audit.append(_audit_row(row, score, one))
        return {
            REJECTS_FOLDER: table_from_rows("rejects", rejects),
            AUDIT_FOLDER: pa.Table.from_pylist(audit, schema=AUDIT_SCHEMA),
            EXAMPLES_FOLDER: table_from_rows("examples", examples),
            CANDIDATES_FOLDER: self._candidates(queries, found),
        }

    def _query_vectors(self, queries: list[dict[str, Any]]) -> Matrix:
        """Vectors of these rows, from the file that has their number: [rows, d]."""
        name = f"{QUERY_VECTORS}/{queries[0]['part']}"
        ids, vectors, contract_hash = read_vector_file(self.place, name)
        check_same_contract((name, contract_hash), (DOCUMENT_VECTORS, self.documents.contract_hash))
        if ids != [row["id"] for row in queries]:
            raise DataError(
                f"{self.place.uri}/{name}: its ids are not those of queries/{queries[0]['part']}; delete the mining folder to build it again"
            )
        return vectors

    def _positives(
        self, queries: list[dict[str, Any]], vectors: Matrix
    ) -> tuple[list[str | None], list[float]]:
        """Text and teacher score of each row's own positive; None where neither the corpus nor the pair has one."""
        positions = self.documents.find([row["document_id"] for row in queries])
        texts = self.texts.texts(positions[positions >= 0].tolist())
        positives = [
            texts[int(at)] if at >= 0 else row["positive"] for at, row in zip(positions, queries, strict=True)
        ]
        scores = np.full(len(queries), np.nan, dtype=np.float32)
        inside = np.flatnonzero(positions >= 0)
        scores[inside] = pair_scores(vectors[inside], self.documents.take(positions[inside]))
        outside = [number for number in np.flatnonzero(positions < 0).tolist() if positives[number]]
        scores[outside] = self._inline_scores(
            vectors[outside], [str(positives[number]) for number in outside]
        )
        return positives, scores.tolist()

    def _inline_scores(self, vectors: Matrix, texts: list[str]) -> Matrix:
        """Teacher score of each vector with the given text of the same row: [rows]."""
        if not texts:
            return np.empty(0, dtype=np.float32)
        if self.inline is None:
            raise DataError(
                f"{self.place.uri}: {len(texts)} texts given with pairs have no vectors; delete the mining folder to build it again"
            )
        return pair_scores(vectors, self.inline.take(self.inline.find([inline_id(text) for text in texts])))

    def _select(
        self,
        queries: list[dict[str, Any]],
        vectors: Matrix,
        found: TopK,
        positives: list[str | None],
        scores: list[float],
    ) -> list[Selection[Any]]:
        """Negatives of each row: positions of documents, or the texts that came with the pair."""
        same = self.texts.same_text(found.positions)
        selected: list[Selection[Any]] = []
        for number, (row, positive, score) in enumerate(zip(queries, positives, scores, strict=True)):
            given = [
                text for text in dict.fromkeys(row["negatives"] or []) if text.strip() and text != positive
            ]
            if positive is None:
                selected.append(Selection([], [], 0, 0, 0, 0))
            elif given:
                kept = given[: self.rules.negatives]
                own = self._inline_scores(np.repeat(vectors[number : number + 1], len(kept), axis=0), kept)
                selected.append(Selection(kept, own.tolist(), 0, 0, 0, 0))
            else:
                excluded = self._excluded(row["known_positives"], positive)
                selected.append(
                    select_negatives(
                        same[number].tolist(),
                        found.scores[number].tolist(),
                        excluded,
                        score,
                        self.rules.margin_ratio,
                        self.rules.negatives,
                    )
                )
        return selected

    def _excluded(self, known: list[str], positive: str) -> set[int | None]:
        """Documents that count as positives, by the smallest position of their text."""
        positions = self.documents.find(known)
        return {self.texts.position_of(positive), *self.texts.same_text(positions[positions >= 0]).tolist()}

    def _example(
        self, row: dict[str, Any], positive: str, score: float, one: Selection[Any], texts: dict[int, str]
    ) -> dict[str, Any]:
        symmetric = row["task_type"] in self.rules.symmetric_task_types
        return {
            "id": row["id"],
            "query": row["text"],
            "query_instruction": row["instruction"],
            "positive": positive,
            "positive_score": score,
            "negatives": [texts[key] if isinstance(key, int) else key for key in one.ids],
            "negative_scores": one.scores,
            "document_instruction": row["instruction"] if symmetric else None,
            "task_type": row["task_type"],
            "dataset": row["dataset"],
        }

    def _candidates(self, queries: list[dict[str, Any]], found: TopK) -> pa.Table:
        rows, width = found.positions.shape
        offsets = pa.array(np.arange(0, rows * width + 1, width), pa.int32())
        names = self.documents.ids.take(pa.array(found.positions.reshape(-1))).cast(pa.string())
        columns = {
            "query_id": pa.array([row["id"] for row in queries], pa.string()),
            "document_ids": pa.ListArray.from_arrays(offsets, names),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(found.scores.reshape(-1))),
            "teacher": pa.array([self.rules.teacher] * rows, pa.string()),
            "contract_hash": pa.array([self.documents.contract_hash] * rows, pa.string()),
        }
        return check_table("candidates", pa.table(columns), "mined candidates")


def _reject_reason(row: dict[str, Any], positive: str | None, one: Selection[Any]) -> str | None:
    if not row["text"].strip():
        return "empty_query"
    if positive is None:
        return "positive_not_in_corpus"
    if not positive.strip():
        return "empty_positive"
    return None if one.ids else "no_negative_under_margin"


def _audit_row(row: dict[str, Any], score: float, one: Selection[Any]) -> dict[str, Any]:
    return {
        "query_id": row["id"],
        "dataset": row["dataset"],
        "positive_score": score,
        "negatives": len(one.ids),
        "given": any(isinstance(key, str) for key in one.ids),
        "removed_as_positive": one.removed_as_positive,
        "removed_by_margin": one.removed_by_margin,
        "naive": one.naive,
        "naive_removed": one.naive_removed,
    }
