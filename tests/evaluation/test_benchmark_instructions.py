"""Which instruction and side the texts of mteb's tasks get."""

import json
from pathlib import Path

import mteb
import pytest
from mteb.types import PromptType

from embedloom.core.prompting import PromptContract
from embedloom.evaluation.texts import Role, _table, role_of

PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "leaderboard" / "tasks_prompts.json"
CONTRACT = PromptContract()


def role(name, prompt_type=None):
    return role_of(mteb.get_task(name).metadata, prompt_type, CONTRACT)


def test_every_task_of_the_benchmark_has_an_instruction_and_no_other_has():
    names = {task.metadata.name for task in mteb.get_benchmark("MTEB(Multilingual, v2)").tasks}
    assert set(_table()["instructions"]) == names
    assert set(_table()["symmetric"]) <= names


@pytest.mark.parametrize(
    ("name", "prompt_type", "expected"),
    [
        # the table
        ("SCIDOCS", PromptType.query, ("query", "retrieval", "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper")),
        ("SCIDOCS", PromptType.document, ("document", "retrieval", None)),
        # ArguAna is symmetric: documents are formatted as queries
        ("ArguAna", PromptType.query, ("query", "retrieval", "Given a claim, find documents that refute the claim")),
        ("ArguAna", PromptType.document, ("query", "retrieval", "Given a claim, find documents that refute the claim")),
        ("PoemSentimentClassification", None, ("query", "classification", "Given a poem, categorized by sentiment into positive, no_impact, negative or mixed")),
        # types with one instruction for all tasks, whatever the metadata says
        ("STS22.v2", None, ("query", "sts", None)),
        ("XNLI", None, ("query", "pair_classification", None)),
        ("Tatoeba", None, ("query", "bitext", None)),
        # not in the table: mteb's metadata
        ("Banking77Classification", None, ("query", "classification", "Given a online banking query, find the corresponding intents")),
    ],
)  # fmt: skip
def test_table_then_metadata_then_contract(name, prompt_type, expected):
    assert role(name, prompt_type) == Role(*expected)


@pytest.mark.skipif(not PROMPTS.is_file(), reason="needs the recorded instructions")
def test_formatted_texts_are_those_behind_the_published_scores():
    for recorded in json.loads(PROMPTS.read_text()):
        metadata = mteb.get_task(recorded["name"]).metadata
        for prompt_type, key in (
            (PromptType.query, "query_instruction"),
            (PromptType.document, "document_instruction"),
        ):
            found = role_of(metadata, prompt_type, CONTRACT)
            text = CONTRACT.format("x", found.side, found.task_type, found.instruction)
            expected = f"Instruct: {recorded[key]}\nQuery: x" if recorded[key] else "x"
            assert text == expected, (recorded["name"], key)
