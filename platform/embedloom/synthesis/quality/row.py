"""The checks that look at one row alone, in order; the first that fails names the reject. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embedloom.config.quality import QualityConfig
from embedloom.instructions import document_text
from embedloom.ngrams import words_of
from embedloom.synthesis.families.base import Attempt, Reject, Row, reject
from embedloom.synthesis.quality.contamination import ContaminationIndex
from embedloom.synthesis.quality.language import language_problem

_ECHO_CHARACTERS = 20  # a prompt's line shorter than this may stand in a text by chance
_LEAK_CHARACTERS = 3  # shorter label words ("of", "no") stand in any text


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
    """A word of the label in the text to classify; such a text needs no understanding."""
    if not context.quality.label_leak or row["task_type"] != "classification":
        return None
    text = set(words_of(str(row["query"])))
    leaked = [
        word
        for word in words_of(str(row["positive"]))
        if word in text and (len(word) >= _LEAK_CHARACTERS or not word.isascii())
    ]
    return reject("label_leak", f"{leaked[0]!r} of {row['positive']!r}: {row['query']}") if leaked else None


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
