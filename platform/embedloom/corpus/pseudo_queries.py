"""Queries of plain documents: the title or first sentence asks, what is left answers (arXiv 1906.00300 §4)."""

import re
from dataclasses import replace
from typing import Literal

from embedloom.core.prompting import DEFAULT_INSTRUCTIONS
from embedloom.corpus.clean import SourceRow

# Fewer characters ask nothing ("FAQ"), more are no sentence (a table, a list without full stops).
_FEWEST, _MOST = 8, 300
# The end of a sentence: its mark and a blank, the mark alone in scripts that set none, or the end of a line.
_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f\u0964])\s*|\n\s*")


def with_query(
    row: SourceRow, kind: Literal["title", "first_sentence"], instruction: str | None
) -> SourceRow:
    """The row with its title, or first sentence, as a query and without it in the text; the row itself if there is none.

    Args:
        row: a document.
        kind: what becomes the query.
        instruction: of the query; None: that of retrieval.
    """
    query, text = (row.title or "", row.text) if kind == "title" else first_sentence(row.text)
    if not _FEWEST <= len(query.strip()) <= _MOST or not text.strip():
        return row
    return replace(
        row,
        title=None if kind == "title" else row.title,
        text=text,
        queries=(query.strip(),),
        instruction=instruction or DEFAULT_INSTRUCTIONS["retrieval"],
    )


def first_sentence(text: str) -> tuple[str, str]:
    """The first sentence and what follows it; an empty sentence where nothing follows."""
    found = _END.search(text.lstrip())
    if found is None:
        return "", text
    return text.lstrip()[: found.start()], text.lstrip()[found.end() :]
