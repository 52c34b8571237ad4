"""Local task folders: what mteb gets from them, language by language, and every way they can be broken."""

import boto3
import pandas as pd
import pytest

from embedloom.config.evaluation import EvaluationTask
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.evaluation.specs import TaskSpec, expand_tasks
from embedloom.evaluation.tasks import build_task, check_task
from fakes_store import s3_server
from fakes_tasks import make_local_tasks, make_retrieval


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_local_tasks(tmp_path_factory.mktemp("tasks"))


def specs(path, **more):
    return {
        spec.name: spec
        for spec in expand_tasks([EvaluationTask(name="mine", kind="local", path=str(path), **more)])
    }


def built(path, name, **more):
    return build_task(specs(path, **more)[name], None)


def test_a_folder_becomes_its_tasks_with_mtebs_types_metrics_and_languages(folder):
    tasks = {name: build_task(spec, None) for name, spec in specs(folder).items()}
    assert {name: (t.metadata.type, t.metadata.main_score, t.hf_subsets) for name, t in tasks.items()} == {
        "topics": ("Retrieval", "ndcg_at_10", ["deu", "eng"]),
        "topics-to-eng": ("Retrieval", "ndcg_at_10", ["deu"]),
        "pick": ("Reranking", "map_at_1000", ["default"]),
        "topic": ("Classification", "accuracy", ["deu", "eng"]),
        "near": ("STS", "cosine_spearman", ["deu", "eng"]),
        "nli": ("PairClassification", "max_ap", ["deu", "eng"]),
        "pairs": ("BitextMining", "f1", ["deu-eng"]),
        "groups": ("Clustering", "v_measure", ["default"]),
    }
    assert tasks["topics"].metadata.eval_langs == {"deu": ["deu-Latn"], "eng": ["eng-Latn"]}
    assert tasks["pairs"].metadata.eval_langs == {"deu-eng": ["deu-Latn", "eng-Latn"]}
    assert {name for name, spec in specs(folder).items() if check_task(spec, None)} == {
        "topics",
        "topics-to-eng",
        "pick",
    }


def test_each_language_searches_its_own_documents_and_the_cross_lingual_half_the_english_ones(folder):
    data = built(folder, "topics").dataset
    assert {document[:4] for document in data["deu"]["test"]["corpus"]["id"]} == {"deu:"}
    assert data["deu"]["test"]["relevant_docs"]["deu:bread"] == {f"deu:bread:{n}": 1 for n in range(3)}
    crossed = built(folder, "topics-to-eng").dataset["deu"]["test"]
    assert {document[:4] for document in crossed["corpus"]["id"]} == {"eng:"}
    assert [query[:4] for query in crossed["queries"]["id"]] == ["deu:"] * 3


def test_reranking_ranks_the_judged_documents_only(folder):
    data = built(folder, "pick").dataset["default"]["test"]
    assert data["top_ranked"] == {query: list(grades) for query, grades in data["relevant_docs"].items()}
    assert all(sorted(grades.values()) == [0, 0, 0, 1] for grades in data["relevant_docs"].values())


def test_training_texts_are_of_the_own_language_or_else_of_all(folder, tmp_path):
    data = built(folder, "topic").dataset
    assert data["deu"]["train"]["text"] == data["eng"]["train"]["text"]  # there are no German ones
    frame = pd.read_parquet(folder / "classification" / "topic.parquet")
    german = frame[frame["lang"] == "deu"].assign(split="train")
    path = tmp_path / "classification" / "own.parquet"
    path.parent.mkdir()
    pd.concat([frame, german]).to_parquet(path)
    assert set(built(path, "mine").dataset["deu"]["train"]["text"]) == set(german["text"])


def test_pairs_that_are_neither_same_nor_different_are_left_out(folder):
    frame = pd.read_parquet(folder / "pair_classification" / "nli.parquet")
    rows = sum(len(data["test"]) for data in built(folder, "nli").dataset.values())
    assert rows == len(frame) - 1
    labels = built(folder, "nli").dataset["deu"]["test"]["labels"]
    assert sum(labels) == sum((frame["lang"] == "deu") & (frame["label"] == "entailment"))


def test_languages_and_limit_choose_the_same_rows_every_time(folder):
    task = built(folder, "topics", languages=("ger", "deu"), limit=2)
    assert task.hf_subsets == ["deu"]
    assert len(task.dataset["deu"]["test"]["queries"]) == 2
    assert len(task.dataset["deu"]["test"]["corpus"]) == 9
    assert built(folder, "pairs", languages=("eng",)).hf_subsets == ["deu-eng"]
    again = built(folder, "near", limit=5)
    assert [len(data["test"]) for data in again.dataset.values()] == [5, 5]
    assert (
        again.dataset["eng"]["test"].to_dict()
        == built(folder, "near", limit=5).dataset["eng"]["test"].to_dict()
    )
    assert again.metadata.revision != built(folder, "near").metadata.revision


