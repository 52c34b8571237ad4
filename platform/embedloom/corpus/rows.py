"""What a reader hands on: one document of a source, before and after cleaning."""

from dataclasses import dataclass


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
