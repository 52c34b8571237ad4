"""Tasks from the held-out split, from BEIR folders and by name: contents, choices and refusals."""

import pytest

from embedloom.core.prompting import PromptContract
from embedloom.errors import DataError
from embedloom.evaluation.jobs import Scorer, Unit
from embedloom.evaluation.local_layout import language_code
from embedloom.evaluation.retrieval_task import INSTRUCTION_COLUMN
from embedloom.evaluation.scorers import make_scorers
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.tasks import build_task, check_rooms, check_task, task_size
from fakes_evaluation import INSTRUCTION, TOPICS, make_beir, make_corpus, pair
from fakes_foreign import OLD, make_transformer, static_model, write_old_layout

HELDOUT = TaskSpec("heldout")


def data_of(task, split="test"):
    return task.dataset["default"][split]


def test_heldout_task_holds_the_split_as_corpus_queries_and_qrels(tmp_path):
    corpus = make_corpus(tmp_path)
    task = build_task(HELDOUT, corpus)
    data = data_of(task)
    texts = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
    found = {texts[query]: grades for query, grades in data["relevant_docs"].items()}
    assert found == {query: {f"doc-{name}": 1} for name, (query, _) in TOPICS.items()}
    assert sorted(data["corpus"]["text"]) == sorted(text for _, text in TOPICS.values())
    assert task.metadata.type == "Retrieval"
    assert task.metadata.main_score == "ndcg_at_10"
    assert task.metadata.prompt == {"query": INSTRUCTION}
    assert task.metadata.eval_langs == ["eng-Latn"]
    assert task_size(task) == {"queries": 6, "documents": 6}
    assert check_task(HELDOUT, corpus)


def test_pairs_with_one_query_text_become_one_query_with_several_positives(tmp_path):
    pairs = [
        pair("a", "Return a copy", "doc-zip"),
        pair("b", "Return a copy", "doc-sort"),
        pair("c", "Other", "doc-http"),
    ]
    data = data_of(build_task(HELDOUT, make_corpus(tmp_path, pairs=pairs)))
    assert sorted(data["queries"]["text"]) == ["Other", "Return a copy"]
    assert sorted(map(sorted, data["relevant_docs"].values())) == [["doc-http"], ["doc-sort", "doc-zip"]]


def test_several_instructions_stay_with_their_queries(tmp_path):
    pairs = [pair("a", "One", "doc-zip"), pair("b", "Two", "doc-sort", instruction="Find the other")]
    task = build_task(HELDOUT, make_corpus(tmp_path, pairs=pairs))
    queries = data_of(task)["queries"]
    assert dict(zip(queries["text"], queries[INSTRUCTION_COLUMN], strict=True)) == {
        "One": INSTRUCTION,
        "Two": "Find the other",
    }
    assert task.metadata.prompt is None


def test_limit_keeps_the_same_queries_and_all_documents(tmp_path):
    corpus = make_corpus(tmp_path)
    tasks = [build_task(TaskSpec("heldout", limit=limit), corpus) for limit in (2, 4, 4)]
    chosen = [set(data_of(task)["queries"]["id"]) for task in tasks]
    assert [len(ids) for ids in chosen] == [2, 4, 4]
    assert chosen[0] < chosen[1] == chosen[2]
    assert all(task_size(task)["documents"] == 6 for task in tasks)
    assert tasks[0].metadata.revision != tasks[1].metadata.revision == tasks[2].metadata.revision


def test_beir_folder_is_read_with_grades_and_titles(tmp_path):
    folder = make_beir(tmp_path / "beir", split="dev")
    (folder / "qrels" / "dev.tsv").write_text(
        "query-id\tcorpus-id\tscore\nquery-zip\tdoc-zip\t2\nquery-zip\tdoc-sort\t0\n"
    )
    task = build_task(
        TaskSpec("mine", kind="beir", path=str(folder), split="dev"),
        make_corpus(tmp_path / "corpus"),
    )
    data = data_of(task, "dev")
    assert data["queries"]["id"] == ["query-zip"]  # queries nobody judged are left out
    assert data["relevant_docs"] == {"query-zip": {"doc-zip": 2, "doc-sort": 0}}
    assert "zip" in data["corpus"]["title"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("queries.jsonl", None, "queries.jsonl is missing"),
        ("qrels/test.tsv", None, r"qrels/test\.tsv is missing"),
        ("corpus.jsonl", '{"_id": "a"}\n', r"corpus\.jsonl: line 1 has no key 'text'"),
        (
            "corpus.jsonl",
            '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n',
            r"corpus\.jsonl: _id 'a' stands twice",
        ),
        ("corpus.jsonl", "not json\n", r"corpus\.jsonl: line 1 is not JSON"),
        ("corpus.jsonl", "", "0 documents"),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nquery-zip\tdoc-zip\thigh\n",
            r"test\.tsv: line 2 .*; expected query-id, corpus-id and a number",
        ),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nnobody\tdoc-zip\t1\n",
            "query 'nobody' is not in queries.jsonl",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "no relevant judgement"),
    ],
)
def test_broken_beir_folder_is_named(tmp_path, file, content, message):
    folder = make_beir(tmp_path / "beir")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        build_task(TaskSpec("mine", kind="beir", path=str(folder)), make_corpus(tmp_path / "corpus"))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "documents and natural pairs"),
        ([pair("a", "One", "doc-nowhere")], "'doc-nowhere', which is not in documents/test"),
        ([pair("a", "One", "doc-zip", task_type="sts")], "task_type 'sts'; allowed: retrieval"),
    ],
)
def test_heldout_split_that_cannot_be_scored_is_named(tmp_path, pairs, message):
    with pytest.raises(DataError, match=message):
        build_task(HELDOUT, make_corpus(tmp_path, pairs=pairs))


