"""Each family: what it asks, and the rows it makes of an answer."""

import json
from typing import Any

import jsonschema
import pytest

from embedloom.config.synthesis import (
    BitextConfig,
    ClassificationConfig,
    FamilyConfig,
    LongLongConfig,
    SeedQueriesConfig,
    ShortLongConfig,
    ShortShortConfig,
    STSConfig,
    TranslationConfig,
)
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS
from embedloom.core.schemas import table_from_rows
from embedloom.synthesis.families.base import Attempt, Reject, SeedDocument, draw, positive_id, row_id
from embedloom.synthesis.families.from_documents import shown_text
from embedloom.synthesis.families.registry import FAMILIES, family_prompt
from embedloom.synthesis.families.written import ask_tasks, tasks_of, tasks_prompt

DOCUMENT = SeedDocument("doc-1", "sort", "Sort an array along an axis.", "deu")
PAIR = {
    "query": "sort an array", "positive": "numpy.sort returns a sorted copy.", "document_id": "d7", "lang": "eng",
    "document_lang": "eng", "task_type": "retrieval", "instruction": "Find the function", "negatives": ["numpy.cos"],
}  # fmt: skip
TASK = "Given a symptom, retrieve documents that name its cause"


def attempt(language: str = "eng", document_language: str = "eng", seed: int = 7, **parts: Any) -> Attempt:
    return Attempt("attempt-1", "key", "llm", 3, language, document_language, seed, **parts)


def rows_of(options: FamilyConfig, answer: dict[str, Any], one: Attempt) -> list[Any]:
    family = FAMILIES[options.family]
    prompt = family_prompt(options, small=False)
    jsonschema.validate(answer, family.ask(one, prompt, options).json_schema)
    found = family.rows(one, answer, prompt, options)
    assert len(found) == family.asked_rows(options)
    table_from_rows("pairs", [row for row in found if not isinstance(row, Reject)])
    return found


def asked(options: FamilyConfig, one: Attempt, small: bool = False) -> str:
    messages = FAMILIES[options.family].ask(one, family_prompt(options, small), options).messages
    return "\n".join(message["content"] for message in messages)


class TestSeedQueries:
    def test_a_row_a_query_with_its_document_and_origin(self):
        options = SeedQueriesConfig(rows=9, queries_per_document=3, max_query_characters=30)
        one = attempt("fra", "deu", document=DOCUMENT)
        answer = {"queries": ["Comment  trier\nun tableau ?", " 12 ", "x" * 31]}
        row, empty, long = rows_of(options, answer, one)
        assert row["query"] == "Comment trier un tableau ?"
        assert (row["lang"], row["document_lang"], row["document_id"]) == ("fra", "deu", "doc-1")
        assert (row["origin"], row["generator"], row["positive"]) == ("synthetic", "llm", None)
        assert row["prompt_hash"] == family_prompt(options, small=False).hash
        assert row["id"] == row_id(one, 0) != row_id(one, 1)
        assert (empty.reason, long.reason) == ("empty", "too_long")

    def test_the_prompt_names_both_languages_and_the_drawn_attributes(self):
        options = SeedQueriesConfig(rows=9, queries_per_document=3)
        text = asked(options, attempt("fra", "deu", document=DOCUMENT))
        assert "Document (German):\nsort Sort an array along an axis." in text
        assert "Write 3 specific, different questions in French" in text
        prompt = family_prompt(options, small=False)
        one = attempt("fra", "deu", document=DOCUMENT)
        row = rows_of(options, {"queries": ["a b", "c d", "e f"]}, one)[0]
        drawn = json.loads(row["attributes"])
        assert set(drawn) == set(prompt.attributes)
        assert all(value in text for value in drawn.values())

    def test_one_query_is_asked_for_in_the_singular(self):
        assert asked(SeedQueriesConfig(rows=9), attempt(document=DOCUMENT), small=True).endswith(
            "Write one specific question that the text above answers."
        )

    def test_a_document_is_cut_at_a_blank(self):
        assert shown_text(SeedDocument("d", None, "one two three", "eng"), 9) == "one two"
        assert shown_text(SeedDocument("d", "T", "one", "eng"), 9) == "T one"
        assert shown_text(SeedDocument("d", None, "x" * 20, "eng"), 9) == "x" * 9


