"""Cutting by headings, blocks and lines: what stays whole, that nothing is lost, and what a piece is called."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.documents.cutting import cut_document, place_in
from embedloom.documents.outline import Blocks, Mark


def words(text):
    """A tokenizer whose tokens are words and signs."""
    return [found.span() for found in re.finditer(r"\w+|[^\w\s]", text)]


def pieces_of(document, limit, overlap=0):
    found = cut_document(document.text, words(document.text), document.outline, limit, overlap)
    return [document.text[piece.start : piece.stop] for piece in found]


def guide():
    blocks = Blocks()
    for section in ("One", "Two", "Three"):
        blocks.heading(2, section)
        blocks.text(" ".join(["word"] * 12))
        blocks.code("a b\nc d", "sh")
    return blocks.document(stated="Guide")


def test_sections_begin_chunks_and_code_stays_whole():
    document = guide()
    found = pieces_of(document, 35)
    assert [piece.split("\n")[0] for piece in found] == ["## One", "## Two", "## Three"]
    assert all(piece.count("```") == 2 for piece in found)
    assert "".join(found) == document.text


def test_a_heading_is_not_parted_from_what_follows():
    blocks = Blocks()
    blocks.text(" ".join(["word"] * 20))
    blocks.heading(2, "Late")
    blocks.heading(3, "Later")
    blocks.text(" ".join(["tail"] * 20))
    found = pieces_of(blocks.document(), 28)
    assert found[1].startswith("## Late\n\n### Later\n\ntail") and len(found) == 2


def test_a_block_longer_than_the_limit_is_cut_at_lines_then_words():
    blocks = Blocks()
    blocks.code("\n".join(f"line {number} ends" for number in range(30)))
    assert all(piece.strip().startswith(("```", "line")) for piece in pieces_of(blocks.document(), 20))
    blocks = Blocks()
    blocks.text("First sentence here now. " * 3 + "and so on " * 20)
    assert pieces_of(blocks.document(), 20)[0].endswith("now. ")


def test_pieces_overlap_where_no_heading_begins():
    blocks = Blocks()
    blocks.text(" ".join(f"w{number}" for number in range(40)))
    first, second, *_ = pieces_of(blocks.document(), 16, overlap=4)
    assert first.split()[-4:] == second.split()[:4]


@given(
    st.lists(st.text(alphabet="ab \n.,ä漢\u0301\u200d😀", min_size=1, max_size=60), min_size=1, max_size=12),
    st.integers(2, 20),
)
def test_nothing_is_lost_and_no_piece_is_longer_than_the_limit(texts, limit):
    blocks = Blocks()
    for number, text in enumerate(texts):
        if number % 3 == 0:
            blocks.heading(2, text)
        blocks.text(text)
    document = blocks.document()
    offsets = words(document.text)
    pieces = cut_document(document.text, offsets, document.outline, limit)
    assert "".join(document.text[piece.start : piece.stop] for piece in pieces) == document.text
    assert all(piece.tokens <= limit for piece in pieces)
    assert sum(piece.tokens for piece in pieces) == len(offsets)


@pytest.mark.parametrize(
    ("start", "name"),
    [(0, "a.pdf#page=1"), (4, "a.pdf#page=1"), (5, "a.pdf#page=2 § Install"), (9, "a.pdf#page=2 § Install")],
)
def test_a_piece_is_called_by_page_and_heading(start, name):
    outline = (Mark(10, "text", "", 1), Mark(5, "text", "Install", 2))
    assert place_in("a.pdf", "0123456789", outline, start) == name
    assert place_in("a.pdf", "0123456789", (), start) == "a.pdf"