def test_a_split_without_documents_is_found_before_any_actor(tmp_path):
    with pytest.raises(DataError, match=r"documents/dev has no Parquet file.*corpus\.split\.dev"):
        check_task(TaskSpec("heldout", split="dev"), make_corpus(tmp_path))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskSpec("NFCorpuss", kind="mteb"), "Did you mean: 'NFCorpus'"),
        (TaskSpec("Flickr30kI2TRetrieval", kind="mteb"), "allowed: text only"),
        (TaskSpec("STS12", kind="mteb", limit=3), "limit is 3; an mteb task takes none"),
    ],
)
def test_mteb_task_that_cannot_be_used_is_named(tmp_path, task, message):
    with pytest.raises(DataError, match=message):
        check_task(task, make_corpus(tmp_path))


def test_mteb_task_by_name_is_found_and_its_missing_dataset_is_named(tmp_path):
    corpus = make_corpus(tmp_path)
    assert check_task(TaskSpec("NFCorpus", kind="mteb"), corpus)
    sts = TaskSpec("STS12", kind="mteb")
    assert not check_task(sts, corpus)  # nothing to rank, so BM25 sits this one out
    with pytest.raises(DataError, match="'mteb/sts12-sts' is neither cached nor reachable"):
        build_task(sts, corpus)


@pytest.mark.parametrize(
    ("lang", "code"),
    [
        ("en", "eng-Latn"),
        ("de-AT", "deu-Latn"),
        ("jpn-Jpan", "jpn-Jpan"),
        ("por-BR", "por-Latn"),
        ("zho-TW", "zho-Hant"),
        ("xx", "und-Zyyy"),
        (None, "und-Zyyy"),
    ],
)
def test_languages_get_the_codes_mteb_uses(lang, code):
    assert language_code(lang) == code


def test_an_mteb_task_whose_instruction_fills_the_limit_is_named_before_anything_starts(tiny_model):
    """PAC's instruction is the longest of the benchmark's; a byte a token, it and the template pass 128."""
    contract = PromptContract.load(tiny_model)
    scorer = Scorer("base", "models", "embedloom/base", "r", tiny_model, contract.hash)
    units = [Unit(scorer, TaskSpec(name, "mteb")) for name in ("STS12", "PAC")]
    contracts = {contract.hash: contract}
    check_rooms(units[:1], contracts)
    message = r"evaluation.tasks: 'PAC', model 'base': the instruction takes \d+ tokens .* the limit of 128 for a query"
    with pytest.raises(DataError, match=message):
        check_rooms(units, contracts)
    wide = contract.model_copy(update={"max_query_tokens": 512})
    check_rooms(units, {contract.hash: wide})


def test_rooms_of_foreign_models_are_checked_where_our_encoder_runs_them(tmp_path):
    """A transformer may lie in a folder of its own; what sentence-transformers runs may have none, and no such limits."""
    bert = make_transformer(tmp_path / "bert", limit=300)
    prompts = {"prompts": {"query": "query " * 35}}
    full = write_old_layout(tmp_path / "full", bert, **OLD["0_Transformer"], prompts=prompts)
    short = write_old_layout(tmp_path / "short", bert, **OLD["0_Transformer"])
    scorers, contracts = make_scorers(
        {"short": short, "static": static_model(tmp_path / "static"), "full": full}, (), None
    )
    units = [Unit(scorer, TaskSpec("NFCorpus", "mteb")) for scorer in scorers]
    check_rooms(units[:2], contracts)
    with pytest.raises(
        DataError, match=r"model 'full': the instruction takes 37 tokens .* leaves 3 of the limit of 40"
    ):
        check_rooms(units, contracts)
