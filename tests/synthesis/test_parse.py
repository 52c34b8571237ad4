import json

import pytest

from embedloom.engines.protocol import GenerationResult
from embedloom.synthesis.parse import REJECT_REASONS, Reject, parse_queries

DOCUMENT = (
    "Sort an array along an axis. How stable the sort is depends on its kind. The default is quicksort."
)
TEMPLATES = ["{document}\n\nWrite one specific question that the text above answers.", "short line"]


def answer(text: str, finish_reason: str = "stop") -> GenerationResult:
    return GenerationResult("id", text, finish_reason, 20, 10)


def parse(result: GenerationResult, count: int = 1, max_characters: int = 60) -> list[str | Reject]:
    return parse_queries(result, count, DOCUMENT, TEMPLATES, max_characters)


def test_a_query_is_taken_with_its_blanks_collapsed():
    assert parse(answer('{"query": "  How do I\\n sort an\\tarray? "}')) == ["How do I sort an array?"]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (GenerationResult("id", "", "error", 900, 0, "prompt has 900 tokens"), "engine_error"),
        (answer('{"query": "How do I so', "length"), "truncated"),
        (answer("How do I sort an array?"), "invalid_json"),
        (answer(""), "invalid_json"),
        (answer('["How do I sort an array?"]'), "missing_field"),
        (answer('{"question": "How do I sort an array?"}'), "missing_field"),
        (answer('{"query": null}'), "missing_field"),
        (answer('{"query": 7}'), "missing_field"),
        (answer('{"query": ""}'), "empty"),
        (answer('{"query": "  ... 12 ?"}'), "empty"),
        (answer(json.dumps({"query": "Why " + "so " * 19 + "?"})), "too_long"),  # 4 + 57 + 1 = 62
        (answer('{"query": "how stable the sort is depends on its KIND?"}'), "copies_document"),
        (answer('{"query": "The default is quicksort"}'), "copies_document"),
        (answer('{"query": "the text above"}'), "echoes_prompt"),
        (answer('{"query": "Write one specific question that the text above answers."}'), "echoes_prompt"),
        (answer('{"query": "How \\ud800 is this?"}'), "invalid_json"),
        (answer('{"query": "How \\u0000 is this?"}'), "invalid_json"),
    ],
)
def test_rejects_are_named(result: GenerationResult, reason: str):
    (outcome,) = parse(result)
    assert isinstance(outcome, Reject)
    assert outcome.reason == reason
    assert reason in REJECT_REASONS
    outcome.detail.encode()


def test_complete_json_at_the_token_limit_is_kept():
    assert parse(answer('{"query": "How do I sort an array?"}', "length")) == ["How do I sort an array?"]


def test_a_limit_is_the_longest_query_that_is_kept():
    query = "Why is it?"
    result = answer(json.dumps({"query": query}))
    assert parse(result, max_characters=10) == [query]
    assert [outcome.reason for outcome in parse(result, max_characters=9) if isinstance(outcome, Reject)] == [
        "too_long"
    ]


def test_a_prompts_short_line_inside_a_query_is_chance():
    assert parse(answer('{"query": "How do I draw a short line?"}')) == ["How do I draw a short line?"]


def test_joiners_that_languages_need_are_kept():
    query = (
        "Was ist ein Auf\u200clage-Wert?"  # a zero-width non-joiner, as Persian and German typesetting use
    )
    assert parse(answer(json.dumps({"query": query}))) == [query]


def test_of_several_queries_each_is_judged_alone():
    queries = ["How do I sort an array?", "how do i SORT an array", 3, "Which kind of sort is stable?"]
    outcomes = parse(answer(json.dumps({"queries": queries})), count=5)
    assert [outcome.reason if isinstance(outcome, Reject) else outcome for outcome in outcomes] == [
        "How do I sort an array?",
        "duplicate",
        "missing_field",
        "Which kind of sort is stable?",
        "missing_field",  # four came, five were asked for
    ]


def test_more_queries_than_asked_for_are_cut():
    queries = [f"What is number {n} for?" for n in range(5)]
    assert parse(answer(json.dumps({"queries": queries})), count=2) == queries[:2]


def test_a_lost_answer_rejects_every_query_asked_for():
    outcomes = parse(answer("{"), count=3)
    assert [outcome.reason for outcome in outcomes if isinstance(outcome, Reject)] == ["invalid_json"] * 3
    assert [len(o.detail) for o in parse(answer("x" * 5000)) if isinstance(o, Reject)] == [200]