@pytest.mark.parametrize(
    ("options", "query_field"),
    [
        (ShortLongConfig(rows=1), "user_query"),
        (LongLongConfig(rows=1), "input"),
        (ShortShortConfig(rows=1), "input"),
    ],
    ids=lambda value: getattr(value, "family", value),
)
def test_triples_train_with_their_task_as_instruction(options: FamilyConfig, query_field: str):
    one = attempt("eng", "deu", task=TASK)
    answer = {
        query_field: "a cough at night",
        "positive_document": "Asthma often shows at night.",
        "hard_negative_document": "A cough syrup is sold here.",
    }
    (row,) = rows_of(options, answer, one)
    assert (row["query"], row["positive"]) == ("a cough at night", "Asthma often shows at night.")
    assert row["negatives"] == ["A cough syrup is sold here."]
    assert (row["instruction"], row["task_type"]) == (TASK, "retrieval")
    assert row["document_id"] == positive_id("Asthma often shows at night.")
    assert (row["lang"], row["document_lang"]) == ("eng", "deu")
    assert TASK in asked(options, one)
    same = answer | {"hard_negative_document": "ASTHMA often shows at  night."}
    (refused,) = rows_of(options, same, one)
    assert refused.reason == "repeats_itself"
    (stated,) = rows_of(options.model_copy(update={"instruction": "Find it"}), answer, one)
    assert stated["instruction"] == "Find it"


def test_long_documents_keep_their_paragraphs_and_queries_do_not():
    answer = {
        "user_query": "a\nb", "positive_document": "First  line.\n\n Second.", "hard_negative_document": "Other.",
    }  # fmt: skip
    (row,) = rows_of(ShortLongConfig(rows=1), answer, attempt(task=TASK))
    assert (row["query"], row["positive"]) == ("a b", "First line.\nSecond.")


class TestClassification:
    options = ClassificationConfig(rows=1, misleading_labels=3)

    def answer(self, label: str, *labels: str) -> dict[str, Any]:
        return {"input_text": "It broke after a day.", "label": label, "misleading_labels": list(labels)}

    def test_labels_stand_on_the_other_side(self):
        found = self.answer("negative", "neutral", "Neutral", "positive")
        (row,) = rows_of(self.options, found, attempt(task="Classify the sentiment of reviews"))
        assert (row["query"], row["positive"], row["negatives"]) == (
            "It broke after a day.", "negative", ["neutral", "positive"],
        )  # fmt: skip
        assert (row["task_type"], row["instruction"]) == (
            "classification",
            "Classify the sentiment of reviews",
        )

    def test_the_label_is_no_misleading_label(self):
        (row,) = rows_of(self.options, self.answer("bad", "Bad", "good", "good"), attempt(task="t"))
        assert row["negatives"] == ["good"]
        (refused,) = rows_of(self.options, self.answer("bad", "Bad", "bad", "BAD"), attempt(task="t"))
        assert refused.reason == "repeats_itself"
        (empty,) = rows_of(self.options, self.answer("bad", "good", "-", "x"), attempt(task="t"))
        assert empty.reason == "empty"

    def test_as_many_misleading_labels_as_stated_are_asked_for(self):
        assert "list of 3 different strings" in asked(self.options, attempt(task="t"))


def test_sts_states_its_target_scores_and_keeps_them_on_the_row():
    answer = {"S1": "A man plays a guitar.", "S2": "A man is playing guitar.", "S3": "A man sings."}
    (row,) = rows_of(STSConfig(rows=1), answer, attempt())
    assert (row["query"], row["positive"], row["negatives"]) == (answer["S1"], answer["S2"], [answer["S3"]])
    assert (row["task_type"], row["instruction"]) == ("sts", DEFAULT_INSTRUCTIONS["sts"])
    drawn = json.loads(row["attributes"])
    assert drawn["score_near"] in ("4", "4.5", "5") and drawn["score_far"] in ("2.5", "3", "3.5")
    assert f"similarity of S1 and S2 is {drawn['score_near']}." in asked(STSConfig(rows=1), attempt())
    (refused,) = rows_of(STSConfig(rows=1), answer | {"S3": "a man plays a GUITAR."}, attempt())
    assert refused.reason == "repeats_itself"


