"""Texts by position, with and without memory for them, and which documents share one."""

import numpy as np
import pytest

from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.mining.documents import DocumentTexts
from fakes_mining import document_row

ROWS = [
    document_row("c", "same words"), document_row("a", "words", title="same"), document_row("d", "alone"),
    document_row("b", "title only differs", title="x"), document_row("e", "same words"),
]  # fmt: skip


@pytest.mark.parametrize("memory_bytes", [0, 2**20])
def test_texts_and_equal_texts_by_position(tmp_path, memory_bytes):
    place = Place(str(tmp_path))
    place.write_table("documents/part-000000.parquet", table_from_rows("documents", ROWS[:3]))
    place.write_table("more/part-000000.parquet", table_from_rows("documents", ROWS[3:]))
    texts = DocumentTexts([(place, "documents"), (place, "more")], memory_bytes)
    # positions are ranks of the ids: a 0, b 1, c 2, d 3, e 4; "same" + "words" is the text of a, c and e
    assert texts.find(["d", "nobody", "a"]).tolist() == [3, -1, 0]
    assert [found.tolist() for found in texts.find_lists([["d"], [], ["nobody", "a"]])] == [[3], [], [-1, 0]]
    assert texts.find_lists([]) == []
    assert texts.texts([4, 1, 1, 0]) == {0: "same words", 1: "x title only differs", 4: "same words"}
    assert texts.same_text(np.arange(5)).tolist() == [0, 1, 0, 3, 0]
    assert texts.position_of("same words") == 0
    assert texts.position_of("alone") == 3
    assert texts.position_of("nowhere") is None


def test_a_candidate_of_another_corpus_is_refused(tmp_path):
    place = Place(str(tmp_path))
    place.write_table("documents/part-000000.parquet", table_from_rows("documents", ROWS))
    texts = DocumentTexts([(place, "documents")])
    with pytest.raises(DataError, match="no document of the corpus"):
        texts.same_text(texts.find(["a", "stranger"]))
