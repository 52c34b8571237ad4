from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from embedloom.config.data import SynthesisConfig
from embedloom.records import content_id, table_from_rows
from embedloom.synthesis.prompt import load_prompt
from embedloom.synthesis.worker import Recipe, SynthesisWorker, build_request, pair_id, shown_text
from fakes_engines import FakeEngine

CONFIG = SynthesisConfig(generators=({"model": "m"},), documents=4, max_document_characters=50)
RECIPE = Recipe("m", 42, load_prompt("seed_query"), CONFIG)


def document(text: str, title: str | None = None, lang: str | None = None) -> dict[str, str | None]:
    return {"id": content_id(text), "text": text, "title": title, "lang": lang, "source": "s"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two", "one two"),
        ("one two th", "one two th"),
        ("one two three", "one two"),  # the limit falls inside "three"
        ("one two th ree", "one two th"),  # the limit falls on a blank
        ("unbreakable", "unbreakabl"),
    ],
)
def test_documents_are_cut_between_words(text: str, shown: str):
    assert shown_text(document(text), 10) == shown


def test_a_title_is_part_of_the_text():
    assert shown_text(document("body", title="Title"), 50) == "Title body"


def test_ids_and_seeds_depend_on_everything_but_the_text_written():
    one = document("one")
    request = build_request(one, RECIPE)
    assert request.id == pair_id(one["id"], RECIPE, 0) == content_id(one["id"], "m", RECIPE.prompt.hash, "0")
    assert build_request(one, RECIPE) == request
    assert 0 <= request.seed < 2**31
    other_run = build_request(one, replace(RECIPE, seed=43))
    assert (other_run.id, other_run.seed != request.seed) == (request.id, True)
    assert build_request(one, replace(RECIPE, generator="n")).id != request.id
    assert build_request(document("two"), RECIPE).seed != request.seed


def work(texts: list[dict[str, str | None]], recipe: Recipe) -> dict[str, pa.Table]:
    arguments = {
        "model_folder": Path(),
        "max_model_tokens": 9,
        "threads": 1,
        "gpu": False,
        "tensor_parallel": 1,
    }
    return SynthesisWorker(FakeEngine, arguments, recipe)(table_from_rows("documents", texts))


def test_a_shard_becomes_pairs_and_rejects_that_add_up():
    tables = work(
        [document("alpha", lang="deu"), document("beta refuse"), document("gamma ramble"), document("delta")],
        RECIPE,
    )
    assert list(tables) == ["rejects", "pairs"], "pairs mark a shard as done, so they come last"
    pairs = tables["pairs"].to_pylist()
    first = document("alpha")
    assert pairs[0] == {
        "id": content_id(first["id"], "m", RECIPE.prompt.hash, "0"),
        "query": f"What does alpha do in case {build_request(first, RECIPE).seed}-0?",
        "document_id": first["id"],
        "positive": None,
        "negatives": None,
        "task_type": "retrieval",
        "instruction": RECIPE.prompt.instruction,
        "lang": "deu",
        "document_lang": "deu",
        "origin": "synthetic",
        "generator": "m",
        "prompt_hash": RECIPE.prompt.hash,
    }
    assert [pairs[1]["lang"], pairs[1]["document_lang"]] == ["eng", "eng"]
    assert [row["reason"] for row in tables["rejects"].to_pylist()] == ["engine_error", "truncated"]
    # Two answers of 7 and 5 tokens, one cut at max_new_tokens, one refused.
    assert tables["pairs"].schema.metadata == {
        b"documents": b"4",
        b"prompt_tokens": b"21",
        b"output_tokens": b"74",
    }


def test_several_queries_a_document_have_ids_by_number():
    recipe = replace(
        RECIPE, config=CONFIG.model_copy(update={"queries_per_document": 3, "instruction": "Find it"})
    )
    tables = work([document("alpha"), document("beta mumble")], recipe)
    pairs, rejects = tables["pairs"].to_pylist(), tables["rejects"].to_pylist()
    assert [row["id"] for row in pairs] == [pair_id(content_id("alpha"), recipe, n) for n in range(3)]
    assert [row["id"] for row in rejects] == [pair_id(content_id("beta mumble"), recipe, n) for n in range(3)]
    assert {row["instruction"] for row in pairs} == {"Find it"}


def test_a_shard_without_one_good_query_is_still_a_table():
    tables = work([document("refuse")], RECIPE)
    assert (tables["pairs"].num_rows, tables["rejects"].num_rows) == (0, 1)