def test_one_task_takes_the_name_of_its_entry(folder):
    assert list(specs(folder / "retrieval" / "topics")) == ["mine", "mine-to-eng"]
    assert list(specs(folder / "sts" / "near.parquet")) == ["mine"]
    assert list(specs(folder / "sts")) == ["mine"]


def test_a_benchmark_becomes_its_tasks():
    found = expand_tasks([EvaluationTask(name="MTEB(Multilingual, v2)", kind="benchmark")])
    assert len(found) == 131
    assert check_task(next(spec for spec in found if spec.name == "MIRACLRetrievalHardNegatives"), None)
    with pytest.raises(ConfigError, match=r"no mteb benchmark is named 'MTEB\(Mul\)'"):
        expand_tasks([EvaluationTask(name="MTEB(Mul)", kind="benchmark")])
    with pytest.raises(ConfigError, match="'STS12' is named by two entries"):
        expand_tasks(
            [
                EvaluationTask(name="MTEB(eng, v1)", kind="benchmark"),
                EvaluationTask(name="STS12", kind="mteb"),
            ]
        )


@pytest.mark.parametrize("name", ["corpus", "queries", "qrels"])
def test_a_retrieval_folder_without_one_of_its_files_is_named(tmp_path, name):
    folder = make_retrieval(tmp_path / "retrieval" / "half")
    (folder / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match=rf"half/{name}\.parquet is missing"):
        specs(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "retrieval/topics/qrels",
            lambda f: f.assign(doc_id="gone"),
            r"doc_id 'gone' is not in corpus\.parquet",
        ),
        (
            "retrieval/topics/qrels",
            lambda f: f.assign(query_id="gone"),
            r"query_id 'gone' is not in queries\.parquet",
        ),
        ("retrieval/topics/qrels", lambda f: f.assign(score=0), "topics, deu: no judgement above 0"),
        ("retrieval/topics/corpus", lambda f: f.assign(id="same"), "'same' stands 18 times"),
        ("retrieval/topics/queries", lambda f: f.drop(columns="lang"), "no column 'lang'"),
        (
            "retrieval/topics/queries",
            lambda f: f.assign(split="dev"),
            r"no row of split 'test'; the file has \['dev'\]",
        ),
        ("sts/near", lambda f: f.assign(score="high"), "column 'score' is .*, expected double"),
        ("sts/near", lambda f: f.assign(sentence1=None), "'sentence1' has .* nulls"),
        (
            "pair_classification/nli",
            lambda f: f.assign(label="maybe"),
            "label 'maybe' says neither same nor different",
        ),
        ("pair_classification/nli", lambda f: f.assign(label="entailment"), "needs pairs of both kinds"),
        ("classification/topic", lambda f: f[f["split"] == "test"], r"no row of split 'train'"),
        ("classification/topic", lambda f: f.assign(label="one"), "the training split has one label"),
        ("clustering/groups", lambda f: f.assign(label="one"), "has one label; clustering needs two"),
    ],
)
def test_broken_files_are_named(folder, tmp_path, file, change, message):
    source = folder / file.rsplit("/", 1)[0]
    target = tmp_path / file.rsplit("/", 1)[0]
    target.mkdir(parents=True)
    for path in source.glob("*.parquet"):
        frame = pd.read_parquet(path)
        (change(frame) if path.stem == file.rsplit("/", 1)[1] else frame).to_parquet(target / path.name)
    with pytest.raises(DataError, match=message):
        for spec in specs(tmp_path).values():
            build_task(spec, None)


def test_paths_that_hold_no_task_are_named(tmp_path, folder):
    with pytest.raises(DataError, match="does not exist"):
        specs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no task; expected"):
        specs(tmp_path)
    stray = tmp_path / "stray.parquet"
    stray.write_bytes((folder / "sts" / "near.parquet").read_bytes())
    with pytest.raises(DataError, match="a folder named after its type"):
        specs(stray)
    with pytest.raises(DataError, match=r"languages is \['fra'\]; the task has \['deu', 'eng'\]"):
        built(folder, "near", languages=("fra",))
    with pytest.raises(DataError, match="kind heldout needs the corpus of a run"):
        check_task(TaskSpec("heldout"), None)


def test_tasks_at_an_address_are_those_of_the_folder(folder):
    with s3_server():
        boto3.client("s3").create_bucket(Bucket="tasks")
        Place("s3://tasks/all").upload(folder)
        here, there = specs(folder), specs("s3://tasks/all")
        assert list(there) == list(here)
        for name, spec in there.items():
            check_task(spec, None)
            task, other = build_task(spec, None), build_task(here[name], None)
            assert task.metadata.dataset["revision"] == other.metadata.dataset["revision"]
            assert task.hf_subsets == other.hf_subsets
