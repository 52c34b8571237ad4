"""One document of a source, before and after cleaning, and the record of every row that is left out."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace

from embedloom.core.schemas import content_id


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One document as its source gives it.

    Attributes:
        text: body of the document.
        source: where it came from, down to the row or object.
        group: what must not be torn between splits (a module, a file); empty: the document stands alone.
        title: joined before the body when a model reads the document.
        lang: ISO 639-3 code, where known.
        id: the source's own id; empty until cleaning where there is none.
        queries: texts that the document answers by the source's own word (a summary line, a judged query).
        grades: how relevant it is to each of them, above 0; empty: 1 each.
        instruction: training instruction of those queries.
        dataset: what training calls those pairs; empty: their origin.
    """

    text: str
    source: str
    group: str = ""
    title: str | None = None
    lang: str | None = None
    id: str = ""
    queries: tuple[str, ...] = ()
    grades: tuple[float, ...] = ()
    instruction: str = ""
    dataset: str = ""


# Rejects: every row that is left out, with its reason, so that nothing vanishes silently.


class Rejects:
    """Collects rows of the ``rejects`` table and counts them by reason."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self._counts: Counter[str] = Counter()

    def add(self, row_id: str, reason: str, detail: str) -> None:
        """Note one rejected row."""
        self.rows.append({"id": row_id, "reason": reason, "detail": detail})
        self._counts[reason] += 1

    @property
    def counts(self) -> dict[str, int]:
        """Rejected rows by reason, in alphabetical order."""
        return dict(sorted(self._counts.items()))


# Text cleaning: Unicode NFC, no control characters, plain line ends and blanks; too short is a reject.


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
