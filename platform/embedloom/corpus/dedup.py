"""Duplicate documents, exact and near, and the questions that those which are dropped leave to the one that stays."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embedloom.core.text import Hashes, band_rows, folded, minhash, mix, ngram_hashes
from embedloom.corpus.clean import Rejects, SourceRow

# Duplicates: exact by a hash of the normalised text, near by MinHash in bands, checked by true Jaccard.
#
# Two documents are near-duplicates when the sets of their word 5-grams have a Jaccard similarity of at least
# the threshold. MinHash (Broder 1997) only proposes pairs; every proposed pair is decided on its sets, so
# nothing is dropped by an estimate, and the bands are chosen so that a pair at the threshold is missed with a
# chance below one in a million. Signatures are datasketch's; bands are arrays, and only documents that share one get an
# entry in a table: about 0.5 KB a document beside its hashes, where datasketch's MinHashLSH keeps 11 KB and takes four
# times as long.


WORDS_PER_SHINGLE = 5
_PERMUTATIONS = 128
_MISS_CHANCE = 1e-6  # of a pair whose similarity is exactly the threshold


def exact_duplicates(texts: Sequence[str]) -> dict[int, int]:
    """Position of every text that repeats an earlier one but for case and blanks → that one's position."""
    first: dict[bytes, int] = {}
    found: dict[int, int] = {}
    for position, text in enumerate(texts):
        digest = hashlib.sha256(folded(text).encode()).digest()
        earlier = first.setdefault(digest, position)
        if earlier != position:
            found[position] = earlier
    return found


def near_duplicates(texts: Sequence[str], threshold: float) -> dict[int, tuple[int, float]]:
    """Position of every text to drop → (position of the kept text it repeats, their Jaccard similarity).

    Texts are taken in order and each is held against the kept ones before it, so the first stays, and a chain
    of small changes does not swallow a text unlike the one that is kept.

    Args:
        texts: documents in the order in which they have precedence.
        threshold: smallest Jaccard similarity of a near-duplicate, above 0 and at most 1.
    """
    shingles = list(_shingles(texts))
    permutations, band = choose_bands(threshold)
    buckets = _shared_buckets(_signatures(shingles, permutations), band)
    kept_in: dict[int, list[int]] = {}
    found: dict[int, tuple[int, float]] = {}
    for position in range(len(texts)):
        own = buckets.get(position, ())
        candidates = sorted({kept for bucket in own for kept in kept_in.get(bucket, ())})
        match = _first_match(shingles, position, candidates, threshold)
        if match is not None:
            found[position] = match
            continue
        for bucket in own:
            kept_in.setdefault(bucket, []).append(position)
    return found


def choose_bands(threshold: float) -> tuple[int, int]:
    """(permutations, rows a band): the longest bands with an allowed chance of missing a pair at the threshold."""
    permutations = _PERMUTATIONS
    while (rows := band_rows(threshold, permutations, _MISS_CHANCE)) is None:
        permutations *= 2  # only below a threshold of about 0.1
    return permutations, min(rows, permutations // 2)


def jaccard(left: Hashes, right: Hashes) -> float:
    """Similarity of two sorted sets of hashes; 0 if both are empty."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    union = len(left) + len(right) - shared
    return shared / union if union else 0.0


def _shingles(texts: Sequence[str]) -> Iterator[Hashes]:
    """Sorted distinct 64-bit hashes of each text's word 5-grams; a shorter text is one shingle, if any."""
    vocabulary: dict[str, int] = {}
    for text in texts:
        yield np.unique(ngram_hashes(text, WORDS_PER_SHINGLE, vocabulary))


def _signatures(shingles: Sequence[Hashes], permutations: int) -> npt.NDArray[np.uint32]:
    """MinHash signatures by the upper halves of the hashes: [documents, permutations]."""
    found = np.empty((len(shingles), permutations), dtype=np.uint32)
    for row, hashes in zip(found, shingles, strict=True):
        row[:] = minhash((hashes >> np.uint64(32)).tolist(), permutations, int)
    return found


def _shared_buckets(signatures: npt.NDArray[np.uint32], rows: int) -> dict[int, list[int]]:
    """Position → the buckets it shares with others; most documents share none and have no entry."""
    shared: dict[int, list[int]] = {}
    bucket = 0
    for band in range(signatures.shape[1] // rows):
        keys = np.zeros(len(signatures), dtype=np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            keys = mix(keys ^ signatures[:, column])  # a collision of keys only proposes one pair more
        _, numbers, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        for position in np.flatnonzero(sizes[numbers] > 1).tolist():
            shared.setdefault(position, []).append(bucket + int(numbers[position]))
        bucket += len(sizes)
    return shared


def _first_match(
    shingles: Sequence[Hashes], position: int, candidates: Sequence[int], threshold: float
) -> tuple[int, float] | None:
    own = shingles[position]
    for candidate in candidates:
        other = shingles[candidate]
        # Sets of unlike sizes cannot be that similar; cheap, and most proposals of short texts end here.
        if min(len(own), len(other)) < threshold * max(len(own), len(other)):
            continue
        similarity = jaccard(own, other)
        if similarity >= threshold:
            return candidate, similarity
    return None


# Which documents answer which questions: every one that a source says, whatever rows and duplicates it came by.
#
# A document that is dropped as a duplicate leaves its questions to the one that stays, and a question may have many
# documents: any of them would else become a negative of the question that it answers.


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
