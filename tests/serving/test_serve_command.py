"""The `serve` verb up to the moment Ray would start."""

import json
import shutil

import httpx
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.core.trained_prompts import Prompt, TrainedPrompt, trained_contract
from embedloom.errors import ConfigError, DataError
from embedloom.pipeline.model_commands import gate_rule, serving_config
from embedloom.serving import stage
from embedloom.serving.app import build_application
from embedloom.serving.schemas import GateVerdict, Lineage

QUICKSTART = "jobs/configs/quickstart.yaml"


def test_options_become_the_section():
    config = serving_config(
        {"model": "m", "corpus": "v", "documents": None, "served_name": "x", "port": 9},
        ["max_items=5", "serving.request_log=none"],
    )
    assert (config.model, config.corpus, config.served_name, config.port) == ("m", "v", "x", 9)
    assert (config.max_items, config.request_log) == (5, "none")
    with pytest.raises(
        ConfigError, match="serve: max_item: unknown key; the nearest valid key is 'max_items'"
    ):
        serving_config({"model": "m"}, ["max_item=5"])


def test_dry_run_says_what_would_be_served_and_where(tiny_model):
    arguments = [
        "serve",
        str(tiny_model),
        "--corpus",
        "vectors",
        "--name",
        "tiny",
        "--port",
        "9",
        "--dry-run",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    words, url = result.stdout.strip().splitlines()
    assert "as 'tiny' and search vectors" in words and url == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--corpus", "v"], "--set serving.corpus=v"),
        (["--name", "x"], "--name goes with a MODEL; with a CONFIG use --set serving.served_name=x"),
    ],
)
def test_options_of_a_model_are_refused_beside_a_config(arguments, words):
    result = CliRunner().invoke(app, ["serve", QUICKSTART, *arguments])
    assert isinstance(result.exception, ConfigError) and words in str(result.exception)


