"""What is evaluated is what the endpoint sends by default: the same scores over HTTP, and a gate that holds to it."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from drills.serve_scores import ServedModel, main_score
from embedloom.config.evaluation import EvaluationConfig, EvaluationTask
from embedloom.core.prompting import PromptContract
from embedloom.core.trained_prompts import Prompt, TrainedPrompt, trained_contract
from embedloom.encoder.export import write_sidecars
from embedloom.encoder.model import Encoder
from embedloom.errors import DataError
from embedloom.evaluation.gate import Contender, check_prompts, verdict_text
from embedloom.evaluation.retrieval_task import read_heldout
from embedloom.evaluation.scoring import EncoderModel
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.tasks import build_task
from embedloom.evaluation.texts import list_texts, sent_prompts
from fakes_evaluation import INSTRUCTION, make_corpus, pair
from fakes_serving import client_of
from fakes_tasks import make_local_tasks

OTHER = "Find it in another way"


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A model folder that says it was trained for search, classification and STS, by instructions of its own."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(tiny_model, folder)
    prompts = [
        TrainedPrompt(Prompt("retrieval", INSTRUCTION, ""), "docs", 6.0),
        TrainedPrompt(Prompt("retrieval", OTHER, ""), "other", 2.0),
        TrainedPrompt(Prompt("classification", "Which topic is it?", ""), "topics", 1.0),
        TrainedPrompt(Prompt("sts", "Do they mean the same?", "Do they mean the same?"), "pairs", 1.0),
    ]
    roomy = PromptContract.load(folder).model_copy(
        update={"max_query_tokens": 256, "max_document_tokens": 256}
    )
    write_sidecars(folder, trained_contract(roomy, prompts, 10.0), 32)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A held-out split and local tasks, with the corpus of the first."""
    root = tmp_path_factory.mktemp("tasks")
    config = EvaluationConfig(
        tasks=(
            EvaluationTask(name="heldout"),
            EvaluationTask(name="local", kind="local", path=str(make_local_tasks(root / "local"))),
        )
    )
    corpus = make_corpus(root / "corpus")
    return {spec.name: spec for spec in expand_tasks(config.stated_tasks)}, corpus


def served(encoder: Encoder, **settings):
    """The endpoint of an encoder, in this process."""
    limits = {"max_batch_tokens": 4096}
    names = tuple(encoder.contract.tasks or ())
    return client_of(encoder, limits=limits, max_items=512, tasks=names, **settings)


