"""Questions that documents hold already."""

import pytest

from embedloom.config.synthesis import ExistingQuestionsConfig
from embedloom.core.schemas import content_id, table_from_rows
from embedloom.synthesis.families.base import Attempt, SeedDocument
from embedloom.synthesis.families.from_documents import split_questions
from embedloom.synthesis.families.registry import FAMILIES

TEXT = (
    "Lava is molten rock that flows from a volcano during an eruption.\n\n"
    "Question: What is lava? Answer: Molten rock.\n"
    "- Question: Which is hotter?\nA) lava\nB) water\nAnswer: A)\n"
    "Question: Does it flow"
)


def attempt(document: SeedDocument) -> Attempt:
    return Attempt("attempt-1", "key", "", 3, "eng", "eng", 7, document=document)


def test_questions_are_split_from_the_text_before_them():
    body, questions = split_questions(TEXT)
    assert body == "Lava is molten rock that flows from a volcano during an eruption."
    assert questions == ["What is lava?", "Which is hotter?\nA) lava\nB) water", "Does it flow"]


def test_a_text_that_speaks_of_questions_has_none():
    assert split_questions("The Question: what now? It has no answer.")[1] == []


def test_rows_are_public_and_their_positive_does_not_hold_the_question():
    options = ExistingQuestionsConfig(rows=1, questions_per_document=2)
    one = attempt(SeedDocument("d1", "Lava", TEXT, "eng"))
    found = FAMILIES["existing_questions"].extract(one, options)
    assert [row["query"] for row in found] == ["What is lava?", "Which is hotter? A) lava B) water"]
    assert {row["origin"] for row in found} == {"public"}
    assert "Question" not in found[0]["positive"] and found[0]["positive"].startswith("Lava Lava is")
    # Its id is not the document's: mining takes the text of a known id from the corpus, questions and all.
    assert found[0]["document_id"] == content_id("without questions", "d1")
    table = table_from_rows("pairs", found)
    assert table.column("generator").null_count == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("No question here, only a plain statement of facts.", "no_question"),
        ("Short.\nQuestion: Why?", "too_short"),
    ],
)
def test_a_document_without_them_is_one_reject(text: str, reason: str):
    one = attempt(SeedDocument("d1", None, text, "eng"))
    (refused,) = FAMILIES["existing_questions"].extract(
        one, ExistingQuestionsConfig(rows=1, questions_per_document=4)
    )
    assert refused.reason == reason
