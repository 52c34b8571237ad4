"""Text cleaning: Unicode NFC, no control characters, plain line ends and blanks; too short is a reject."""

import re
import unicodedata
from dataclasses import replace

from embedloom.corpus.rows import SourceRow
from embedloom.records import content_id

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Control characters but tab and newline, lone surrogates (JSON can carry them, UTF-8 cannot), byte-order
# marks, zero-width blanks and soft hyphens: invisible, yet each would change tokens and hashes. Joiners stay:
# scripts need them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ud800-\udfff\ufeff\ufffe\uffff]")
_INNER_BLANKS = re.compile(r"(?<=\S)[^\S\n]+")
# After the inner runs; both branches are anchored, since an open run would take quadratic time on long blanks.
_TRAILING_BLANKS = re.compile(r"(?<=\S) $|^[^\S\n]+$", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    """Normalise a text; indentation stays (code, lists), other runs of blanks or empty lines become one."""
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    text = unicodedata.normalize("NFC", text)
    text = _TRAILING_BLANKS.sub("", _INNER_BLANKS.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", text).strip()


def clean_line(text: str) -> str:
    """Normalise a text onto one line (titles, queries)."""
    return " ".join(clean_text(text).split())


def clean_row(row: SourceRow) -> SourceRow:
    """Clean text, title and queries; a missing id becomes the content's hash, a missing group the id."""
    text = clean_text(row.text)
    title = clean_line(row.title or "") or None
    name = row.id or content_id(title or "", text)
    lines = [clean_line(query) for query in row.queries]
    return replace(
        row,
        text=text,
        title=title,
        id=name,
        group=row.group or name,
        queries=tuple(line for line in lines if line),
        grades=tuple(grade for line, grade in zip(lines, row.grades, strict=False) if line),
    )


def reject_reason(row: SourceRow, min_characters: int) -> str | None:
    """Why a cleaned row is no document, or None."""
    if not row.text:
        return "empty"
    return "too_short" if len(row.text) < min_characters else None
