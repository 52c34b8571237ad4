import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.corpus.clean import SourceRow, clean_line, clean_row, clean_text, reject_reason


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("e\u0301t\u00e9", "\u00e9t\u00e9"),  # NFC
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a\x00b\x1bc\ufeffd\u200be\u00adf", "abcdef"),
        ("a \t\u00a0 b   \n", "a b"),
        ("def f():\n    return  1   \n\n\n\n\nend", "def f():\n    return 1\n\nend"),  # indentation stays
        ("\ud800broken", "broken"),  # a lone surrogate, which UTF-8 cannot write
        ("\U0001f469\u200d\U0001f52c", "\U0001f469\u200d\U0001f52c"),  # a joined emoji stays joined
        (" \n\t ", ""),
    ],
)
def test_clean_text(dirty, clean):
    assert clean_text(dirty) == clean


@given(st.text())
def test_cleaning_twice_changes_nothing_and_can_be_written(text):
    once = clean_text(text)
    assert clean_text(once) == once
    once.encode()
    assert unicodedata.is_normalized("NFC", once)


def test_long_blanks_take_no_longer_than_other_text():
    started = time.process_time()
    assert clean_text(f"a{' ' * 300_000}b\n{' ' * 300_000}c\n{' ' * 300_000}\nd").endswith(" c\n\nd")
    assert time.process_time() - started < 2


def test_clean_line_joins_lines():
    assert clean_line(" A\n  title\there ") == "A title here"


def test_clean_row_fills_id_and_group():
    row = clean_row(SourceRow(text=" body ", source="s", title=" \n", queries=(" a\n b", "  ")))
    assert (row.text, row.title, row.queries) == ("body", None, ("a b",))
    assert row.group == row.id
    assert row.id == clean_row(SourceRow(text="body", source="elsewhere")).id  # the content alone
    assert row.id != clean_row(SourceRow(text="body", source="s", title="T")).id
    given_id = clean_row(SourceRow(text="body", source="s", id="7", group="g"))
    assert (given_id.id, given_id.group) == ("7", "g")


@pytest.mark.parametrize(("text", "reason"), [("", "empty"), ("four", "too_short"), ("fives", None)])
def test_reject_reason(text, reason):
    assert reject_reason(SourceRow(text=text, source="s"), min_characters=5) == reason
