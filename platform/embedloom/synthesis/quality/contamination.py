"""Rows that share text with an evaluation set.

A text is refused if the whole of it is an evaluation text (case and punctuation aside, from 20 characters, or 8 in
scripts without blanks), or if more than a share of its 13-grams stands in evaluation texts. 13 words is the length
GPT-3's authors settled on (arXiv 2005.14165, appendix C); in Chinese and Japanese script a character is a word.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedloom.config.quality import ContaminationCheck
from embedloom.errors import DataError
from embedloom.formats import JSONL_ENDINGS, PARQUET_ENDINGS, files_at, records_of
from embedloom.instructions import document_text
from embedloom.ngrams import Hashes, hash64, ngram_hashes, words_of
from embedloom.storage import Place
from embedloom.synthesis.families.base import Reject, reject

WORDS = 13
_MIN_CHARACTERS = 20
_MIN_SINGLE_WORDS = 8  # of one character each
_BATCH = 1 << 20  # hashes held before they are merged
_HELDOUT_SPLITS = ("dev", "test")


@dataclass(frozen=True, slots=True, eq=False)
class ContaminationIndex:
    """Sorted distinct 64-bit hashes: of whole texts, and of their 13-grams; 8 bytes each."""

    texts: Hashes
    grams: Hashes

    def problem(self, text: str, max_share: float) -> Reject | None:
        """Why a text is refused, or None.

        A hash of 64 bits stands for its text; among 10**9 n-grams, one in 10**10 unseen ones seems seen.
        """
        whole = _whole(text)
        if whole is not None and _found(self.texts, np.array([whole], dtype=np.uint64))[0]:
            return reject("contamination", f"is an evaluation text: {text}")
        grams = _grams(text, {})
        if not len(grams):
            return None
        share = float(np.mean(_found(self.grams, grams)))
        if share > max_share:
            return reject(
                "contamination", f"{share:.0%} of its {WORDS}-grams are in evaluation texts: {text}"
            )
        return None


def build_index(texts: Iterable[str]) -> ContaminationIndex:
    """Index evaluation texts; memory grows with their distinct n-grams alone."""
    vocabulary: dict[str, int] = {}
    wholes = _Hashes()
    grams = _Hashes()
    for text in texts:
        whole = _whole(text)
        if whole is not None:
            wholes.add(np.array([whole], dtype=np.uint64))
        grams.add(_grams(text, vocabulary))
        if len(vocabulary) > _BATCH:
            vocabulary.clear()
    return ContaminationIndex(wholes.merged(), grams.merged())


def save_index(place: Place, file: str, index: ContaminationIndex) -> None:
    """Write both arrays into one file."""
    buffer = io.BytesIO()
    np.savez(buffer, texts=index.texts, grams=index.grams)
    place.write_bytes(file, buffer.getvalue())


def load_index(place: Place, file: str) -> ContaminationIndex:
    """Read what ``save_index`` wrote."""
    with np.load(io.BytesIO(place.read_bytes(file))) as arrays:
        return ContaminationIndex(arrays["texts"], arrays["grams"])


def evaluation_texts(check: ContaminationCheck, corpus: Place) -> Iterator[str]:
    """Every text that rows must not share: of the files, and of the corpus's held-out split.

    Raises:
        DataError: a name that matches no file, a file of another format, or one with none of the columns.
    """
    for name in check.files:
        files = files_at(name)
        if not files:
            raise DataError(f"synthesis.quality.contamination.files: {name!r} matches no file")
        for path in files:
            yield from _file_texts(path, check.columns)
    for split in _HELDOUT_SPLITS if check.heldout else ():
        for file in corpus.names(f"documents/{split}", ".parquet"):
            table = corpus.read_table(file, columns=["title", "text"])
            yield from (document_text(row["title"], row["text"]) for row in table.to_pylist())
        for file in corpus.names(f"pairs/{split}", ".parquet"):
            yield from corpus.read_table(file, columns=["query"]).column("query").to_pylist()


def _file_texts(path: Path, columns: tuple[str, ...]) -> Iterator[str]:
    def wanted(found: list[str]) -> list[str]:
        if not set(columns) & set(found):
            raise DataError(f"{path}: none of the columns {', '.join(columns)}; found {', '.join(found)}")
        return [name for name in columns if name in found]

    if not path.name.endswith((*PARQUET_ENDINGS, *JSONL_ENDINGS)):
        raise DataError(
            f"{path}: evaluation texts are read from Parquet or JSON lines; the ending is {path.suffix!r}"
        )
    for _, record in records_of(path, wanted):
        yield from (str(record[name]) for name in wanted(list(record)) if record[name] is not None)


def _whole(text: str) -> int | None:
    """Hash of a text that is long enough not to be repeated by chance."""
    words = words_of(text)
    single = sum(len(word) == 1 and not word.isascii() for word in words)
    if single < _MIN_SINGLE_WORDS and len(" ".join(words)) < _MIN_CHARACTERS:
        return None
    return hash64(" ".join(words))


def _grams(text: str, vocabulary: dict[str, int]) -> Hashes:
    """Distinct hashes of a text's 13-grams; none of a shorter text."""
    hashes = ngram_hashes(text, WORDS, vocabulary)
    # A shorter text is one n-gram of its own length there.
    return np.unique(hashes) if len(hashes) > 1 or len(words_of(text)) >= WORDS else hashes[:0]


def _found(sorted_hashes: Hashes, wanted: Hashes) -> np.ndarray:
    if not len(sorted_hashes):
        return np.zeros(len(wanted), dtype=bool)
    places = np.minimum(np.searchsorted(sorted_hashes, wanted), len(sorted_hashes) - 1)
    return np.asarray(sorted_hashes[places] == wanted)


class _Hashes:
    """Collects hashes, merging a batch at a time, so that repetitions are not held."""

    def __init__(self) -> None:
        self._merged: Hashes = np.empty(0, dtype=np.uint64)
        self._waiting: list[Hashes] = []
        self._count = 0

    def add(self, hashes: Hashes) -> None:
        self._waiting.append(hashes)
        self._count += len(hashes)
        # A batch as large as what is merged already keeps the sorting within a constant factor of one sort.
        if self._count > max(_BATCH, len(self._merged)):
            self.merged()

    def merged(self) -> Hashes:
        self._merged = np.unique(np.concatenate([self._merged, *self._waiting]))
        self._waiting, self._count = [], 0
        return self._merged