@pytest.mark.parametrize("name", ["heldout", "topics", "topic", "near"])
def test_scores_over_http_by_the_readmes_call_are_the_evaluations(trained, tasks, name):
    """Search, also in two languages, names nothing but its side; classification and STS name their type."""
    specs, corpus = tasks
    encoder = Encoder.load(trained, dtype="float32")
    ours = EncoderModel(encoder, "embedloom/trained", "1")
    ours.instructed = specs[name].instructed
    with served(encoder) as client:

        def post(body):
            reply = client.post("/v1/embeddings", json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()

        over_http = main_score(ServedModel(post, "tiny"), build_task(specs[name], corpus))
    evaluated = main_score(ours, build_task(specs[name], corpus))
    assert over_http == pytest.approx(evaluated, abs=1e-6)


def test_the_readmes_call_gives_the_trained_prompt_and_a_name_another(trained):
    encoder = Encoder.load(trained, dtype="float32")
    with served(encoder) as client:

        def vector(**fields):
            reply = client.post(
                "/v1/embeddings", json={"model": "tiny", "input": "sort", "input_type": "query", **fields}
            )
            assert reply.status_code == 200, reply.text
            return np.array(reply.json()["data"][0]["embedding"])

        def by(instruction):
            return encoder.embed([f"Instruct: {instruction}\nQuery: sort"], "document", "retrieval")[0]

        assert vector() == pytest.approx(by(INSTRUCTION), abs=1e-6)
        assert vector(task="docs") == pytest.approx(vector(task="retrieval"), abs=1e-6)
        assert vector(task="other") == pytest.approx(by(OTHER), abs=1e-6)
        assert vector(task="sts") == pytest.approx(by("Do they mean the same?"), abs=1e-6)
        assert vector(instruction="Mine") == pytest.approx(by("Mine"), abs=1e-6)
        refused = client.post("/v1/embeddings", json={"model": "tiny", "input": "a", "task": "otter"})
        assert refused.status_code == 400 and "allowed: retrieval" in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "task" and "other" in refused.json()["error"]["message"]


def test_the_model_list_shows_the_tasks_and_the_document_allows_their_names(trained):
    encoder = Encoder.load(trained, dtype="float32")
    with served(encoder) as client:
        for card in (client.get("/v1/models").json()["data"][0], client.get("/v1/models/tiny").json()):
            assert card["instructions"]["retrieval"] == INSTRUCTION and card["default_task"] == "retrieval"
            assert card["tasks"]["docs"] == {
                "task_type": "retrieval", "instruction": INSTRUCTION, "document_instruction": None, "share": 0.6,
                "default": True,
            }  # fmt: skip
            assert card["tasks"]["other"]["default"] is False
            assert card["tasks"]["topics"]["document_instruction"] == ""  # labels were bare
        schema = client.get("/openapi.json").json()["components"]["schemas"]["EmbeddingsRequest"]
        (names,) = [form["enum"] for form in schema["properties"]["task"]["anyOf"] if "enum" in form]
        assert {"retrieval", "docs", "other"} <= set(names)


def test_rerank_and_similarity_take_the_default_and_named_tasks(trained):
    encoder = Encoder.load(trained, dtype="float32")
    documents = ["Sorting a list", "Dates become text"]

    def cosines(instruction):
        query = encoder.embed(["sort"], "query", "retrieval", instruction)[0]
        return encoder.embed(documents, "document", "retrieval") @ query

    with served(encoder) as client:
        body = {"model": "tiny", "query": "sort", "documents": documents}
        for fields, instruction in (({}, INSTRUCTION), ({"task": "other"}, OTHER)):
            found = client.post("/v1/similarity", json={**body, **fields}).json()["similarities"]
            assert found == pytest.approx(cosines(instruction).tolist(), abs=1e-6)
            ranked = client.post("/v1/rerank", json={**body, **fields}).json()["results"]
            scores = {entry["index"]: entry["relevance_score"] for entry in ranked}
            assert [scores[n] for n in range(2)] == pytest.approx(cosines(instruction).tolist(), abs=1e-6)


# --- which prompts a task is scored by


def test_heldout_queries_of_one_text_are_one_query_unless_their_own_instructions_are_wanted(tmp_path):
    pairs = [
        pair("a", "One", "doc-zip"),
        pair("b", "One", "doc-sort", instruction=OTHER),
        pair("c", "Two", "doc-http"),
    ]
    corpus = make_corpus(tmp_path, pairs=pairs)
    data = read_heldout(corpus, "test", "here")
    by_text = {query.text: set(data.qrels[query.id]) for query in data.queries}
    assert by_text == {"One": {"doc-zip", "doc-sort"}, "Two": {"doc-http"}}
    own = read_heldout(corpus, "test", "here", own_instructions=True)
    assert sorted((query.text, query.instruction) for query in own.queries) == [
        ("One", OTHER), ("One", INSTRUCTION), ("Two", INSTRUCTION),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stated", "sent"), [(None, "default"), ("default", "default"), ("own", INSTRUCTION)]
)
def test_heldout_queries_go_to_the_model_as_a_clients_would(tmp_path, stated, sent):
    spec = expand_tasks([EvaluationTask(name="heldout", prompts=stated)])[0]
    task = build_task(spec, make_corpus(tmp_path))
    contract = PromptContract()
    expected = contract.format("{text}", "query", instruction=None if sent == "default" else sent)
    assert sent_prompts(task, contract, spec.instructed).sent == [expected]
    listed = list_texts(task, None, contract, spec.instructed)
    instructions = {entry.instruction for entry in listed.entries if entry.side == "query"}
    assert instructions == {None if sent == "default" else sent}


def test_of_many_prompts_those_that_nobody_could_ask_for_are_listed_first(tmp_path):
    pairs = [pair(str(n), f"Query {n}", "doc-zip", instruction=f"A {n:02d}") for n in range(25)]
    pairs += [pair("known", "Known", "doc-sort"), pair("last", "Last", "doc-http", instruction="Zzz")]
    spec = expand_tasks([EvaluationTask(name="heldout", prompts="own")])[0]
    named = [TrainedPrompt(Prompt("retrieval", f"A {n:02d}", ""), f"a{n}", 1.0) for n in range(16)]
    contract = trained_contract(PromptContract(), named, 16.0)
    sent = sent_prompts(build_task(spec, make_corpus(tmp_path, pairs=pairs)), contract, spec.instructed).sent
    expected = sorted([*(f"A {n:02d}" for n in range(16, 25)), INSTRUCTION, "Zzz"])
    assert sent[:11] == [text_of(text) for text in expected] and len(sent) == 20


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "beir", "path": "x", "prompts": "own"}, "kind beir has none; allowed: default, published"),
        ({"prompts": "published"}, "kind heldout has none; allowed: default"),
    ],
)
def test_prompts_that_a_kind_of_task_has_not_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        EvaluationTask(name="t", **task)


