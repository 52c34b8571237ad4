"""Cutting a document with an outline: at headings, else between blocks, else between lines, sentences or words.

Sections, tables and code stay whole where they fit; what is longer than a chunk alone is cut inside.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from embedloom.documents.outline import Mark

# A cut is looked for from the limit back to these shares of it. A heading may leave a chunk a third full, so that the next
# begins with its section; a word or sentence is worth no more than a quarter of the room.
_BACK_TO_HEADING, _BACK_TO_BLOCK, _BACK_TO_LINE, _BACK_TO_WORD = 1 / 3, 1 / 4, 1 / 2, 3 / 4
_FEWEST = 8  # the last chunk has at least an eighth of the limit, as a few words are no document
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|[\u3002\uff01\uff1f\u0964]")
_JOINER = "\u200d"


@dataclass(frozen=True, slots=True)
class Piece:
    """Characters ``start`` to ``stop`` of a text, and how many tokens they are."""

    start: int
    stop: int
    tokens: int


def cut_document(
    text: str, offsets: Sequence[tuple[int, int]], outline: Sequence[Mark], limit: int, overlap: int = 0
) -> list[Piece]:
    """Cut a text into pieces of at most ``limit`` tokens; they reach from the first character to the last without a gap.

    Args:
        text: the text, or one that ends alike (see ``Mark.behind``).
        offsets: (start, stop) characters of its tokens, in order.
        outline: its marks.
        limit: most tokens of a piece.
        overlap: most tokens that a piece repeats of the one before, below ``limit``; none where it begins with a heading.
    """
    starts = [start for start, _ in offsets]
    headings, blocks = _boundaries(len(text), starts, outline)
    pieces: list[Piece] = []
    first, count = 0, len(starts)
    while count - first > limit:
        end = min(first + limit, max(first + 1, count - max(1, limit // _FEWEST)))
        cut = _choose(text, starts, headings, blocks, first, end, limit)
        pieces.append(Piece(starts[first] if first else 0, starts[cut], cut - first))
        back = 0 if cut in headings else overlap
        first = _word_behind(text, starts, max(first + 1, cut - back), cut) if back else cut
    pieces.append(Piece(starts[first] if first else 0, len(text), count - first))
    return pieces


def _boundaries(length: int, starts: Sequence[int], outline: Sequence[Mark]) -> tuple[list[int], list[int]]:
    """Tokens with which headings, and other blocks, begin; what follows a heading is not parted from it."""
    headings, blocks = list[int](), list[int]()
    under_heading = False
    for mark in outline:
        token = bisect_left(starts, max(0, length - mark.behind))
        if mark.kind == "heading":
            if not under_heading:
                headings.append(token)
        elif not under_heading:
            blocks.append(token)
        under_heading = mark.kind == "heading"
    return headings, blocks


def _choose(
    text: str,
    starts: Sequence[int],
    headings: Sequence[int],
    blocks: Sequence[int],
    first: int,
    end: int,
    limit: int,
) -> int:
    """The token before which to cut, above ``first`` and at most ``end``."""
    for marks, share in ((headings, _BACK_TO_HEADING), (blocks, _BACK_TO_BLOCK)):
        place = bisect_right(marks, end) - 1
        if place >= 0 and marks[place] >= first + max(1, int(limit * share)):
            return marks[place]
    low = first + max(1, min(int(limit * _BACK_TO_LINE), end - first))
    line = text.rfind("\n", starts[low], starts[end])
    if line >= 0 and first < (token := bisect_right(starts, line)) <= end:
        return token
    sentences = [found.end() for found in _SENTENCE_END.finditer(text, starts[low], starts[end])]
    if sentences and first < (token := bisect_left(starts, sentences[-1])) <= end:
        return token
    low = first + max(1, min(int(limit * _BACK_TO_WORD), end - first))
    return _word_before(text, starts, low, end)


def _word_before(text: str, starts: Sequence[int], low: int, end: int) -> int:
    """The last token from ``low`` to ``end`` that begins a word, else a character, else ``end``."""
    for token in range(end, low - 1, -1):
        if text[starts[token] - 1 : starts[token] + 1].strip() != text[starts[token] - 1 : starts[token] + 1]:
            return token
    return next((token for token in range(end, low - 1, -1) if _begins_character(text, starts, token)), end)


def _word_behind(text: str, starts: Sequence[int], low: int, end: int) -> int:
    """The first token from ``low`` to ``end`` that begins a word, else ``end``."""
    return next((token for token in range(low, end) if text[starts[token] - 1].isspace()), end)


def _begins_character(text: str, starts: Sequence[int], token: int) -> bool:
    """Not in the middle of one that is several tokens, before its accents, or inside a joined emoji."""
    start = starts[token]
    if start == starts[token - 1]:
        return False
    here, before = text[start : start + 1], text[start - 1]
    return not (unicodedata.category(here).startswith("M") or _JOINER in (here, before))


def place_in(source: str, text: str, outline: Sequence[Mark], start: int) -> str:
    """Name of the place of a piece: ``FILE#page=3 § Install > Linux``, as far as its outline knows.

    Args:
        source: the document's own name.
        text: of the document.
        outline: its marks.
        start: first character of the piece.
    """
    marks = [mark for mark in outline if len(text) - mark.behind <= start]
    mark = marks[-1] if marks else (outline[0] if outline else None)
    if mark is None:
        return source
    page = f"#page={mark.page}" if mark.page is not None else ""
    return f"{source}{page}{f' § {mark.heading}' if mark.heading else ''}"
