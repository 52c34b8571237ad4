"""The corpus stage in one process and all rows in memory, rule by rule: what the distributed one must equal.

It is the stage as it stood before it was distributed, and takes from the package only what is done to a single row: readers,
cleaning, the split of a group, the chunker and one document's shingles and signature.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedloom.compute.shards import PART_PATTERN
from embedloom.config.corpus import CorpusConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.prompting import document_text
from embedloom.core.schemas import GRADE, content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.core.text import Hashes, folded, minhash, mix, ngram_hashes
from embedloom.corpus.chunk import Chunk, Chunker
from embedloom.corpus.clean import Rejects, SourceRow, clean_row, reject_reason
from embedloom.corpus.dedup import choose_bands, jaccard
from embedloom.corpus.questions import SPLITS, split_of
from embedloom.corpus.sources import read_source
from embedloom.errors import DataError

WORDS_PER_SHINGLE = 5
_UNKNOWN_LANGUAGE = "und"
_ROWS_PER_BATCH = 512
PART_ROWS = 10_000
_FOLDERS = ("documents", "pairs", "chunks", "rejects")


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


class PartWriter:
    """Collects rows of a table kind for one folder; full parts are written at once, the rest by ``close``."""

    def __init__(self, place: Place, folder: str, kind: str, part_rows: int | None = None) -> None:
        self._place = place
        self._folder = folder
        self._kind = kind
        self._part_rows = part_rows or PART_ROWS
        self._rows: list[dict[str, object]] = []
        self._parts = 0
        self.count = 0

    def add(self, row: dict[str, object]) -> None:
        """Take one row."""
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == self._part_rows:
            self.close()

    def close(self) -> None:
        """Write what is left; no rows, no file."""
        if not self._rows:
            return
        name = f"{self._folder}/{PART_PATTERN.format(self._parts)}"
        self._place.write_table(name, table_from_rows(self._kind, self._rows))
        self._parts += 1
        self._rows = []


def build_serially(config: CorpusConfig, seed: int, tokenizer_folder: Path, out: ArtefactWriter) -> Artefact:
    """Build the corpus artefact: documents and natural pairs by split, and the rejects.

    Args:
        config: the corpus section.
        seed: the run's seed; decides which groups are held out.
        tokenizer_folder: model folder whose tokenizer measures chunks.
        out: writer of a ``corpus`` artefact.

    Raises:
        DataError: an unreadable source, ids that repeat, nothing left after cleaning, or nothing to train on.
    """
    for folder in _FOLDERS:  # an interrupted build may have left parts of its own
        out.place.child(folder).remove()
    # Before the reading, which takes minutes: a folder without a tokenizer should say so at once.
    size = config.chunk_tokens
    chunker = Chunker(tokenizer_folder, size, config.chunk_overlap_tokens) if size is not None else None
    rejects = Rejects()
    rows, read = _clean(config, rejects)
    rows, questions = _drop_duplicates(rows, config.near_duplicate_threshold, rejects)
    if not rows:
        raise DataError(
            f"corpus: no document is left of {read} read; rejects: {rejects.counts}; "
            f"corpus.min_characters is {config.min_characters}"
        )
    splits = _assign(rows, config, seed)
    questions = in_one_split(questions, {row.id: splits[row.group] for row in rows}, rejects)
    counts = _write(rows, questions, splits, chunker, out)
    _write_rejects(rejects, out)
    return out.commit({"read": read, **counts, "rejects": rejects.counts})


def _clean(config: CorpusConfig, rejects: Rejects) -> tuple[list[SourceRow], int]:
    """Cleaned rows of all sources in id order, and the number read."""
    rows = []
    read = 0
    for source in config.sources:
        for raw in read_source(source, rejects):
            row = clean_row(raw)
            reason = reject_reason(row, config.min_characters)
            if reason is None:
                rows.append(row)
            else:
                rejects.add(row.id, reason, f"{row.source}: {len(row.text)} characters")
            read += 1
    rows.sort(key=lambda row: row.id)  # stable: rows of one id stay in reading order
    return rows, read


def _drop_duplicates(
    rows: list[SourceRow], threshold: float | None, rejects: Rejects
) -> tuple[list[SourceRow], Questions]:
    """Rows without exact and near-duplicates, of each set the first in id order, and the questions of all rows."""
    texts = [_full_text(row) for row in rows]
    stays = list(range(len(rows)))
    for position, first in exact_duplicates(texts).items():
        stays[position] = first
        rejects.add(rows[position].id, "duplicate", f"{rows[position].source} repeats {rows[first].source}")
    left = [position for position, stay in enumerate(stays) if position == stay]
    for one, following in pairwise(left):
        if rows[one].id == rows[following].id:
            raise DataError(
                f"corpus.sources: id {rows[one].id!r} stands for two texts ({rows[one].source} and "
                f"{rows[following].source}); ids must be unique, or leave out id_column and ids are made from the content"
            )
    near = {} if threshold is None else near_duplicates([texts[position] for position in left], threshold)
    for place, (first, similarity) in near.items():
        row, kept = rows[left[place]], rows[left[first]]
        stays[left[place]] = left[first]
        rejects.add(row.id, "near_duplicate", f"{row.source} repeats {kept.source}, Jaccard {similarity:.3f}")
    # The row that an exact duplicate repeats may itself be a near-duplicate of another, which stays.
    stays = [stays[stay] for stay in stays]
    staying = [row for position, row in enumerate(rows) if stays[position] == position]
    return staying, gather_questions(rows, stays, rejects)


def _assign(rows: Sequence[SourceRow], config: CorpusConfig, seed: int) -> dict[str, str]:
    """Split of every group.

    Raises:
        DataError: no group falls to train.
    """
    splits = {row.group: split_of(row.group, config.split, seed) for row in rows}
    shares = {"dev": config.split.dev, "test": config.split.test}
    if "train" not in splits.values():
        raise DataError(
            f"corpus.split: none of the {len(splits)} groups falls to train (dev {shares['dev']:g}, "
            f"test {shares['test']:g}, seed {seed}); give more documents, smaller shares or another run.seed"
        )
    return splits


def _write(
    rows: list[SourceRow],
    questions: Questions,
    splits: dict[str, str],
    chunker: Chunker | None,
    out: ArtefactWriter,
) -> dict[str, object]:
    """Write documents and pairs, and count them; a pair names its document's first chunk."""
    documents = {split: PartWriter(out.place, f"documents/{split}", "documents") for split in SPLITS}
    pairs = {split: PartWriter(out.place, f"pairs/{split}", "pairs") for split in SPLITS}
    places = PartWriter(out.place, "chunks", "chunks")
    tokens = moved = 0
    for row, chunks in zip(rows, _chunked(rows, chunker), strict=True):
        split = splits[row.group]
        for number, chunk in enumerate(chunks, start=1):
            if len(chunks) > 1:
                places.add(_place(chunk, number, chunks))
            documents[split].add(_document(chunk.row))
            tokens += chunk.tokens
        for question in questions[row.id]:
            pairs[split].add(_pair(chunks[0].row, question))
            moved += question.row is not row
    for writer in (*documents.values(), *pairs.values(), places):
        writer.close()
    groups = Counter(splits.values())
    by_split = {split: documents[split].count for split in SPLITS}
    return {
        "rows": sum(by_split.values()),
        **by_split,
        "pairs": sum(writer.count for writer in pairs.values()),
        # Their own row's text repeats that of another, which stands for both.
        **({"pairs_of_duplicates": moved} if moved else {}),
        "pairs_by_split": {split: pairs[split].count for split in SPLITS},
        "groups": {split: groups[split] for split in SPLITS},
        **({"tokens": tokens} if chunker is not None else {}),
    }


