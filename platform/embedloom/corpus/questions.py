"""Which documents answer which questions: every one that a source says, whatever rows and duplicates it came by.

A document that is dropped as a duplicate leaves its questions to the one that stays, and a question may have many
documents: any of them would else become a negative of the question that it answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from embedloom.corpus.rejects import Rejects
from embedloom.corpus.rows import SourceRow
from embedloom.ngrams import folded


@dataclass(frozen=True, slots=True)
class Question:
    """A query of a row, which may stand in the corpus as another row that it repeats."""

    text: str
    grade: float  # how relevant the document is to it, above 0
    row: SourceRow  # that it came with, whose instruction, dataset and language it has


Questions = dict[str, list[Question]]  # by the id of the document that answers them


def gather_questions(rows: Sequence[SourceRow], stays: Sequence[int], rejects: Rejects) -> Questions:
    """The questions of every row that stays, those of the rows it stands for included.

    A question that a document has twice is counted as ``duplicate_query``; its higher grade counts.

    Args:
        rows: all of them, duplicates included.
        stays: for each row the position of the one that stays for it, its own where it stays itself.
        rejects: takes note of repeated questions.
    """
    found: dict[str, dict[str, Question]] = {}
    for row, stay in zip(rows, stays, strict=True):
        own = found.setdefault(rows[stay].id, {})
        for text, grade in zip(row.queries, row.grades or [1.0] * len(row.queries), strict=True):
            if text in own:
                own[text] = replace(own[text], grade=max(own[text].grade, grade))
                rejects.add(
                    row.id, "duplicate_query", f"{text!r} of {row.source} stands twice for one document"
                )
            else:
                own[text] = Question(text, grade, row)
    return {document_id: list(questions.values()) for document_id, questions in found.items()}


def in_one_split(questions: Questions, split_of_document: Mapping[str, str], rejects: Rejects) -> Questions:
    """The questions less those asked in two splits, where the answer would leak: case and blanks aside they are one.

    A question stays in the split of its best document (of equals the first by id) with all its documents there; the
    others lie in splits that are never searched for it. They are counted as ``query_in_other_split``.

    Args:
        questions: of all documents, in id order.
        split_of_document: by id.
        rejects: takes note of what is left out.
    """
    best: dict[str, tuple[float, str]] = {}
    for document_id, own in questions.items():
        for question in own:
            key = folded(question.text)
            if key not in best or question.grade > best[key][0]:
                best[key] = (question.grade, split_of_document[document_id])
    kept: Questions = {}
    for document_id, own in questions.items():
        kept[document_id] = []
        for question in own:
            split = best[folded(question.text)][1]
            if split == split_of_document[document_id]:
                kept[document_id].append(question)
            else:
                detail = f"{question.text!r} of {question.row.source} is asked in {split}"
                rejects.add(document_id, "query_in_other_split", detail)
    return kept
