"""From what a model was trained with to the prompts of its contract; every right value is worked out by hand."""

import json

import pytest

from embedloom.core.prompting import DEFAULT_INSTRUCTIONS, NamedTask, PromptContract
from embedloom.core.trained_prompts import (
    MAX_TASKS,
    Prompt,
    PromptCounter,
    TrainedPrompt,
    check_default,
    merged_contract,
    prompt_lines,
    reader_prompts,
    source_prompts,
    trained_contract,
    with_default,
)
from embedloom.errors import DataError

FIND, FAQ = "Find the function", "Find the answer"


def trained(*rows):
    """(task type, instruction, document instruction, name, queries) each."""
    return [TrainedPrompt(Prompt(*row[:3]), row[3], row[4]) for row in rows]


def after(*rows, contract=None):
    found = trained(*rows)
    return trained_contract(contract or PromptContract(), found, sum(one.queries for one in found))


def test_one_instruction_becomes_the_default_and_has_a_name():
    contract = after(("retrieval", FIND, "", "docs", 10))
    assert contract.format("sort", "query") == f"Instruct: {FIND}\nQuery: sort"
    assert contract.format("sort", "query", "docs") == contract.format("sort", "query", "retrieval")
    assert contract.format("a text", "document") == "a text"
    assert contract.tasks == {"docs": NamedTask(task_type="retrieval", instruction=FIND, share=1.0)}


def test_of_two_instructions_the_larger_share_is_the_default_and_both_have_names():
    contract = after(("retrieval", FIND, "", "docs", 30), ("retrieval", FAQ, "", "faq", 70))
    assert contract.instructions["retrieval"] == FAQ
    assert {name: task.share for name, task in contract.tasks.items()} == {"docs": 0.3, "faq": 0.7}
    assert contract.format("x", "query", "docs") == f"Instruct: {FIND}\nQuery: x"
    assert contract.is_default("faq") and not contract.is_default("docs")


def test_stages_and_sources_with_one_instruction_count_together():
    """Stage one 60 of FIND; stage two 50 of FAQ by two sources and 5 of FIND: 65 against 50."""
    contract = after(
        ("retrieval", FIND, "", "one", 60),
        ("retrieval", FAQ, "", "two", 20), ("retrieval", FAQ, "", "three", 30), ("retrieval", FIND, "", "two", 5),
    )  # fmt: skip
    assert contract.instructions["retrieval"] == FIND
    assert set(contract.tasks) == {"one", "three"}  # each called after whoever has most of it
    assert contract.tasks["one"].share == pytest.approx(65 / 115, abs=1e-6)


def test_task_types_that_shared_a_text_with_a_trained_one_follow_it_and_the_others_stay():
    contract = after(("retrieval", FIND, "", "docs", 1))
    assert contract.instructions["reranking"] == contract.instructions["instruction_reranking"] == FIND
    assert {k: contract.instructions[k] for k in ("sts", "bitext", "clustering")} == {
        k: DEFAULT_INSTRUCTIONS[k] for k in ("sts", "bitext", "clustering")
    }


def test_labels_stay_bare_as_they_were_trained_and_texts_that_stand_opposite_are_alike():
    contract = after(
        ("classification", "Which intent?", "", "bank", 9), ("sts", "Alike?", "Alike?", "pairs", 1)
    )
    assert contract.format("my card", "query", "classification") == "Instruct: Which intent?\nQuery: my card"
    assert contract.format("card_lost", "document", "classification") == "card_lost"
    assert (
        contract.format("a", "document", "sts")
        == contract.format("a", "query", "sts")
        == "Instruct: Alike?\nQuery: a"
    )


def test_documents_with_an_instruction_of_their_own_keep_it():
    contract = after(("retrieval", FIND, "Store the passage", "docs", 2), ("retrieval", FAQ, "", "faq", 1))
    assert contract.format("d", "document") == "Instruct: Store the passage\nQuery: d"
    assert contract.format("d", "document", "faq") == "d"
    assert contract.format("q", "query", instruction="Mine") == "Instruct: Mine\nQuery: q"


def test_a_model_that_was_never_trained_to_search_takes_texts_for_what_it_was_trained_for():
    contract = after(("sts", "Alike?", "Alike?", "pairs", 6), ("classification", "Which?", "", "bank", 5))
    assert contract.default_task == "sts"
    assert contract.format("a", "query") == contract.format("a", "document") == "Instruct: Alike?\nQuery: a"
    assert after(("sts", "Alike?", "Alike?", "p", 9), ("retrieval", FIND, "", "d", 1)).default_task is None


def test_a_template_without_a_place_for_the_task_leaves_the_contract_as_it_is():
    plain = PromptContract(template="{text}")
    assert after(("retrieval", FIND, "", "docs", 1), contract=plain) is plain


