"""The checks that look at one row alone: lengths, copies, language, text shared with an evaluation set."""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedloom.compute.shards import run_tasks
from embedloom.config.synthesis import ContaminationCheck, LanguageCheck, QualityConfig
from embedloom.core.language import language_model
from embedloom.core.prompting import document_text
from embedloom.core.storage import JSONL_ENDINGS, PARQUET_ENDINGS, Place, files_at, records_of
from embedloom.core.text import (
    Hashes,
    hash64,
    letters_in,
    ngram_hashes,
    short_code,
    stands_alone,
    terms_of,
    words_of,
)
from embedloom.errors import DataError
from embedloom.synthesis.families.base import Attempt, Reject, Row, reject

# Whether a text is in the language that was asked for.
#
# py3langid, because it needs no download (core/language.py), its import is light and a call takes 50 microseconds; fastText's and lingua's models are downloads or a hundred megabytes. Its weakness is
# short text and close relatives, so only a confident verdict for another, unrelated language refuses a text. Of 7,025
# queries of tldr pages (38 languages) and Natural Questions it refused none; with a wrong language it refused 64 % of
# the tldr queries, which are half a dozen words long.


# Languages that a short text does not tell apart; a verdict for one of a group is no verdict against another.
_CLOSE = (
    {"bs", "hr", "sr", "sh"},
    {"id", "ms", "jv", "ace", "su"},
    {"no", "nb", "nn", "da", "fo"},
    {"zh", "wuu", "yue"},
    {"ar", "ary", "arz"},
    {"cs", "sk"},
    {"be", "ru", "uk"},
    {"es", "gl", "pt", "ca", "ast", "an", "oc"},
    {"fa", "ur", "ps"},
    {"en", "pcm"},
    {"de", "lb"},
    {"nl", "af", "fy"},
    {"fr", "gcr", "gcf", "wa"},
    {"it", "vec", "lij", "la"},
    {"tr", "az", "tk", "crh", "gag"},
    {"hi", "mr", "ne", "sa", "gom"},
    {"uz", "uzs"},
    {"zu", "xh"},
    {"lv", "ltg"},
    {"ku", "sdh"},
    {"kk", "ky", "tt", "ba"},
    {"gn", "gug"},
    {"he", "hbo", "yi"},
    {"el", "grc"},
    {"rn", "rw"},
    {"nso", "st", "tn"},
    {"ga", "gd"},
    {"mk", "bg"},
)
_NO_LANGUAGE = "zxx"


def language_problem(text: str, language: str, check: LanguageCheck) -> Reject | None:
    """A reject if the text is surely in another language; None if it fits, is short, or cannot be judged.

    Args:
        text: what was written.
        language: ISO 639-3 code asked for; one the model does not know cannot be judged.
        check: letters below which nothing is judged, and the probability of another language that refuses.
    """
    expected = short_code(language)
    model, known = language_model()
    if expected not in known or sum(character.isalpha() for character in text) < check.min_letters:
        return None
    ranked = [(str(label), float(probability)) for label, probability in model.rank(text)]
    found = ranked[0][0]
    if found == _NO_LANGUAGE or _close(found, expected):
        return None
    # Arabic shares its probability with two of its dialects; together they speak for the group.
    probability = sum(share for label, share in ranked if _close(label, found))
    if probability < check.min_probability:
        return None
    return reject("language", f"{found} with {probability:.2f}, not {expected}: {text}")


def _close(found: str, expected: str) -> bool:
    return found == expected or any(found in group and expected in group for group in _CLOSE)


# Rows that share text with an evaluation set.
#
# A text is refused if the whole of it is an evaluation text (case and punctuation aside, from 20 characters, or 8 in
# scripts without blanks), or if more than a share of its 13-grams stands in evaluation texts. 13 words is the length
# GPT-3's authors settled on (arXiv 2005.14165, appendix C); in Chinese and Japanese script a character is a word.


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
    single = sum(map(stands_alone, words))
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


# The index of evaluation texts that rows are held against: built once per artefact, in a task.


_FILE = "steps/guard.npz"


def guard_file(
    stage: str, check: ContaminationCheck | None, corpus: Place, place: Place
) -> tuple[Place, str] | None:
    """Where the index lies, built if it is not there yet; None without the check.

    Raises:
        DataError: evaluation texts that are not there or not readable.
    """
    if check is None:
        return None
    if not place.exists(_FILE):
        list(run_tasks(stage, _build, [check], corpus, place, cpus=1.0))
    return place, _FILE


def _build(check: ContaminationCheck, corpus: Place, place: Place) -> None:
    save_index(place, _FILE, build_index(evaluation_texts(check, corpus)))


# The checks that look at one row alone, in order; the first that fails names the reject. Pure.


