"""Local data as an mteb retrieval or reranking task, and two readers of it: BEIR folders, and a run's held-out split."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.models_protocols import SearchProtocol
from mteb.models.search_wrappers import SearchEncoderWrapper

from embedloom.core.artefacts import Artefact, fingerprint
from embedloom.core.progress import note
from embedloom.core.schemas import GRADE, check_unique_ids, content_id
from embedloom.core.storage import beir_entries, judgements
from embedloom.core.text import folded
from embedloom.errors import DataError
from embedloom.evaluation.local_layout import (
    BEIR_CORPUS,
    BEIR_QUERIES,
    UNKNOWN_LANGUAGE,
    check_beir,
    language_code,
)

# Documents that are cut into chunks, ranked as documents: each by its best chunk, whatever ranks the chunks.
#
# A judgement is of a whole document. That its first chunk alone should answer would score a model by where in a document
# the answer stands; the best chunk is what a search over chunks shows (MaxP of Dai and Callan, arXiv 1905.09217).


Ranking = dict[str, dict[str, float]]  # query id -> document id -> score


def by_best_chunk(ranking: Mapping[str, Mapping[str, float]], owners: Mapping[str, str]) -> Ranking:
    """Scores of documents: of each the highest that a chunk of it has.

    Args:
        ranking: query id -> chunk or whole document -> score.
        owners: chunk -> its document; what is not in it is a whole document.
    """
    found: Ranking = {}
    for query, scores in ranking.items():
        best: dict[str, float] = {}
        for chunk, score in scores.items():
            owner = owners.get(chunk, chunk)
            best[owner] = max(score, best.get(owner, score))
        found[query] = best
    return found


class BestChunkSearch:
    """mteb's search protocol around a model that ranks chunks."""

    def __init__(self, model: Any, owners: Mapping[str, str]) -> None:
        self._chunks: Any = model if isinstance(model, SearchProtocol) else SearchEncoderWrapper(model)
        self._owners = owners

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Of the model that ranks."""
        meta: ModelMeta = self._chunks.mteb_model_meta
        return meta

    def index(self, corpus: Any, **options: Any) -> None:
        """Hand the chunks on."""
        self._chunks.index(corpus, **options)

    def search(self, queries: Any, **options: Any) -> Ranking:
        """Rank, then let each document stand where its best chunk does."""
        return by_best_chunk(self._chunks.search(queries, **options), self._owners)


def chunked_members(owners: Mapping[str, str]) -> dict[str, Any]:
    """What a retrieval task's class needs so that it ranks documents by their best chunk."""

    def _evaluate_subset(task: AbsTaskRetrieval, model: Any, *arguments: Any, **options: Any) -> Any:
        return AbsTaskRetrieval._evaluate_subset(task, BestChunkSearch(model, owners), *arguments, **options)

    return {"_evaluate_subset": _evaluate_subset}


# Local data as an mteb retrieval or reranking task: mteb ranks, scores and writes the result, as for its own.


MAIN_SCORES = {"Retrieval": "ndcg_at_10", "Reranking": "map_at_1000"}  # as mteb's own tasks of these types
# Extra column of the queries where a task has more than one instruction; the wrapper reads it.
INSTRUCTION_COLUMN = "task_instruction"
ONLY_SUBSET = "default"  # mteb's name of the subset of a task that has one


