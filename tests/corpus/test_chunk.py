from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.corpus.chunk import Chunker, cut_spans
from embedloom.corpus.clean import SourceRow
from embedloom.errors import DataError
from fakes import byte_tokenizer
from fakes_corpus import save_word_tokenizer, sentence


def word_offsets(text):
    """(start, stop) of the runs between blanks."""
    offsets, start = [], None
    for position, character in enumerate(f"{text} "):
        if character.isspace() and start is not None:
            offsets.append((start, position))
            start = None
        elif not character.isspace() and start is None:
            start = position
    return offsets


def byte_offsets(text):
    return byte_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).offsets


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300) | st.text(
    "ab é\u0301日\n", max_size=300
)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(8, 40))
def test_spans_cover_the_text_and_keep_the_limit(text, limit):
    offsets = byte_offsets(text)
    spans = cut_spans(text, offsets, limit)
    assert "".join(text[span.start : span.stop] for span in spans) == text
    assert all(0 <= span.tokens <= limit for span in spans)
    assert sum(span.tokens for span in spans) == len(offsets)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(8, 40), st.integers(1, 7))
def test_overlapping_spans_leave_no_gap_and_end(text, limit, overlap):
    spans = cut_spans(text, byte_offsets(text), limit, overlap)
    assert (spans[0].start, spans[-1].stop) == (0, len(text))
    for before, after in pairwise(spans):
        assert before.start <= after.start <= before.stop <= after.stop
    assert all(span.tokens <= limit for span in spans)


def test_words_are_not_cut_where_there_are_blanks():
    text = " ".join(["extraordinary"] * 50)
    spans = cut_spans(text, byte_offsets(text), 100)
    pieces = [text[span.start : span.stop].split() for span in spans]
    assert all(set(piece) == {"extraordinary"} for piece in pieces)
    assert sum(map(len, pieces)) == 50


def test_spans_are_of_about_equal_length():
    text = sentence(1, words=101)
    spans = cut_spans(text, word_offsets(text), 100)
    assert [span.tokens for span in spans] == [51, 50]  # not 100 and 1


def test_overlap_repeats_tokens():
    text = " ".join(str(number) for number in range(10))
    spans = cut_spans(text, word_offsets(text), 6, overlap=2)
    assert [text[span.start : span.stop].split() for span in spans] == [list("012345"), list("456789")]


def test_accents_and_joined_emoji_stay_whole():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # 18 bytes, one visible character
    for unit in (family, "e\u0301", "日"):
        text = unit * 30
        for span in cut_spans(text, byte_offsets(text), 40):
            assert len(text[span.start : span.stop]) % len(unit) == 0


def test_a_document_that_fits_stays_as_it_is(tmp_path):
    chunker = Chunker(save_word_tokenizer(tmp_path), 16, 0)
    row = SourceRow(text=sentence(1, 16), source="s", id="d1", group="g", queries=("q",))
    ((chunk,),) = chunker.cut([row])
    assert (chunk.row, chunk.tokens) == (row, 16)


def test_chunks_have_stable_ids_and_the_first_keeps_the_queries(tmp_path):
    chunker = Chunker(save_word_tokenizer(tmp_path), 16, 0)
    row = SourceRow(text=sentence(1, 40), source="s", id="d1", group="g", title="two words", queries=("q",))
    ((first, *others),) = chunker.cut([row])
    assert first.row.queries == ("q",)
    assert others and all(chunk.row.queries == () for chunk in others)
    chunks = [first, *others]
    assert " ".join(chunk.row.text for chunk in chunks) == row.text
    assert all(
        chunk.tokens + 2 <= 16 and chunk.row.title == "two words" for chunk in chunks
    )  # the title counts
    ids = [chunk.row.id for chunk in chunks]
    assert len(set(ids)) == len(ids) and "d1" not in ids
    assert ids == [chunk.row.id for chunk in next(chunker.cut([row]))]


def test_chunk_tokens_count_as_the_tokenizer_does(tiny_llama):
    text = "Ein längerer Text über Straßen und Bäume. " * 20
    ((*chunks,),) = Chunker(tiny_llama, 64, 0).cut([SourceRow(text=text.strip(), source="s", id="d")])
    # One token a byte; the blanks between chunks are stripped from their texts.
    assert all(len(chunk.row.text.encode()) <= 64 for chunk in chunks)
    assert sum(chunk.tokens for chunk in chunks) == len(text.strip().encode())


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        Chunker(tmp_path, 64, 0)
