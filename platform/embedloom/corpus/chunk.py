"""Chunks: long documents cut by the base model's own tokens, at blanks where there are any near the limit."""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedloom.core.schemas import content_id
from embedloom.corpus.clean import SourceRow
from embedloom.documents.cutting import cut_document, place_in
from embedloom.documents.outline import unpacked
from embedloom.encoder.tokenizer import load_tokenizer

# A cut moves back to a blank over at most a quarter of a chunk; a text without blanks is cut between characters.
_SEARCHED = 4
_JOINER = "\u200d"


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``stop`` of a text, and the number of tokens in them."""

    start: int
    stop: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a document that has an id of its own; a document that fits is its own only chunk."""

    row: SourceRow
    tokens: int
    document_id: str = ""  # of the whole document, where this is a piece of it


class Chunker:
    """Cuts cleaned documents into chunks of at most ``chunk_tokens`` tokens, title included.

    Args:
        tokenizer_folder: model folder whose tokenizer counts.
        chunk_tokens: most tokens of a chunk, without special tokens.
        overlap_tokens: most tokens of a chunk repeated at the start of the next.

    Raises:
        DataError: the folder has no fast tokenizer.
    """

    def __init__(self, tokenizer_folder: Path, chunk_tokens: int, overlap_tokens: int) -> None:
        self._tokenizer: Any = load_tokenizer(tokenizer_folder).backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._chunk_tokens = chunk_tokens
        self._overlap_tokens = overlap_tokens

    def cut(self, rows: Sequence[SourceRow]) -> Iterator[list[Chunk]]:
        """Chunks of each row, in order; only the first keeps the row's queries."""
        bodies = self._tokenizer.encode_batch([row.text for row in rows], add_special_tokens=False)
        titles = self._tokenizer.encode_batch([row.title or "" for row in rows], add_special_tokens=False)
        for row, body, title in zip(rows, bodies, titles, strict=True):
            # Every chunk repeats the title, but a long title leaves at least half of the room to the text.
            room = max(self._chunk_tokens - len(title), self._chunk_tokens // 2)
            if len(body) <= room and not row.outline:  # its offsets would take a tenth of the time to make
                yield [Chunk(row, len(body))]
                continue
            overlap = min(self._overlap_tokens, room - 1)
            if row.outline:
                pieces = cut_document(row.text, body.offsets, unpacked(row.outline), room, overlap)
                spans = [Span(piece.start, piece.stop, piece.tokens) for piece in pieces]
            else:
                spans = cut_spans(row.text, body.offsets, room, overlap)
            yield list(_chunks(row, spans))


def cut_spans(text: str, offsets: Sequence[tuple[int, int]], limit: int, overlap: int = 0) -> list[Span]:
    """Cut a text into as few spans of at most ``limit`` tokens as it needs, of about equal length.

    The spans reach from the first character to the last without a gap; without overlap they only touch.
    They meet at token boundaries, of which none parts a character from its accents.

    Args:
        text: the text.
        offsets: (start, stop) characters of its tokens, in order.
        limit: most tokens of a span.
        overlap: most tokens by which a span reaches back into the one before, below ``limit``.
    """
    count = len(offsets)
    spans: list[Span] = []
    first = last = 0
    while count - first > limit:
        pieces = math.ceil((count - first - overlap) / (limit - overlap))
        # Equal shares: cutting at the limit would leave a last span of a few words, which is no document.
        share = math.ceil((count - first - overlap) / pieces) + overlap
        lowest = max(last + 1, first + share - share // _SEARCHED)
        last = _cut(text, offsets, range(first + share, lowest - 1, -1))
        spans.append(Span(offsets[first][0] if first else 0, offsets[last][0], last - first))
        first = _cut(text, offsets, range(max(first + 1, last - overlap), last + 1))
    spans.append(Span(offsets[first][0] if first else 0, len(text), count - first))
    return spans


def _cut(text: str, offsets: Sequence[tuple[int, int]], candidates: range) -> int:
    """The first candidate token beside a blank, else the first that starts a character, else the first."""
    for fits in (_beside_blank, _starts_character):
        for index in candidates:
            if fits(text, offsets, index):
                return index
    return candidates[0]


def _beside_blank(text: str, offsets: Sequence[tuple[int, int]], index: int) -> bool:
    start = offsets[index][0]
    return start > 0 and (text[start - 1].isspace() or text[start : start + 1].isspace())


def _starts_character(text: str, offsets: Sequence[tuple[int, int]], index: int) -> bool:
    # Tokens can be single bytes of one character: then they all have its offsets.
    start = offsets[index][0]
    return start >= offsets[index - 1][1] and not _continues(text, start)


def _continues(text: str, position: int) -> bool:
    """Whether a character belongs to the one before it: an accent, a vowel sign, part of a joined emoji."""
    here, before = text[position : position + 1], text[position - 1]
    return bool(here) and (unicodedata.category(here).startswith("M") or _JOINER in (here, before))


def _chunks(row: SourceRow, spans: list[Span]) -> Iterator[Chunk]:
    if len(spans) == 1:
        yield Chunk(row, spans[0].tokens)
        return
    outline = unpacked(row.outline)
    filled = [(span, text) for span in spans if (text := row.text[span.start : span.stop].strip())]
    for number, (span, text) in enumerate(filled):
        chunk_id = content_id(row.id, str(number), text)
        queries = row.queries if number == 0 else ()
        source = place_in(row.source, row.text, outline, span.start)
        yield Chunk(replace(row, id=chunk_id, text=text, queries=queries, source=source), span.tokens, row.id)