def test_a_model_that_is_not_there_is_named():
    result = CliRunner().invoke(app, ["serve", "./nothing"])
    assert isinstance(result.exception, DataError) and "MODEL: './nothing' does not exist" in str(
        result.exception
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_queued_tokens": 100_000}, "below max_request_tokens"),
        ({"keys_file": "a", "keys_variable": "B"}, "come from one of them"),
        ({"documents": "d"}, "without corpus"),
        ({"query_lane_share": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        ServingConfig(**values)


def vectors_of(model_folder, place: Place) -> Place:
    writer = ArtefactWriter(place, "vectors", "c", {}, "local")
    details = {
        "contract_hash": PromptContract.load(model_folder).hash,
        "model_id": ModelFolder(model_folder).id,
    }
    writer.commit({"rows": 0}, details)
    return place


def test_corpus_is_checked_before_anything_starts(tiny_model, tmp_path):
    place = vectors_of(tiny_model, Place(str(tmp_path / "vectors")))
    serving = ServingConfig(corpus=place.uri, require_gate=False)
    args = {"model_folder": str(tiny_model), "served_name": "t", "serving": serving}
    source = build_application(ApplicationArgs(**args))._bound_deployment.init_args[2]
    assert (source.uri, source.model_id) == (place.uri, ModelFolder(tiny_model).id)
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "added.json").write_text("{}")
    with pytest.raises(DataError, match="vectors of different weights"):
        build_application(ApplicationArgs(**{**args, "model_folder": str(other)}))


def test_only_a_model_of_a_run_must_have_passed_the_gate_unless_told_otherwise(tmp_path):
    foreign, own = tmp_path / "foreign", tmp_path / "own"
    foreign.mkdir()
    ArtefactWriter(Place(str(own)), "model", "c", {}, "local").commit({})
    assert not gate_rule(serving_config({"model": str(foreign)}, []), ModelFolder(foreign)).require_gate
    assert gate_rule(
        serving_config({"model": str(foreign)}, ["require_gate=true"]), ModelFolder(foreign)
    ).require_gate
    assert gate_rule(serving_config({"model": str(own)}, []), ModelFolder(own)).require_gate
    assert not gate_rule(
        serving_config({"model": str(own)}, ["require_gate=false"]), ModelFolder(own)
    ).require_gate


def test_model_card_facts_come_from_the_folder(tmp_path):
    assert Lineage.of(ModelFolder(tmp_path)) is None and GateVerdict.of(ModelFolder(tmp_path)) is None
    ArtefactWriter(Place(str(tmp_path)), "model", "c", {"training": "abc"}, "local").commit({})
    lineage = Lineage.of(ModelFolder(tmp_path))
    assert (lineage.kind, lineage.inputs) == ("model", {"training": "abc"})
    (tmp_path / "gate.json").write_text(
        json.dumps({"verdict": "refused", "reasons": ["sts fell"], "weights": "x"})
    )
    assert GateVerdict.of(ModelFolder(tmp_path)).model_dump() == {
        "verdict": "refused",
        "reasons": ["sts fell"],
    }
    for content in ("[]", "{}", "no"):
        (tmp_path / "gate.json").write_text(content)
        with pytest.raises(DataError, match="not a verdict of the gate"):
            GateVerdict.of(ModelFolder(tmp_path))


def test_a_task_is_asked_for_only_beside_a_question():
    for arguments in (["serve", QUICKSTART, "--task", "sts"], ["serve", "minilm-l6", "--task", "sts"]):
        result = CliRunner().invoke(app, [*arguments, "--dry-run"])
        assert result.exit_code != 0 and "--ask" in str(result.exception)


def test_a_mode_is_asked_for_only_beside_a_question_and_is_one_of_three():
    for arguments in (["serve", QUICKSTART, "--mode", "hybrid"], ["serve", "minilm-l6", "--mode", "hybrid"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code != 0 and "--ask" in str(result.exception)
    result = CliRunner().invoke(app, ["serve", QUICKSTART, "--ask", "Why?", "--mode", "bm25"])
    assert "--mode: 'bm25'; allowed: dense, lexical, hybrid" in str(result.exception)


def test_a_question_by_mode_is_the_endpoints_own_search(monkeypatch):
    sent = []

    def ask(url, seconds, body):
        sent.append((url, body))
        hits = [
            {"id": "d1", "score": 7.25, "source": None, "text": "one\n  text"},
            {"id": "d2", "score": 1.5, "source": "guide.md", "text": None},
        ]
        return {"mode": "lexical", "results": hits}

    monkeypatch.setattr(stage, "ask", ask)
    found = stage.searched_documents("http://here/v1", "Why?", "lexical", count=2, task="faq")
    assert sent == [
        ("http://here/v1/search", {"query": "Why?", "mode": "lexical", "top_k": 2, "task": "faq"})
    ]
    assert found.splitlines() == [
        "? Why?  (lexical)",
        "  7.250  d1",
        "         one text",
        "  1.500  guide.md",
        "         ",
    ]


@pytest.mark.parametrize(("task", "expected"), [(None, {}), ("faq", {"task": "faq"})])
def test_a_question_is_sent_as_the_readmes_call_and_its_task_only_where_stated(monkeypatch, task, expected):
    sent = {}

    def answer(method, url, json, **_):
        sent.update(json)
        return httpx.Response(200, json={"data": [{"embedding": [1.0]}]}, request=httpx.Request(method, url))

    monkeypatch.setattr(httpx, "request", answer)
    assert stage._embed("http://here/v1", "m", "Why?", 1.0, task) == [1.0]
    assert sent == {"model": "m", "input": "Why?", "input_type": "query", **expected}


def test_a_default_task_that_the_model_was_not_exported_with_is_refused_with_both_texts(tiny_model, tmp_path):
    """Else the endpoint would send what nobody evaluated."""
    pairs = [
        TrainedPrompt(Prompt("retrieval", "Find", ""), "docs", 2.0),
        TrainedPrompt(Prompt("retrieval", "Answer", ""), "faq", 1.0),
    ]
    shutil.copytree(tiny_model, tmp_path / "model")
    trained_contract(PromptContract.load(tiny_model), pairs, 3.0).save(tmp_path / "model")

    def build(task):
        serving = ServingConfig(model="m", require_gate=False, default_task=task)
        build_application(
            ApplicationArgs(
                model_folder=str(tmp_path / "model"), model_id="m", served_name="m", serving=serving
            )
        )

    build(None)
    build("docs")
    with pytest.raises(
        DataError, match=r"'faq' has the instruction 'Answer', but the default of .* is 'Find'"
    ):
        build("faq")
