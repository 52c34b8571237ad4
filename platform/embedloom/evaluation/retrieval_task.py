"""Local data as an mteb retrieval or reranking task: mteb ranks, scores and writes the result, as for its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from embedloom.evaluation.best_chunk import chunked_members
from embedloom.evaluation.languages import UNKNOWN_LANGUAGE, language_code
from embedloom.records import content_id

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