@dataclass(frozen=True, slots=True)
class Query:
    """One query; an empty instruction means the model's own."""

    id: str
    text: str
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Corpus, queries and qrels of one split."""

    documents: list[tuple[str, str, str]]  # id, title, text
    queries: list[Query]
    qrels: dict[str, dict[str, int]]  # query id -> document id -> grade
    languages: tuple[str, ...]
    revision: str  # hash of the content
    description: str
    candidates: dict[str, list[str]] | None = None  # query id -> documents to rank; None: the whole corpus
    # Chunk of a cut document -> the id that its document is judged by.
    owners: Mapping[str, str] = field(default_factory=dict)

    def limited(self, limit: int | None) -> "RetrievalData":
        """All documents and at most ``limit`` queries, chosen by a hash of their ids."""
        if limit is None or limit >= len(self.queries):
            return self
        chosen = sorted(self.queries, key=lambda query: content_id("evaluation query", query.id))[:limit]
        queries = sorted(chosen, key=lambda query: query.id)
        qrels = {query.id: self.qrels[query.id] for query in queries}
        candidates = self.candidates and {query.id: self.candidates[query.id] for query in queries}
        revision = content_id(self.revision, str(limit))[:16]
        return replace(self, queries=queries, qrels=qrels, candidates=candidates, revision=revision)


def make_retrieval_task(
    name: str,
    split: str,
    data: RetrievalData | Mapping[str, RetrievalData],
    kind: Literal["Retrieval", "Reranking"] = "Retrieval",
    ignore_identical_ids: bool | None = None,
) -> AbsTaskRetrieval:
    """An mteb task over ``data``, loaded and ready to score.

    mteb finds metadata on classes, so each task is a subclass of its own.

    Where queries are documents (ArguAna, Quora), the document of a query's own id is left out of its ranking: BEIR's
    evaluator does so for every data set (beir.retrieval.evaluation), mteb for those where it matters. Not where such
    documents are judged relevant: then the ids of queries and documents only look alike, as in a table of questions and
    answers that numbers both.

    Args:
        name: the task's name.
        split: the split that ``data`` is.
        data: of the whole task, or by language subset.
        kind: mteb's type; a reranking task needs the candidates of every query.
        ignore_identical_ids: whether that document is left out; None: as above.
    """
    subsets = {ONLY_SUBSET: data} if isinstance(data, RetrievalData) else dict(data)
    first = next(iter(subsets.values()))
    instructions = {query.instruction for part in subsets.values() for query in part.queries}
    languages = {key: _codes(part) for key, part in subsets.items()}
    if ignore_identical_ids is None:
        ignore_identical_ids = _queries_are_documents(subsets.values())
    owners = {chunk: owner for part in subsets.values() for chunk, owner in part.owners.items()}
    rules = [
        *(["ignores identical ids"] if ignore_identical_ids else []),
        *(["ranks documents by their best chunk"] if owners else []),
    ]
    metadata = TaskMetadata(
        name=name,
        description="; ".join((first.description, *rules)),
        dataset={
            "path": f"local/{name}",
            "revision": content_id(*(part.revision for part in subsets.values()), *rules)[:16],
        },
        type=kind,
        category="t2t",
        eval_splits=[split],
        eval_langs=languages[ONLY_SUBSET] if list(subsets) == [ONLY_SUBSET] else languages,
        main_score=MAIN_SCORES[kind],
        prompt={"query": next(iter(instructions))}
        if len(instructions) == 1 and "" not in instructions
        else None,
        is_public=False,
    )
    members = {"metadata": metadata, "ignore_identical_ids": ignore_identical_ids}
    members |= chunked_members(owners) if owners else {}
    task = type(f"Local_{name}", (AbsTaskRetrieval,), members)()
    several = len(instructions) > 1
    task.dataset = {key: {split: _split_data(part, several)} for key, part in subsets.items()}
    task.data_loaded = True
    return task


def _queries_are_documents(parts: Iterable[RetrievalData]) -> bool:
    """Whether some query has the id of a document, and none is judged to be answered by the document of its id."""
    found = False
    for part in parts:
        documents = {key for key, _, _ in part.documents}
        shared = [query.id for query in part.queries if query.id in documents]
        if any(part.qrels.get(key, {}).get(key, 0) > 0 for key in shared):
            return False
        found = found or bool(shared)
    return found


def _codes(data: RetrievalData) -> list[str]:
    return sorted({language_code(lang) for lang in data.languages} or {UNKNOWN_LANGUAGE})


def _split_data(data: RetrievalData, several_instructions: bool) -> dict[str, Any]:
    queries: dict[str, list[str]] = {
        "id": [query.id for query in data.queries],
        "text": [query.text for query in data.queries],
    }
    if several_instructions:
        queries[INSTRUCTION_COLUMN] = [query.instruction for query in data.queries]
    ids, titles, texts = zip(*data.documents, strict=True)
    corpus = {"id": list(ids), "title": list(titles), "text": list(texts)}
    return {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict(queries),
        # Below 0 (TREC's "not judged", "spam") is not relevant as well, but breaks pytrec_eval 0.5: it writes past its array.
        "relevant_docs": {
            query: {document: max(0, grade) for document, grade in grades.items()}
            for query, grades in data.qrels.items()
        },
        "top_ranked": data.candidates,
    }


# A BEIR folder as retrieval data: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``.


_ABSENT = "name documents that the corpus lacks; they count as not found, as in BEIR and mteb"


def read_beir(folder: Path, split: str, where: str) -> RetrievalData:
    """Read a BEIR folder. Queries without qrels are left out, as in BEIR and mteb.

    Raises:
        DataError: a missing file, a broken line, a repeated id, qrels of unknown queries, or no judged query.
    """
    check_beir(folder, split, where)
    files = [folder / BEIR_CORPUS, folder / BEIR_QUERIES, folder / "qrels" / f"{split}.tsv"]
    documents, texts = list(_documents(files[0])), {key: text for key, _, text in _documents(files[1])}
    qrels = _qrels(files[2])
    unknown = sorted(set(qrels) - set(texts))
    if unknown:
        raise DataError(f"{folder}/qrels/{split}.tsv: query {unknown[0]!r} is not in {BEIR_QUERIES}")
    queries = [Query(key, texts[key]) for key in sorted(qrels)]
    if not documents or not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise DataError(
            f"{where}: {folder} has {len(documents)} documents and no relevant judgement in qrels/{split}.tsv"
        )
    known = {key for key, _, _ in documents}
    absent = sum(grade > 0 and key not in known for grades in qrels.values() for key, grade in grades.items())
    if absent:
        note("evaluate", f"{where}: {absent} relevant judgements {_ABSENT}")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return RetrievalData(
        documents=documents,
        queries=queries,
        qrels=qrels,
        languages=(UNKNOWN_LANGUAGE,),
        revision=digest.hexdigest()[:16],
        description=f"BEIR folder {folder.name}, split {split}"
        + (f"; {absent} relevant judgements {_ABSENT}" if absent else ""),
    )


def _documents(path: Path) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of each line; a line that says again what an earlier one said is passed over."""
    seen: dict[str, int] = {}
    for key, title, text in beir_entries(path):
        entry = (title or "", text)
        if key in seen:
            if seen[key] != hash(entry):
                raise DataError(f"{path}: _id {key!r} stands twice; ids must be unique")
            continue
        seen[key] = hash(entry)
        yield key, *entry


def _qrels(path: Path) -> dict[str, dict[str, int]]:
    """Grades by query and document; whole numbers, as trec_eval computes gains of them, however they are written."""
    found: dict[str, dict[str, int]] = {}
    for query, document, grade in judgements(path):
        if not grade.is_integer():
            raise DataError(f"{path}: {query}, {document}: {grade} is no whole-number score (1 or 1.0)")
        found.setdefault(query, {})[document] = int(grade)
    return found


# The run's own held-out split as retrieval data: documents are the corpus, natural pairs the queries.


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
