"""From an engine's text to rows and named rejects."""

import json
from typing import Any

import pytest

from embedloom.compute.generation import GenerationResult
from embedloom.config.synthesis import (
    ExistingQuestionsConfig,
    JudgeCheck,
    QualityConfig,
    SeedQueriesConfig,
    ShortShortConfig,
)
from embedloom.synthesis.checks import build_index
from embedloom.synthesis.families.base import Attempt, Reject, SeedDocument
from embedloom.synthesis.families.registry import FAMILIES, family_prompt
from embedloom.synthesis.families.written import ask_tasks, tasks_prompt
from embedloom.synthesis.judge import judge_ask, judge_grade, judge_prompt
from embedloom.synthesis.rows import REASONS, read_answer, read_extracted, read_tasks

DOCUMENT = SeedDocument(
    "d",
    None,
    "Sort an array along an axis. How stable the sort is depends on its kind. The default is quicksort.",
    "eng",
)
ATTEMPT = Attempt("a", "seed_queries", "llm", 0, "eng", "eng", 1, document=DOCUMENT)


def result(text: str, finish_reason: str = "stop", error: str | None = None) -> GenerationResult:
    return GenerationResult("a", text, finish_reason, 20, 10, error)


def read(answer: GenerationResult, count: int = 1, small: bool = True, **quality: Any) -> list[Any]:
    options = SeedQueriesConfig(rows=1, queries_per_document=count, max_query_characters=60)
    family, prompt = FAMILIES["seed_queries"], family_prompt(options, small)
    ask = family.ask(ATTEMPT, prompt, options)
    return read_answer(answer, ask, ATTEMPT, family, prompt, options, QualityConfig(**quality))


def queries(*texts: Any) -> GenerationResult:
    return result(json.dumps({"queries": list(texts)}))


def test_a_good_answer_is_a_row():
    (row,) = read(queries("How do I sort an array by column?"))
    assert row["query"] == "How do I sort an array by column?"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (result("", "error", "prompt has 900 tokens"), "engine_error"),
        (result('{"queries": ["How do I so', "length"), "truncated"),
        (result("How do I sort an array?"), "invalid_json"),
        (result(""), "invalid_json"),
        (result('["How do I sort an array?"]'), "schema"),
        (result('{"query": "How do I sort an array?"}'), "schema"),
        (queries(), "schema"),
        (queries("a b", "c d"), "schema"),
        (queries(7), "schema"),
        (queries("Why " + "so " * 19 + "?"), "schema"),  # 4 + 57 + 1 = 62, the schema's bound is 61
        (queries("x" * 61), "too_long"),
        (queries("  ... 12 ?"), "empty"),
        (queries("ab"), "too_short"),
        (queries("how stable the sort is depends on its KIND?"), "copies_document"),
        (queries("no placeholders of the author"), None),
        (queries("understandable without the document"), "echoes_prompt"),
        (result('{"queries": ["How \\ud800 is this?"]}'), "unusable_characters"),
        (result('{"queries": ["How \\u0000 is this?"]}'), "unusable_characters"),
        (queries("Wie sortiere ich ein Feld entlang einer Achse?"), "language"),
    ],
)
def test_rejects_are_named(answer: GenerationResult, reason: str | None):
    (outcome,) = read(answer, small=False)
    if reason is None:
        assert not isinstance(outcome, Reject)
        return
    assert isinstance(outcome, Reject)
    assert outcome.reason == reason
    assert outcome.reason in REASONS
    outcome.detail.encode()


def test_a_lost_answer_rejects_every_row_asked_for():
    outcomes = read(result("{"), count=3)
    assert [outcome.reason for outcome in outcomes] == ["invalid_json"] * 3
    assert len(read(result("x" * 5000))[0].detail) == 200


def test_complete_json_at_the_token_limit_is_kept():
    whole = queries("How do I sort an array by column?")
    (row,) = read(result(whole.text, "length"))
    assert not isinstance(row, Reject)


def test_checks_can_be_switched_off():
    (row,) = read(queries("how stable the sort is depends on its KIND?"), small=False, copies=False)
    assert not isinstance(row, Reject)
    (foreign,) = read(queries("Wie sortiere ich ein Feld entlang einer Achse?"), small=False, language=None)
    assert not isinstance(foreign, Reject)


def test_tasks_that_repeat_the_prompt_are_refused():
    options = ShortShortConfig(rows=1, tasks_per_answer=2)
    prompt = tasks_prompt(options, small=False)
    ask = ask_tasks(Attempt("a", "short_short", "llm", 0, "eng", "eng", 1), prompt, options)
    tasks = ["Given a quotation, find the proverb that means the same", "Given a riddle, find its answer"]
    copied, new = read_tasks(result(json.dumps({"tasks": tasks})), ask, prompt, options)
    assert isinstance(copied, Reject) and copied.reason == "echoes_prompt"
    assert new == "Given a riddle, find its answer"
    assert [one.reason for one in read_tasks(result("["), ask, prompt, options) if isinstance(one, Reject)] == [
        "invalid_json", "invalid_json",
    ]  # fmt: skip


def test_extracted_questions_are_held_against_evaluation_texts():
    text = f"{DOCUMENT.text}\n\nQuestion: Which algorithm is the default one? Answer: Quicksort."
    attempt = Attempt("a", "q", "", 0, "eng", "eng", 1, document=SeedDocument("d", None, text, "eng"))
    arguments = (attempt, FAMILIES["existing_questions"], ExistingQuestionsConfig(rows=1), QualityConfig())
    (row,) = read_extracted(*arguments)
    assert row["query"] == "Which algorithm is the default one?"
    (refused,) = read_extracted(*arguments, guard=build_index(["Which algorithm is the default one?"]))
    assert refused.reason == "contamination"
    with pytest.raises(TypeError, match="sts asks an LLM"):
        read_extracted(attempt, FAMILIES["sts"], ExistingQuestionsConfig(rows=1), QualityConfig())


def test_the_judge_grades_by_a_number():
    check = JudgeCheck(model="judge", max_characters=50)
    row = {"query": "q" * 60, "instruction": "Find it", "task_type": "retrieval"}
    ask = judge_ask(row, "THE TEXT", judge_prompt(check), check)
    shown = ask.messages[-1]["content"]
    assert "Task: Find it" in shown and "THE TEXT" in shown and "q" * 50 in shown and "q" * 51 not in shown
    assert judge_grade(result('{"score": 8}'), ask) == 8.0
    bad = judge_grade(result('{"score": 11}'), ask)
    assert isinstance(bad, Reject) and bad.reason == "schema"