def test_a_bitext_that_was_not_translated_is_refused():
    options = BitextConfig(rows=1, document_languages={"fra": 1})
    answer = {"S1": "Two cats sleep.", "S2": "Deux chats dorment.", "S3": "Trois chats dorment."}
    (row,) = rows_of(options, answer, attempt("eng", "fra"))
    assert (row["task_type"], row["document_lang"]) == ("bitext", "fra")
    (refused,) = rows_of(options, answer | {"S2": "two cats sleep."}, attempt("eng", "fra"))
    assert refused.reason == "untranslated"
    (twice,) = rows_of(options, answer | {"S3": "Deux chats dorment."}, attempt("eng", "fra"))
    assert twice.reason == "repeats_itself"


class TestTranslation:
    def test_a_translated_query_keeps_its_document(self):
        one = attempt("deu", "deu", pair=PAIR)
        (row,) = rows_of(TranslationConfig(rows=1), {"query": "ein Feld sortieren"}, one)
        assert (row["query"], row["document_id"], row["positive"]) == (
            "ein Feld sortieren",
            "d7",
            PAIR["positive"],
        )
        assert (row["lang"], row["document_lang"]) == ("deu", "eng")
        assert (row["instruction"], row["negatives"]) == ("Find the function", ["numpy.cos"])
        (refused,) = rows_of(TranslationConfig(rows=1), {"query": "Sort an array"}, one)
        assert refused.reason == "untranslated"

    def test_both_sides_make_a_pair_of_their_own(self):
        options = TranslationConfig(rows=1, sides="both")
        answer = {"query": "ein Feld sortieren", "document": "numpy.sort gibt eine Kopie zurück."}
        (row,) = rows_of(options, answer, attempt("deu", "deu", pair=PAIR))
        assert row["positive"] == answer["document"]
        assert row["document_id"] == positive_id(answer["document"])
        assert (row["document_lang"], row["negatives"]) == ("deu", None)
        text = asked(options, attempt("deu", "deu", pair=PAIR))
        assert "from English into German" in text and PAIR["positive"] in text


class TestTasks:
    options = ShortLongConfig(rows=1, tasks_per_answer=3, max_task_characters=60)

    def test_tasks_are_cleaned_and_told_apart(self):
        found = tasks_of(
            {"tasks": ["Given a  name, find it.", "given a name, FIND it", "x" * 61]}, self.options
        )
        assert found[0] == "Given a name, find it"
        assert [one.reason for one in found[1:] if isinstance(one, Reject)] == ["duplicate", "too_long"]

    def test_as_many_are_asked_for_as_one_answer_holds(self):
        ask = ask_tasks(attempt(), tasks_prompt(self.options, small=False), self.options)
        assert "a list of 3 potentially useful text retrieval tasks" in ask.messages[-1]["content"]
        assert ask.json_schema["properties"]["tasks"]["minItems"] == 3
        assert ask.json_schema["properties"]["tasks"]["items"]["maxLength"] == 61


def test_draws_are_fixed_by_the_seed_and_even():
    choices = ["a", "b", "c"]
    found = [draw(seed, "tone", choices) for seed in range(3000)]
    assert found == [draw(seed, "tone", choices) for seed in range(3000)]
    # 1,000 expected each; five standard deviations are 129.
    assert all(871 < found.count(choice) < 1129 for choice in choices)
    assert found != [draw(seed, "length", choices) for seed in range(3000)]


def test_an_attempt_without_its_source_is_a_programming_error():
    prompt = family_prompt(STSConfig(rows=1), small=False)
    for name, options in (
        ("seed_queries", SeedQueriesConfig(rows=1)),
        ("short_long", ShortLongConfig(rows=1)),
    ):
        with pytest.raises(ValueError, match="attempt-1"):
            FAMILIES[name].ask(attempt(), prompt, options)