def test_thousands_of_instructions_are_counted_and_the_most_frequent_named():
    counter = PromptCounter()
    for number in range(3000):
        counter.add(Prompt("retrieval", f"Find {number}", ""), "synthetic")
    for _ in range(50):
        counter.add(Prompt("retrieval", FIND, ""), "synthetic")
    counted = json.loads(json.dumps(counter.as_json()))
    assert len(counted["kept"]) == 1000 and counted["others"] == 3050 - 50 - 999
    found = source_prompts(counted, "own", by_dataset=True, queries=305.0)
    contract = trained_contract(PromptContract(), found, 305.0)
    assert len(contract.tasks) == MAX_TASKS and contract.instructions["retrieval"] == FIND
    assert contract.tasks["synthetic"].share == pytest.approx(50 / 3050, abs=1e-6)
    assert set(contract.tasks) == {"synthetic", *(f"synthetic-{n}" for n in range(2, MAX_TASKS + 1))}


def test_a_name_that_is_a_task_type_gets_a_number():
    assert set(after(("sts", "Alike?", "Alike?", "sts", 1)).tasks) == {"sts-2"}


def test_hashes_do_not_change_by_names_and_shares_of_defaults_and_do_by_any_other_prompt():
    assert PromptContract().hash == "f67b36a9d5591f17"  # as before named tasks existed
    asked = "Given a question, retrieve passages that answer the question"
    assert after(("retrieval", asked, "", "any", 5)).hash == "f67b36a9d5591f17"
    one = after(("retrieval", FIND, "", "docs", 7), ("retrieval", FAQ, "", "faq", 3))
    assert one.hash == after(("retrieval", FIND, "", "renamed", 6), ("retrieval", FAQ, "", "faq", 4)).hash
    assert one.hash != after(("retrieval", FIND, "", "docs", 7)).hash
    assert one.hash != after(("retrieval", FIND, "", "docs", 7), ("retrieval", FAQ, "", "other", 3)).hash


def test_a_contract_with_tasks_survives_its_file(tmp_path):
    contract = after(("retrieval", FIND, "D", "docs", 2), ("sts", "Alike?", "Alike?", "pairs", 1))
    contract.save(tmp_path)
    assert PromptContract.load(tmp_path) == contract
    PromptContract().save(tmp_path)
    stored = json.loads((tmp_path / "contract.json").read_text())
    assert not {"tasks", "default_task", "document_instructions"} & set(stored)


@pytest.mark.parametrize(
    "tasks",
    [{"sts": {"task_type": "sts", "instruction": "x"}}, {"a": {"task_type": "b", "instruction": "x"}}],
)
def test_a_file_whose_tasks_cannot_be_told_apart_is_refused(tasks):
    with pytest.raises(DataError, match="tasks"):
        PromptContract.parse(json.dumps({"tasks": tasks}).encode(), "contract.json")


def test_an_unknown_task_is_refused_on_both_sides_with_the_names():
    contract = after(("retrieval", FIND, "", "docs", 1))
    for side in ("query", "document"):
        with pytest.raises(DataError, match=r"'dogs' is unknown; allowed: .*'retrieval'.*'docs'"):
            contract.format("x", side, "dogs")


# --- merging


def test_merged_models_have_all_tasks_and_the_default_of_the_larger_weighted_share():
    """FIND: 1/4 x 1.0 + 3/4 x 0.2 = 0.4; FAQ: 3/4 x 0.8 = 0.6."""
    one = after(("retrieval", FIND, "", "docs", 10))
    two = after(("retrieval", FIND, "", "docs", 2), ("retrieval", FAQ, "", "faq", 8))
    merged = merged_contract({"one": one, "two": two}, [0.25, 0.75])
    assert merged.instructions["retrieval"] == FAQ
    assert {name: task.share for name, task in merged.tasks.items()} == {"docs": 0.4, "faq": 0.6}
    assert merged_contract({"one": one, "two": two}, [0.9, 0.1]).instructions["retrieval"] == FIND


def test_one_name_for_two_instructions_gets_a_number():
    one, two = (after(("retrieval", text, "", "docs", 1)) for text in (FIND, FAQ))
    merged = merged_contract({"one": one, "two": two}, [2, 1])
    assert {name: task.instruction for name, task in merged.tasks.items()} == {"docs": FIND, "docs-2": FAQ}


def test_what_one_model_was_trained_for_goes_before_what_the_other_only_says():
    search = after(("retrieval", FIND, "", "docs", 1))
    alike = after(("sts", "Alike?", "Alike?", "pairs", 1))
    merged = merged_contract({"search": search, "alike": alike}, [1, 9])
    assert (merged.instructions["retrieval"], merged.instructions["sts"]) == (FIND, "Alike?")
    assert merged.default_task is None