def test_published_prompts_are_stated_for_all_benchmark_tasks_at_once():
    tasks = (EvaluationTask(name="SCIDOCS", kind="mteb"), EvaluationTask(name="heldout"))
    unstated = EvaluationConfig(tasks=tasks)
    assert [(s.prompts, s.prompts_of) for s in expand_tasks(unstated.stated_tasks)] == [
        (None, "published"), (None, "default")
    ]  # fmt: skip
    stated = EvaluationConfig(tasks=tasks, prompts="default")
    assert [(s.prompts, s.instructed) for s in expand_tasks(stated.stated_tasks)] == [
        ("default", False),
        (None, False),
    ]
    assert "prompts" not in unstated.model_dump(mode="json")  # fingerprints of older configs stay


# --- the gate


def table(sent: list[str], of: str = "default", stated: bool = False, kind: str = "Retrieval"):
    entry = {"sent": sent, "default": sent[0], "of": of, "stated": stated}
    return {
        "models": {"merged": {"docs": 0.5}},
        "types": {"docs": kind},
        "prompts": {"docs": {"merged": entry}},
    }


def text_of(instruction: str) -> str:
    return f"Instruct: {instruction}\nQuery: {{text}}"


def test_the_gate_refuses_a_prompt_that_nobody_gets_and_names_both(trained, tiny_model):
    default = PromptContract().instructions["retrieval"]
    with pytest.raises(DataError) as refused:
        check_prompts(table([text_of(INSTRUCTION)], of="own"), Contender("merged", tiny_model))
    assert (
        INSTRUCTION in str(refused.value) and default in str(refused.value) and refused.value.exit_code == 2
    )
    assert check_prompts(table([text_of(INSTRUCTION)]), Contender("merged", trained)) == {"docs": "default"}
    # A named task can be asked for, so it may be judged by.
    assert check_prompts(table([text_of(INSTRUCTION), text_of(OTHER)], "own"), Contender("merged", trained))


def test_published_prompts_pass_the_gate_only_where_they_are_stated(trained):
    given = [text_of("Given a scientific paper title, retrieve cited papers")]
    with pytest.raises(DataError, match="published"):
        check_prompts(table(given, "published"), Contender("merged", trained))
    found = check_prompts(table(given, "published", stated=True), Contender("merged", trained))
    assert found == {"docs": "published"}
    content = {
        "candidate": "a",
        "against": "b",
        "verdict": "passed",
        "checks": [],
        "tasks": {},
        "prompts": found,
    }
    content["tasks"] = {
        "docs": {"low": None, "high": None, "current": 0, "candidate": 1, "difference": 1, "result": "better"}
    }
    assert "docs: prompts published, not what the endpoint sends by default" in verdict_text(content)


def test_other_task_types_are_held_to_their_own_default(trained):
    good = table([text_of("Do they mean the same?")], kind="STS")
    assert check_prompts(good, Contender("merged", trained)) == {"docs": "default"}
    with pytest.raises(DataError, match="Do they mean the same"):
        check_prompts(
            table([text_of("Retrieve semantically similar text")], kind="STS"), Contender("merged", trained)
        )


def test_an_evaluation_of_an_earlier_version_is_told_as_such(trained):
    old = {"models": {"merged": {"docs": 0.5}}, "types": {"docs": "Retrieval"}}
    assert check_prompts(old, Contender("merged", trained)) == {"docs": "not recorded"}
