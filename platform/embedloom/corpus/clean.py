"""One document of a source, before and after cleaning, and the record of every row that is left out."""

from collections import Counter
from dataclasses import dataclass, replace

from embedloom.core.schemas import content_id
from embedloom.core.text import clean_line, clean_text


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
        outline: where its headings, pages, tables and code begin, as ``documents.outline.packed``; empty: unknown.
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
    outline: str = ""


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


# Cleaned rows; too short is a reject.


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
