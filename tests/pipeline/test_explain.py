"""embedloom explain: the tree of a run and the chain of a row."""

import pytest

from embedloom.core.artefacts import Artefact
from embedloom.core.prompting import PromptContract
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.core.trained_prompts import Prompt, TrainedPrompt, trained_contract
from embedloom.errors import DataError
from embedloom.pipeline.lineage import explain
from fakes_run import begin, make_run


@pytest.fixture
def run(tmp_path) -> Place:
    return make_run(tmp_path / "quick")


def first_id(run: Place, folder: str, kind: str) -> str:
    name, _, path = folder.partition("/")
    return str(run.child(name).read_tables(path, kind).column("id")[0].as_py())


def test_merged_model_leads_back_to_the_corpus(run):
    lines = explain(run, None).splitlines()
    depth = {line.split()[0]: (len(line) - len(line.lstrip())) // 4 for line in reversed(lines)}
    assert depth == {
        "merged": 0, "training/a/finetune": 1, "training/b/finetune": 1, "training/a/pretrain": 2,
        "training/b/pretrain": 2, "examples": 2, "mining": 3, "encoder": 3, "synthesis": 4, "corpus": 3,
    }  # fmt: skip
    assert lines[0].startswith(
        f"merged  {Artefact.open(run.child('merged')).fingerprint}  method linear, tensors 9, built "
    )
    assert sum("(see above)" in line for line in lines) == 6  # examples thrice, corpus twice, encoder once


def test_an_input_rebuilt_or_deleted_since_is_said(run):
    begin(run, "mining", "mining").commit({"rows": 2})
    run.child("encoder").remove()
    text = explain(run, None)
    now = Artefact.open(run.child("mining")).fingerprint
    assert f"was rebuilt since, now {now}" in text
    assert "encoder" in text
    assert "no longer there" in text


def test_without_a_merged_model_the_tree_starts_at_what_is_furthest_along(run):
    run.child("merged").remove()
    run.child("evaluation").remove()
    roots = [line.split()[0] for line in explain(run, None).splitlines() if not line.startswith(" ")]
    assert roots == ["training/a/finetune", "training/b/finetune"]


def test_pair_id_leads_to_its_document_prompt_and_generator(run):
    text = explain(run, first_id(run, "synthesis/pairs", "pairs"))
    assert "generator    smol, prompt p123" in text
    assert "origin       synthetic" in text
    assert "document  doc-zip  in corpus/documents/train/part-000000.parquet:0" in text
    assert "source       tiny:zip" in text


def test_example_id_shows_teacher_scores_candidates_and_source(run):
    text = explain(run, first_id(run, "examples/examples", "examples"))
    assert "positive     0.75000  the positive" in text
    assert "negative     0.50000  a negative" in text
    assert "teacher      minilm-l6, contract c123, 2 kept" in text
    assert "0.25000  doc-http" in text
    assert text.index("example  ") < text.index("pair  ") < text.index("document  doc-zip")


def test_document_id_shows_its_source_and_every_pair_made_from_it(run):
    text = explain(run, "doc-zip")
    assert "source       tiny:zip" in text
    assert "pairs        2" in text
    assert "synthetic by smol, prompt p123  How do I zip a folder?" in text


def test_rejected_id_shows_the_reason(run):
    assert "rejected  doc-sort  in synthesis/rejects/part-000000.parquet:0: not_json" in explain(
        run, "doc-sort"
    )


def test_unknown_id_and_empty_folder_are_refused(run, tmp_path):
    with pytest.raises(DataError, match="no document, pair or example has the id 'nobody'"):
        explain(run, "nobody")
    with pytest.raises(DataError, match="no finished artefact"):
        explain(Place(str(tmp_path / "empty")), None)


def test_rescored_candidates_stand_beside_the_teachers(run):
    mining = Artefact.open(run.child("mining"))
    row = {
        **mining.place.read_tables("candidates").to_pylist()[0],
        "document_ids": ["doc-http"], "scores": [0.875], "teacher": "cross", "contract_hash": "c9",
    }  # fmt: skip
    out = begin(run, "rescoring", "rescoring", mining=mining)
    out.place.write_table("candidates/part-000000.parquet", table_from_rows("candidates", [row]))
    out.commit({"rows": 1})
    text = explain(run, row["query_id"])
    assert text.index("teacher      minilm-l6, contract c123, 2 kept") < text.index(
        "teacher      cross, contract c9, 1 kept"
    )
    assert "0.87500  doc-http" in text


def test_the_models_prompts_are_told_with_their_default(run):
    trained = [
        TrainedPrompt(Prompt("retrieval", "Find the function", ""), "docs", 3.0),
        TrainedPrompt(Prompt("retrieval", "Find the answer", ""), "faq", 1.0),
    ]
    trained_contract(PromptContract(), trained, 4.0).save(run.child("merged").local)
    text = explain(run, None)
    assert "| docs | retrieval | Find the function | none | 75 % | of all |" in text
    assert "| faq | retrieval | Find the answer | none | 25 % |  |" in text
    assert "Find the" not in explain(run, "doc-zip")  # a row is another subject
