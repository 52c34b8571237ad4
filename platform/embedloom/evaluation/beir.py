"""A BEIR folder as retrieval data: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedloom.errors import DataError
from embedloom.evaluation.languages import UNKNOWN_LANGUAGE
from embedloom.evaluation.retrieval_task import Query, RetrievalData

CORPUS_FILE = "corpus.jsonl"
QUERIES_FILE = "queries.jsonl"


def check_beir(folder: Path, split: str, where: str) -> None:
    """Raise DataError naming the first file of the BEIR layout that is missing."""
    for name in (CORPUS_FILE, QUERIES_FILE, f"qrels/{split}.tsv"):
        if not (folder / name).is_file():
            raise DataError(
                f"{where}: {folder / name} is missing; a BEIR folder has {CORPUS_FILE}, {QUERIES_FILE} "
                f"and qrels/{split}.tsv"
            )


def read_beir(folder: Path, split: str, where: str) -> RetrievalData:
    """Read a BEIR folder. Queries without qrels are left out, as in BEIR and mteb.

    Raises:
        DataError: a missing file, a broken line, a repeated id, qrels of unknown queries, or no judged query.
    """
    check_beir(folder, split, where)
    digest = hashlib.sha256()
    documents = [(key, title, text) for key, title, text in _entries(folder / CORPUS_FILE, digest)]
    texts = {key: text for key, _, text in _entries(folder / QUERIES_FILE, digest)}
    qrels = _qrels(folder / "qrels" / f"{split}.tsv", digest)
    unknown = sorted(set(qrels) - set(texts))
    if unknown:
        raise DataError(f"{folder}/qrels/{split}.tsv: query {unknown[0]!r} is not in {QUERIES_FILE}")
    queries = [Query(key, texts[key]) for key in sorted(qrels)]
    if not documents or not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise DataError(
            f"{where}: {folder} has {len(documents)} documents and no relevant judgement in qrels/{split}.tsv"
        )
    return RetrievalData(
        documents=documents,
        queries=queries,
        qrels=qrels,
        languages=(UNKNOWN_LANGUAGE,),
        revision=digest.hexdigest()[:16],
        description=f"BEIR folder {folder.name}, split {split}",
    )


def _entries(path: Path, digest: Any) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of each line of a JSONL file; a line that says again what an earlier one said is passed over."""
    seen: dict[str, int] = {}
    for number, line in _lines(path, digest):
        try:
            row = json.loads(line)
            key, title, text = str(row["_id"]), row.get("title"), row.get("text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: expected a JSON object with _id and text, found {line[:80]!r}"
            ) from error
        if text is None and not title:
            raise DataError(
                f"{path}:{number}: expected a JSON object with _id and text (or title), found {line[:80]!r}"
            )
        if not isinstance(text, str | None):
            raise DataError(f"{path}:{number}: text is {type(text).__name__}, expected a string")
        entry = (str(title or ""), text or "")
        if key in seen:
            if seen[key] != hash(entry):
                raise DataError(f"{path}:{number}: _id {key!r} stands twice; ids must be unique")
            continue
        seen[key] = hash(entry)
        yield key, *entry


def _qrels(path: Path, digest: Any) -> dict[str, dict[str, int]]:
    """Grades by query and document; whole numbers, as trec_eval computes gains of them, however they are written."""
    found: dict[str, dict[str, int]] = {}
    for number, line in _lines(path, digest):
        fields = [field.strip() for field in line.split("\t")]
        try:
            query, document, grade = fields[0], fields[1], float(fields[2])
            if not grade.is_integer():
                raise ValueError(grade)
        except (IndexError, ValueError) as error:
            if number == 1 and len(fields) == 3 and not _is_number(fields[2]):
                continue  # a header
            raise DataError(
                f"{path}:{number}: expected query-id, corpus-id and a whole-number score (1 or 1.0) between tabs, "
                f"found {line[:80]!r}"
            ) from error
        found.setdefault(query, {})[document] = int(grade)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lines(path: Path, digest: Any) -> Iterator[tuple[int, str]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            digest.update(raw)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n ")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8") from error
            if line.strip():
                yield number, line