_ECHO_CHARACTERS = 20  # a prompt's line shorter than this may stand in a text by chance
# Shorter label words ("of", "no", "में") stand in any text, and so does one character of a script without blanks ("好").
_LEAK_CHARACTERS = 3
_LEAK_LETTERS = 2


@dataclass(frozen=True, slots=True)
class RowContext:
    """What a row is held against.

    Attributes:
        attempt: what was asked.
        quality: which checks run.
        guard: index of evaluation texts, if any.
        templates: the prompt's messages, placeholders unfilled.
    """

    attempt: Attempt
    quality: QualityConfig
    guard: ContaminationIndex | None
    templates: tuple[str, ...]


def check_row(row: Row, context: RowContext) -> Reject | None:
    """The first check that the row fails, or None."""
    checks: tuple[Callable[[Row, RowContext], Reject | None], ...] = (
        _lengths,
        _echo,
        _copy,
        _label_leak,
        _language,
        _contamination,
    )
    return next((found for check in checks if (found := check(row, context)) is not None), None)


def _lengths(row: Row, context: RowContext) -> Reject | None:
    """Lower bounds; the upper ones are the family's."""
    query = str(row["query"])
    if len(query) < context.quality.min_query_characters:
        return reject("too_short", query)
    short = [text for text in _others(row) if len(text) < context.quality.min_text_characters]
    return reject("too_short", short[0]) if short else None


def _echo(row: Row, context: RowContext) -> Reject | None:
    """A text that stands in a line of the prompt, or holds one."""
    if not context.templates:
        return None
    lines = [_plain(line) for template in context.templates for line in template.splitlines()]
    labels = row["task_type"] == "classification"  # a label may well be a word of the prompt
    for text in (str(row["query"]), *([] if labels else _others(row))):
        plain = _plain(text)
        if any(plain in line or (len(line) >= _ECHO_CHARACTERS and line in plain) for line in lines):
            return reject("echoes_prompt", text)
    return None


def _copy(row: Row, context: RowContext) -> Reject | None:
    """A query that stands in its document word for word; extracted and translated ones are judged by their families."""
    attempt = context.attempt
    if (
        not context.quality.copies
        or row["task_type"] != "retrieval"
        or row["origin"] != "synthetic"
        or attempt.pair
    ):
        return None
    document = attempt.document
    shown = (
        str(row.get("positive") or "") if document is None else document_text(document.title, document.text)
    )
    return (
        reject("copies_document", str(row["query"])) if _plain(str(row["query"])) in _plain(shown) else None
    )


def _label_leak(row: Row, context: RowContext) -> Reject | None:
    """A word of the label in the text to classify; such a text needs no understanding.

    In a script without blanks a word is what nothing parts in the label (好评 of two characters), and counts where it stands whole.
    """
    if not context.quality.label_leak or row["task_type"] != "classification":
        return None
    text = f" {' '.join(words_of(str(row['query'])))} "
    leaked = [
        term for term in terms_of(str(row["positive"])) if _tells(term) and f" {' '.join(term)} " in text
    ]
    if not leaked:
        return None
    return reject("label_leak", f"{''.join(leaked[0])!r} of {row['positive']!r}: {row['query']}")


def _tells(term: tuple[str, ...]) -> bool:
    """Whether a term of a label is long enough not to stand in any text."""
    if stands_alone(term[0]):
        return len(term) >= _LEAK_LETTERS
    return len(term[0]) >= _LEAK_CHARACTERS and letters_in(term[0]) >= _LEAK_LETTERS


def _language(row: Row, context: RowContext) -> Reject | None:
    """Query and written texts, each in its own language; a document of the corpus is not judged."""
    check = context.quality.language
    if check is None or row["origin"] != "synthetic":
        return None
    written = [(str(row["query"]), str(row["lang"]))]
    # A translated query keeps its pair's texts, which nobody wrote.
    if context.attempt.pair is None or row["document_lang"] == context.attempt.language:
        written += [(text, str(row["document_lang"])) for text in _others(row)]
    found = (language_problem(text, language, check) for text, language in written)
    return next((problem for problem in found if problem is not None), None)


def _contamination(row: Row, context: RowContext) -> Reject | None:
    check = context.quality.contamination
    if check is None or context.guard is None:
        return None
    found = (context.guard.problem(text, check.max_share) for text in (str(row["query"]), *_others(row)))
    return next((problem for problem in found if problem is not None), None)


def _others(row: Row) -> list[str]:
    """Positive and negatives that stand in the row itself."""
    negatives: Any = row.get("negatives") or []
    return [str(text) for text in (row.get("positive"), *negatives) if text is not None]


def _plain(text: str) -> str:
    """Lower-case words without the punctuation around the whole, for comparing."""
    return " ".join(text.casefold().split()).strip(" .?!\"'")
