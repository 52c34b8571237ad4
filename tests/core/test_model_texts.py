"""Every text becomes the same model text as before its rules stood in one place: tables, and digests of all combinations.

The digests are of the functions that decided it in five places (the contract, the teachers' templates, the preparation of
training data, given texts and examples of mining), run at commit fe96f8a over the combinations below.
"""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.core.prompting import (
    DEFAULT_INSTRUCTIONS,
    NamedTask,
    PromptContract,
    Templates,
    is_instructed,
    opposite_task_type,
)
from embedloom.core.schemas import TASK_TYPES

TEXT, OWN = "A {task} of {text}", "Own {text}"
CONTRACTS = {
    "default": PromptContract(),
    "plain": PromptContract(template="{text}"),
    "echo": PromptContract(template="{task}: {text}\n{text}"),
    "after": PromptContract(template="[{text}] to {task}!"),
    "foreign": PromptContract(
        template="query: {text}", document_template="passage: {text}", symmetric_template="same: {text}"
    ),
    "foreign_bare": PromptContract(
        template="query: {text}", document_template="{text}", symmetric_template="{text}"
    ),
    "documents": PromptContract(
        document_instructions={"retrieval": "Passage", "sts": "", "classification": "Label"}
    ),
    "named": PromptContract(
        tasks={
            "web": NamedTask(task_type="retrieval", instruction="Search"),
            "topics": NamedTask(task_type="classification", instruction="Topic", document_instruction=""),
            "page": NamedTask(task_type="retrieval", instruction="Find", document_instruction="Page"),
        },
        default_task="topics",
    ),
}
TEMPLATES = {
    "default": Templates(),
    "e5": Templates(query="query: {text}", document="passage: {text}"),
    "instructed": Templates(
        query="Instruct: {instruction}\nQuery: {text}", document="doc {instruction}: {text} </s>"
    ),
    "symmetric": Templates(
        query="q: {text}", document="d: {text}", symmetric="same {instruction}: {text}",
        instructions={**DEFAULT_INSTRUCTIONS, "sts": "Alike"},
    ),
}  # fmt: skip
SIDES = ("query", "document")


def digest(found):
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def asked():
    """Contract by name, task (a type, a name or none) and side, all of them."""
    for name, contract in CONTRACTS.items():
        for task in (None, *TASK_TYPES, *(contract.tasks or {})):
            yield from ((name, contract, task, side) for side in SIDES)


def test_contracts_write_what_they_always_wrote():
    rows = [(*row, instruction) for row in asked() for instruction in (None, OWN)]
    texts = {f"{n}|{task}|{side}|{own}": c.format(TEXT, side, task, own) for n, c, task, side, own in rows}
    prompts = {f"{n}|{task}|{side}|{own}": c.prompt(side, task, own) for n, c, task, side, own in rows}
    before = {f"{n}|{task}|{side}": c.text_before(side, task) for n, c, task, side in asked()}
    assert (len(texts), digest(texts)) == (332, "57ee98902f5e8709")
    assert (len(prompts), digest(prompts)) == (332, "b76514fdb8029172")
    assert (len(before), digest(before)) == (166, "47c26586db7e4129")


@pytest.mark.parametrize(
    ("contract", "task", "side", "instruction", "expected"),
    [
        ("default", "sts", "document", None, f"Instruct: Retrieve semantically similar text\nQuery: {TEXT}"),
        ("default", "retrieval", "document", OWN, TEXT),
        ("documents", "retrieval", "document", OWN, f"Instruct: Passage\nQuery: {TEXT}"),
        ("documents", "sts", "document", None, TEXT),
        ("documents", "classification", "document", None, f"Instruct: Label\nQuery: {TEXT}"),
        ("foreign", "sts", "query", None, f"same: {TEXT}"),
        ("foreign", "retrieval", "document", None, f"passage: {TEXT}"),
        ("named", None, "query", None, f"Instruct: Topic\nQuery: {TEXT}"),
        ("named", None, "document", None, TEXT),
        ("named", "page", "document", OWN, f"Instruct: Page\nQuery: {TEXT}"),
        ("echo", "retrieval", "query", OWN, f"{OWN}: {TEXT}\n{TEXT}"),
    ],
)
def test_a_table_to_read(contract, task, side, instruction, expected):
    assert CONTRACTS[contract].format(TEXT, side, task, instruction) == expected


def test_what_stands_opposite_a_query_in_training():
    found = {
        f"{name}|{task}|{stated}|{own}": contract.format_opposite(TEXT, task, own, stated)
        for name, contract in CONTRACTS.items()
        for task in TASK_TYPES
        for stated in ("", None, "Said")
        for own in (None, OWN)
    }
    # What a base calls a document is called so in training too, as when it is embedded; nothing else has changed.
    documents = {key for key, text in found.items() if text == f"passage: {TEXT}"}
    before = {key: TEXT if key in documents else text for key, text in found.items()}
    assert (len(found), digest(before)) == (432, "b7486cf9aa2122a8")
    assert found[f"default|sts||{OWN}"] == f"Instruct: {OWN}\nQuery: {TEXT}"
    assert {key.split("|")[0] for key in documents} == {"foreign"}
    assert {key.split("|")[1] for key in documents} == {"retrieval", "reranking", "instruction_reranking"}
    assert found["default|retrieval|Said|None"] == f"Instruct: Said\nQuery: {TEXT}"
    bare = ("default|sts|None|None", "default|retrieval||None", "documents|classification||None")
    assert {found[key] for key in bare} == {TEXT}  # as the pair says, a passage, a label


def test_what_stands_opposite_a_query_in_mining():
    labels = ("classification", "multilabel_classification")
    found = {
        task: {
            "given": opposite_task_type(task),
            "example": is_instructed("document", opposite_task_type(task)),
            "id": is_instructed("document", task),
        }
        for task in TASK_TYPES
    }
    assert digest(found) == "3df3058362acc5d7"
    assert {task for task in TASK_TYPES if found[task]["example"]} == {
        "clustering", "sts", "pair_classification", "bitext"
    }  # fmt: skip
    assert {task for task in TASK_TYPES if found[task]["given"] != task} == set(labels)


def test_templates_stand_around_a_text_as_they_always_did():
    found = {
        f"{name}|{task}|{side}|{own}": list(templates.around(side, task, own))
        for name, templates in TEMPLATES.items()
        for task in TASK_TYPES
        for side in SIDES
        for own in (None, "", OWN)
    }
    assert (len(found), digest(found)) == (216, "17dab4999f53fa0c")
    assert found[f"instructed|retrieval|document|{OWN}"] == [f"doc {OWN}: ", " </s>"]


@given(
    text=st.text(), task=st.sampled_from(TASK_TYPES), side=st.sampled_from(SIDES),
    own=st.none() | st.text(min_size=1), before=st.sampled_from(["", "q: ", "Instruct: {task}\nQuery: "]),
    document=st.sampled_from(["", "d: "]), symmetric=st.sampled_from(["", "s: "]),
)  # fmt: skip
def test_templates_and_a_contract_that_say_the_same_write_the_same(
    text, task, side, own, before, document, symmetric
):
    contract = PromptContract(
        template=f"{before}{{text}}", document_template=f"{document}{{text}}",
        symmetric_template=f"{symmetric}{{text}}",
    )  # fmt: skip
    templates = Templates(
        f"{before.replace('{task}', '{instruction}')}{{text}}", f"{document}{{text}}",
        symmetric=f"{symmetric}{{text}}",
    )  # fmt: skip
    left, right = templates.around(side, task, own)
    assert contract.format(text, side, task, own) == f"{left}{text}{right}"