def _chunked(rows: list[SourceRow], chunker: Chunker | None) -> Iterator[list[Chunk]]:
    if chunker is None:
        yield from ([Chunk(row, 0)] for row in rows)
        return
    for start in range(0, len(rows), _ROWS_PER_BATCH):
        yield from chunker.cut(rows[start : start + _ROWS_PER_BATCH])


def _write_rejects(rejects: Rejects, out: ArtefactWriter) -> None:
    writer = PartWriter(out.place, "rejects", "rejects")
    for row in rejects.rows:
        writer.add(row)
    writer.close()


def _full_text(row: SourceRow) -> str:
    return document_text(row.title, row.text)


def _document(row: SourceRow) -> dict[str, object]:
    return {"id": row.id, "text": row.text, "title": row.title, "lang": row.lang, "source": row.source}


def _place(chunk: Chunk, number: int, chunks: Sequence[Chunk]) -> dict[str, object]:
    return {
        "id": chunk.row.id,
        "document_id": chunk.document_id,
        "chunk": number,
        "chunks": len(chunks),
    }


def _pair(row: SourceRow, question: Question) -> dict[str, object]:
    asked = question.row
    return {
        "id": content_id(question.text, row.id),
        "query": question.text,
        "document_id": row.id,
        "task_type": "retrieval",
        "instruction": asked.instruction,
        "lang": asked.lang or _UNKNOWN_LANGUAGE,
        "document_lang": row.lang or _UNKNOWN_LANGUAGE,
        "origin": "public",
        # A plain "relevant" says nothing, so that pairs without grades keep their bytes.
        "attributes": None if question.grade == 1 else json.dumps({GRADE: question.grade}),
        "dataset": asked.dataset or None,
    }
