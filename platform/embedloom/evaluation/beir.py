"""A BEIR folder as retrieval data: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from embedloom.errors import DataError
from embedloom.evaluation.languages import UNKNOWN_LANGUAGE
from embedloom.evaluation.local_layout import BEIR_CORPUS, BEIR_QUERIES, check_beir
from embedloom.evaluation.retrieval_task import Query, RetrievalData
from embedloom.formats import beir_entries, judgements
from embedloom.progress import note

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
