import json

import pytest

from embedloom.core.prompting import PromptContract, document_text
from embedloom.errors import DataError


def test_query_carries_the_instruction_and_document_stays_bare():
    contract = PromptContract()
    assert (
        contract.format("what is dna?", "query", instruction="Find passages")
        == "Instruct: Find passages\nQuery: what is dna?"
    )
    assert contract.format("DNA is a molecule", "document") == "DNA is a molecule"


def test_symmetric_task_types_instruct_both_sides():
    contract = PromptContract()
    assert contract.format("a", "document", "sts") == "Instruct: Retrieve semantically similar text\nQuery: a"


def test_placeholders_inside_a_text_or_instruction_stay_as_they_are():
    contract = PromptContract()
    assert (
        contract.format("{task}", "query", instruction="use {text}") == "Instruct: use {text}\nQuery: {task}"
    )


def test_hash_changes_with_any_field_and_survives_saving(tmp_path):
    contract = PromptContract(max_query_tokens=64)
    assert contract.hash != PromptContract(max_query_tokens=65).hash
    contract.save(tmp_path)
    assert PromptContract.load(tmp_path) == contract
    assert json.loads((tmp_path / "contract.json").read_text())["hash"] == contract.hash


def test_hand_edited_contract_is_refused(tmp_path):
    PromptContract().save(tmp_path)
    stored = json.loads((tmp_path / "contract.json").read_text())
    stored["pooling"] = "cls"
    (tmp_path / "contract.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match="edited by hand"):
        PromptContract.load(tmp_path)


def test_missing_contract_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"contract\.json: missing"):
        PromptContract.load(tmp_path)


def test_unknown_task_type_lists_the_allowed():
    with pytest.raises(DataError, match="'ranking' is unknown; allowed"):
        PromptContract().format("x", "query", "ranking")


def test_document_text_joins_title_and_body():
    assert document_text("Title", "body") == "Title body"
    assert document_text(None, " body ") == "body"


def test_matryoshka_lengths_leave_the_hash_of_contracts_without_them_alone(tmp_path):
    assert PromptContract().hash == "f67b36a9d5591f17"  # as before the field existed
    PromptContract().save(tmp_path)
    assert "matryoshka_dimensions" not in json.loads((tmp_path / "contract.json").read_text())
    stated = PromptContract(matryoshka_dimensions=(64, 128))
    stated.save(tmp_path)
    assert PromptContract.load(tmp_path) == stated
    assert stated.hash != PromptContract().hash
