"""The corpus stage: read, clean, deduplicate, split by group, cut into chunks, write."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from embedloom.compute.shards import PART_PATTERN
from embedloom.config.corpus import CorpusConfig, SplitConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.progress import Progress, note
from embedloom.core.prompting import document_text
from embedloom.core.schemas import GRADE, content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.corpus.chunk import Chunk, Chunker
from embedloom.corpus.clean import Rejects, SourceRow, clean_row, reject_reason
from embedloom.corpus.dedup import (
    Question,
    Questions,
    exact_duplicates,
    gather_questions,
    in_one_split,
    near_duplicates,
)
from embedloom.corpus.sources import read_source
from embedloom.errors import DataError

# Train, dev and test: drawn by group, so that neighbours (one module, one file) never stand on two sides.


SPLITS = ("train", "dev", "test")


def split_of(group: str, config: SplitConfig, seed: int) -> str:
    """Split of a group: a function of its name, the shares and the seed alone.

    Adding documents therefore never moves another group, and a larger test share only takes from train.
    """
    place = int(content_id("split", str(seed), group)[:16], 16) / 2**64  # uniform in [0, 1)
    if place < config.dev:
        return "dev"
    # Counted from the other end: a change of one share leaves the other split as it was.
    return "test" if place >= 1 - config.test else "train"


# Writes rows of one kind as numbered Parquet parts of a fixed size, a part at a time.


PART_ROWS = 10_000


class PartWriter:
    """Collects rows of a table kind for one folder; full parts are written at once, the rest by ``close``."""

    def __init__(self, place: Place, folder: str, kind: str, part_rows: int = PART_ROWS) -> None:
        self._place = place
        self._folder = folder
        self._kind = kind
        self._part_rows = part_rows
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


# The corpus stage: read, clean, deduplicate, split by group, cut into chunks, write.
#
# Documents are held once in memory, cleaned: about 2 KB each beside their text, so a million documents of 1,000
# characters take some 3 GB. Everything is a function of the sources, the config and the seed: a rerun after a
# kill starts over and writes the same files.


_FOLDERS = ("documents", "pairs", "chunks", "rejects")
_UNKNOWN_LANGUAGE = "und"  # ISO 639-3: undetermined
_ROWS_PER_BATCH = 512


def build_corpus(config: CorpusConfig, seed: int, tokenizer_folder: Path, out: ArtefactWriter) -> Artefact:
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
    progress = Progress("corpus", None, "documents read")
    rows = []
    for source in config.sources:
        for raw in read_source(source, rejects):
            row = clean_row(raw)
            reason = reject_reason(row, config.min_characters)
            if reason is None:
                rows.append(row)
            else:
                rejects.add(row.id, reason, f"{row.source}: {len(row.text)} characters")
            progress.advance(1)
    rows.sort(key=lambda row: row.id)  # stable: rows of one id stay in reading order
    note("corpus", f"{progress.done:,} documents read, {len(rows):,} after cleaning")
    for reason in ("judged_document_missing", "judged_query_missing"):
        if count := rejects.counts.get(reason):
            note(
                "corpus",
                f"{count:,} rejects of reason {reason}: train judgements of what the source does not hold",
            )
    return rows, progress.done


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
    for split, share in shares.items():
        if share > 0 and split not in splits.values():
            note(
                "corpus",
                f"the {split} split is empty: none of the {len(splits)} groups falls to its share {share:g}",
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
    progress = Progress("corpus", len(rows), "documents written")
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
        progress.advance(1)
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
