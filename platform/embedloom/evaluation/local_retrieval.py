"""Local retrieval and reranking tasks: corpus, queries and qrels, one subset a query language."""

from pathlib import Path
from typing import Literal

import pyarrow as pa
from mteb.abstasks import AbsTaskRetrieval

from embedloom.errors import DataError
from embedloom.evaluation.local_layout import CORPUS, QRELS_TO_ENGLISH, QUERIES, LocalTask
from embedloom.evaluation.local_tables import Rows, by_subset, read_columns, revision_of, rows_of_split
from embedloom.evaluation.retrieval_task import ONLY_SUBSET, Query, RetrievalData, make_retrieval_task
from embedloom.evaluation.specs import TaskSpec
from embedloom.records import check_unique_ids

_TEXT = pa.string()
_CORPUS = {"id": _TEXT, "text": _TEXT, "title": _TEXT, "lang": _TEXT}
_QUERIES = {"id": _TEXT, "text": _TEXT, "lang": _TEXT, "split": _TEXT}
_QRELS = {"query_id": _TEXT, "doc_id": _TEXT, "score": pa.int64()}
Qrels = dict[str, dict[str, int]]


def make_ranked_task(spec: TaskSpec, local: LocalTask) -> AbsTaskRetrieval:
    """The mteb task of a local folder.

    A subset searches the documents in the languages of its own judged documents, so a task with translations of one
    corpus is scored language by language. In reranking, the judged documents of a query are its candidates.

    Raises:
        DataError: missing columns, unknown ids, or no relevant judgement in a subset.
    """
    folder = Path(local.path)
    corpus = read_columns(folder / CORPUS, _CORPUS, optional=("title",))
    check_unique_ids(corpus, str(folder / CORPUS))
    queries = read_columns(folder / QUERIES, _QUERIES)
    check_unique_ids(queries, str(folder / QUERIES))
    qrels = _judgements(folder / local.qrels, queries, corpus)
    judged = [
        row for row in rows_of_split(queries, spec.split, folder / QUERIES).to_pylist() if row["id"] in qrels
    ]
    if not judged:
        raise DataError(f"{folder / local.qrels}: judges no query of split {spec.split!r}")
    documents = corpus.to_pylist()
    languages = {row["id"]: row["lang"] for row in documents}
    revision = revision_of(local.files, spec.split, spec.languages)
    reranks = local.type == "reranking"
    subsets = {
        name: _subset(rows, documents, languages, qrels, f"{folder}, {name}", revision, reranks).limited(
            spec.limit
        )
        for name, rows in by_subset(judged, lambda row: row["lang"], spec).items()
    }
    if len({row["lang"] for row in queries.to_pylist()}) == 1 and local.qrels != QRELS_TO_ENGLISH:
        subsets = {ONLY_SUBSET: next(iter(subsets.values()))}
    kind: Literal["Retrieval", "Reranking"] = "Reranking" if reranks else "Retrieval"
    return make_retrieval_task(spec.name, spec.split, subsets, kind, spec.ignore_identical_ids)


def _judgements(path: Path, queries: pa.Table, corpus: pa.Table) -> Qrels:
    known = {
        "query_id": set(queries.column("id").to_pylist()),
        "doc_id": set(corpus.column("id").to_pylist()),
    }
    found: Qrels = {}
    for row in read_columns(path, _QRELS).to_pylist():
        for key, ids in known.items():
            if row[key] not in ids:
                raise DataError(
                    f"{path}: {key} {row[key]!r} is not in {QUERIES if key == 'query_id' else CORPUS}"
                )
        found.setdefault(row["query_id"], {})[row["doc_id"]] = row["score"]
    return found


def _subset(
    queries: Rows,
    documents: Rows,
    languages: dict[str, str],
    qrels: Qrels,
    where: str,
    revision: str,
    reranks: bool,
) -> RetrievalData:
    grades = {row["id"]: qrels[row["id"]] for row in queries}
    if not any(grade > 0 for judged in grades.values() for grade in judged.values()):
        raise DataError(f"{where}: no judgement above 0, so there is nothing to find")
    if reranks:
        wanted = {document for judged in grades.values() for document in judged}
        chosen = [row for row in documents if row["id"] in wanted]
    else:
        searched = {languages[document] for judged in grades.values() for document in judged}
        chosen = [row for row in documents if row["lang"] in searched]
    return RetrievalData(
        documents=[(row["id"], row["title"] or "", row["text"]) for row in chosen],
        queries=[Query(row["id"], row["text"]) for row in queries],
        qrels=grades,
        languages=tuple(sorted({row["lang"] for row in [*queries, *chosen]})),
        revision=revision,
        description=f"Local task {where}",
        candidates={query: list(judged) for query, judged in grades.items()} if reranks else None,
    )
