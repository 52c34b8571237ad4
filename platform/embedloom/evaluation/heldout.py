"""The run's own held-out split as retrieval data: documents are the corpus, natural pairs the queries."""

import json
import math

from embedloom.artefacts import Artefact, fingerprint
from embedloom.errors import DataError
from embedloom.evaluation.retrieval_task import Query, RetrievalData
from embedloom.ngrams import folded
from embedloom.records import GRADE, check_unique_ids

_SCORED_TASK_TYPES = ("retrieval",)


def check_heldout(corpus: Artefact, split: str, where: str) -> None:
    """Raise DataError if the corpus artefact has no held-out documents or pairs in ``split``."""
    for folder in ("documents", "pairs"):
        if not corpus.place.names(f"{folder}/{split}", ".parquet"):
            raise DataError(
                f"{where}: {corpus.place.uri}/{folder}/{split} has no Parquet file; a heldout task needs "
                f"documents and natural pairs in its split (raise corpus.split.{split}, or use a source "
                "that has pairs)"
            )


def read_heldout(corpus: Artefact, split: str, where: str, own_instructions: bool = False) -> RetrievalData:
    """Read one split; pairs that ask the same under one instruction become one query with several positives.

    Every document that any pair names for the question counts, under whatever instruction, with its best grade. A
    document that was cut counts by its best chunk, see ``best_chunk``.

    With ``own_instructions``, pairs with the same text and different instructions stay two queries; without, they are
    one, as they are to a model that is asked without any.

    Raises:
        DataError: no pairs, a pair whose document is not in the split, or pairs of another task type.
    """
    check_heldout(corpus, split, where)
    documents = corpus.place.read_tables(f"documents/{split}", "documents")
    check_unique_ids(documents, f"{corpus.place.uri}/documents/{split}")
    columns = documents.select(["id", "title", "text"]).to_pydict()
    rows = [
        (i, title or "", text)
        for i, title, text in zip(columns["id"], columns["title"], columns["text"], strict=True)
    ]
    known = set(columns["id"])
    owners = _chunk_owners(corpus, known)
    pairs = corpus.place.read_tables(f"pairs/{split}", "pairs").to_pylist()
    for pair in pairs:
        _check_pair(pair, known, split, where)
    groups: dict[tuple[str, str | None], list[dict[str, str]]] = {}
    judged: dict[str, dict[str, int]] = {}
    for pair in pairs:
        question = folded(pair["query"])
        groups.setdefault((question, pair["instruction"] if own_instructions else None), []).append(pair)
        grades = judged.setdefault(question, {})
        document = owners.get(pair["document_id"], pair["document_id"])
        grades[document] = max(_grade(pair), grades.get(document, 1))
    queries = {}
    for (question, _), group in groups.items():
        instructions = {pair["instruction"] for pair in group}
        own = instructions.pop() if len(instructions) == 1 else ""
        first = min(group, key=lambda pair: pair["id"])
        queries[Query(first["id"], first["query"], own)] = judged[question]
    return RetrievalData(
        documents=rows,
        queries=sorted(queries, key=lambda query: query.id),
        qrels={query.id: grades for query, grades in queries.items()},
        languages=tuple(sorted({pair[key] for pair in pairs for key in ("lang", "document_lang")})),
        revision=fingerprint(corpus.fingerprint, split),
        description=f"Held-out {split} split of the run's own corpus",
        owners=owners,
    )


def _chunk_owners(corpus: Artefact, known: set[str]) -> dict[str, str]:
    """Of every chunk among these documents, the first chunk of its document: pairs name that one."""
    first: dict[str, tuple[int, str]] = {}
    chunks = [
        row
        for name in corpus.place.names("chunks", ".parquet")
        for row in corpus.place.read_table(name, ["id", "document_id", "chunk"]).to_pylist()
        if row["id"] in known
    ]
    for row in chunks:
        place = (row["chunk"], row["id"])
        first[row["document_id"]] = min(place, first.get(row["document_id"], place))
    return {row["id"]: first[row["document_id"]][1] for row in chunks}


def _grade(pair: dict[str, str]) -> int:
    """How relevant a pair's document is; the measures know whole numbers, so a fraction counts as the next one up."""
    attributes: dict[str, float] = json.loads(pair["attributes"] or "{}")
    return math.ceil(attributes.get(GRADE, 1))


def _check_pair(pair: dict[str, str], documents: set[str], split: str, where: str) -> None:
    if pair["document_id"] not in documents:
        raise DataError(
            f"{where}: pair {pair['id']!r} names document {pair['document_id']!r}, which is not in documents/{split}"
        )
    if pair["task_type"] not in _SCORED_TASK_TYPES:
        raise DataError(
            f"{where}: pair {pair['id']!r} has task_type {pair['task_type']!r}; "
            f"allowed: {', '.join(_SCORED_TASK_TYPES)}"
        )