def test_models_without_tasks_that_differ_are_named_after_themselves():
    one = PromptContract()
    two = PromptContract(instructions={**DEFAULT_INSTRUCTIONS, "bitext": "Translate"})
    merged = merged_contract({"one": one, "two": two}, [1, 2])
    assert merged.instructions["bitext"] == "Translate" and set(merged.tasks) == {"one", "two"}
    assert merged_contract({"one": one, "other": one}, [1, 1]) == one


def test_a_model_that_counts_nothing_gives_no_task():
    one, two = (after(("retrieval", text, "", "docs", 1)) for text in (FIND, FAQ))
    assert set(merged_contract({"one": one, "two": two}, [1, 0]).tasks) == {"docs"}


def test_a_first_model_that_counts_nothing_decides_no_untrained_prompt():
    """Lengths stay the first model's, as a merge says of them."""
    odd = {**DEFAULT_INSTRUCTIONS, "sts": "Odd"}
    zero = PromptContract(
        instructions=odd, document_instructions={"bitext": "Odd"}, default_task="sts", max_query_tokens=99
    )
    trained_one = after(("retrieval", FIND, "", "docs", 1))
    merged = merged_contract({"zero": zero, "one": trained_one}, [0, 1])
    assert merged == trained_one.model_copy(update={"max_query_tokens": 99})
    assert merged_contract({"zero": zero, "one": PromptContract()}, [0, 1]) == PromptContract(
        max_query_tokens=99
    )


@pytest.mark.parametrize(("weight", "default"), [(0.7, FIND), (0.5, FIND), (0.4, FAQ)])
def test_a_model_that_names_no_tasks_counts_whole_for_its_prompt_of_retrieval(weight, default):
    """Exported by a version that named none. Of the newer model four fifths are FAQ: 0.8 x 0.6 = 0.48 against 0.4."""
    older = PromptContract(instructions={**DEFAULT_INSTRUCTIONS, "retrieval": FIND})
    newer = after(("retrieval", FAQ, "", "faq", 8), ("sts", "Alike?", "Alike?", "pairs", 2))
    merged = merged_contract({"older": older, "newer": newer}, [weight, 1 - weight])
    shares = {name: task.share for name, task in merged.tasks.items()}
    assert merged.instructions["retrieval"] == default and merged.instructions["sts"] == "Alike?"
    assert shares == pytest.approx({"older": weight, "faq": 0.8 * (1 - weight), "pairs": 0.2 * (1 - weight)})


def test_the_config_may_choose_the_default_and_nothing_unknown():
    contract = after(("retrieval", FIND, "", "docs", 7), ("retrieval", FAQ, "", "faq", 3))
    chosen = with_default(contract, "faq")
    assert (
        chosen.format("x", "query") == f"Instruct: {FAQ}\nQuery: x"
        and chosen.instructions["reranking"] == FAQ
    )
    assert chosen.hash != contract.hash
    check_default(chosen, "faq", "merged")
    check_default(contract, None, "merged")
    with pytest.raises(DataError, match=rf"'{FAQ}', but the default of merged is '{FIND}'"):
        check_default(contract, "faq", "merged")
    with pytest.raises(DataError, match=r"default_task: 'fax' is unknown; allowed: .*'faq'"):
        with_default(contract, "fax")
    pairs = after(("retrieval", FIND, "", "docs", 7), ("sts", "Alike?", "Alike?", "pairs", 3))
    assert with_default(pairs, "pairs").format("x", "document") == "Instruct: Alike?\nQuery: x"


# --- what others read


def test_readers_find_the_prompts_of_both_sides_and_of_every_task():
    contract = after(("retrieval", FIND, "D", "docs", 7), ("sts", "Alike?", "Alike?", "pairs", 3))
    prompts = reader_prompts(contract)
    assert prompts == {
        "query": f"Instruct: {FIND}\nQuery: ", "document": "Instruct: D\nQuery: ",
        "docs": f"Instruct: {FIND}\nQuery: ", "docs-document": "Instruct: D\nQuery: ",
        "retrieval": f"Instruct: {FIND}\nQuery: ", "retrieval-document": "Instruct: D\nQuery: ",
        "pairs": "Instruct: Alike?\nQuery: ", "sts": "Instruct: Alike?\nQuery: ",
    }  # fmt: skip
    assert reader_prompts(PromptContract(template="{text}")) == {"query": "", "document": ""}


def test_the_table_shows_every_task_its_share_and_what_is_default():
    contract = after(("retrieval", FIND, "", "docs", 7), ("retrieval", FAQ, "", "faq|two", 3))
    rows = [[cell.strip() for cell in line.split(" | ")] for line in prompt_lines(contract)[2:]]
    assert rows == [
        ["| docs", "retrieval", FIND, "none", "70 %", "of all |"],
        ["| faq\\|two", "retrieval", FAQ, "none", "30 %", "|"],
    ]
    assert len(prompt_lines(PromptContract())) == 2 + len(DEFAULT_INSTRUCTIONS)
