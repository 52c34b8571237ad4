"""Every form of training data read into the same examples."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedloom.config.training import TrainingSource, check_sources
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.core.text_table import TextTable
from embedloom.errors import DataError
from embedloom.training.sources import read_source, source_state


def read(tmp_path, mined=None, **settings):
    source = TrainingSource(name="s", **settings)
    return list(read_source(source, mined, tmp_path / "scratch"))


def texts_of(examples):
    return [(e.id, e.query, e.positive, e.negatives) for e in examples]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def example_row(number, dataset="public", **changes):
    return {
        "id": f"e{number}", "query": f"q {number}", "query_instruction": "Find it", "positive": "p",
        "positive_score": 0.9, "negatives": ["n1", "n2"], "negative_scores": [0.1, 0.1],
        "document_instruction": None, "task_type": "retrieval", "dataset": dataset, **changes,
    }  # fmt: skip


def test_own_examples_of_one_dataset(tmp_path):
    place = Place(str(tmp_path / "mining"))
    rows = [example_row(0), example_row(1, "synthetic", document_instruction="Same"), example_row(2)]
    place.write_table("examples/part-000000.parquet", table_from_rows("examples", rows))
    found = read(tmp_path, place, format="mined", dataset="synthetic")
    assert texts_of(found) == [("e1", "q 1", "p", ["n1", "n2"])]
    assert (found[0].instruction, found[0].document_instruction) == ("Find it", "Same")
    elsewhere = read(tmp_path, format="examples", path=str(tmp_path / "mining"))
    assert [e.id for e in elsewhere] == ["e0", "e1", "e2"]


def test_sentence_transformers_columns(tmp_path):
    rows = [
        {"anchor": "a", "positive": "b", "negative_2": "n2", "negative_1": "n1", "negative_10": "n10"},
        {"anchor": "c", "positive": None, "negative_2": None, "negative_1": "n1", "negative_10": None},
    ]
    write_parquet(tmp_path / "data" / "train.parquet", rows)
    found = read(tmp_path, format="sentence_transformers", path=str(tmp_path / "data"), task_type="sts")
    assert texts_of(found) == [
        ("train.parquet:0", "a", "b", ["n1", "n2", "n10"]),
        ("train.parquet:1", "c", "", ["n1"]),
    ]
    assert found[0].task_type == "sts"


def test_a_missing_column_is_named_with_those_found(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"query": "a", "positive": "b"}])
    with pytest.raises(
        DataError, match=r"x.jsonl:1 has no column 'anchor' \(query_column\); found \['query'"
    ):
        read(tmp_path, format="sentence_transformers", path=str(tmp_path / "x.jsonl"))
    named = read(
        tmp_path, format="sentence_transformers", path=str(tmp_path / "x.jsonl"), query_column="query"
    )
    assert texts_of(named) == [("x.jsonl:1", "a", "b", [])]


def test_flagembedding_lines(tmp_path):
    rows = [
        {"query": "q", "pos": ["p1", "p2"], "neg": ["n"], "pos_scores": [1], "prompt": "Do this"},
        {"query": "q2", "pos": [], "neg": []},
        {"query": "q3", "pos": "p", "neg": []},
        {"query": "q4", "pos": ["p"], "neg": [7]},
    ]
    write_jsonl(tmp_path / "fe.jsonl", rows)
    found = read(tmp_path, format="flagembedding", path=str(tmp_path / "fe.jsonl"))
    assert texts_of(found[:2]) == [("fe.jsonl:1", "q", "p1", ["n"]), ("fe.jsonl:2", "q2", "", [])]
    assert found[0].instruction == "Do this"
    assert [e.problem[0] for e in found[2:]] == ["not_a_list", "not_text"]
    given = read(tmp_path, format="flagembedding", path=str(tmp_path / "fe.jsonl"), instruction="Ours")
    assert given[0].instruction == "Ours"


def test_beir_takes_the_best_document_and_those_judged_zero(tmp_path):
    root = tmp_path / "beir"
    write_jsonl(
        root / "corpus.jsonl",
        [{"_id": f"d{n}", "title": "T" if n == 0 else "", "text": f"t{n}"} for n in range(4)],
    )
    write_jsonl(root / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(3)])
    (root / "qrels").mkdir()
    (root / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td1\t1\nq0\td0\t2\nq0\td3\t0\nq2\tgone\t1\nq9\td1\t1\n"
    )
    found = read(tmp_path, format="beir", path=str(root))
    assert texts_of(found[:1]) == [("q0", "query 0", "T t0", ["t3"])]
    assert found[1].id == "q2" and found[1].problem[0] == "unknown_document"
    assert (found[2].id, found[2].problem[0]) == ("q9", "unknown_query")
    assert len(found) == 3  # q1 has no judgement


def make_nemo(root):
    write_parquet(root / "corpus" / "train.parquet", [{"id": f"d{n}", "text": f"t{n}"} for n in range(5)])
    (root / "corpus" / "merlin_metadata.json").write_text(
        json.dumps(
            {"class": "TextQADataset", "corpus_id": "c", "query_instruction": "Instruct: Do it\nQuery:"}
        )
    )
    rows = [
        {"question_id": "q0", "question": "a", "corpus_id": "c", "pos_doc": [{"id": "d1"}, {"id": "d2"}], "neg_doc": [{"id": "d3"}, "d4"]},
        {"question_id": "q1", "question": "b", "corpus_id": "c", "pos_doc": ["d0"], "neg_doc": ["zz"]},
        {"question_id": "q2", "question": "c", "corpus_id": "c", "pos_doc": [], "neg_doc": ["d0"]},
    ]  # fmt: skip
    (root / "train.json").write_text(json.dumps({"corpus": {"path": "corpus"}, "data": rows}))


def test_nemo_json_with_its_corpus(tmp_path):
    make_nemo(tmp_path / "nemo")
    found = read(tmp_path, format="nemo_json", path=str(tmp_path / "nemo" / "train.json"))
    assert texts_of(found[:1]) == [("q0", "a", "t1", ["t3", "t4"])]
    assert found[0].instruction == "Do it"
    assert found[1].problem == ("unknown_document", "'zz' is not in the corpus 'c'")
    assert texts_of(found[2:]) == [("q2", "c", "", ["t0"])]


def test_nemo_json_names_what_is_missing(tmp_path):
    make_nemo(tmp_path / "nemo")
    path = tmp_path / "nemo" / "train.json"
    content = json.loads(path.read_text())
    del content["data"][1]["neg_doc"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="row 1 of data has no field 'neg_doc'"):
        read(tmp_path, format="nemo_json", path=str(path))
    (tmp_path / "nemo" / "corpus" / "merlin_metadata.json").unlink()
    with pytest.raises(DataError, match=r"merlin_metadata\.json: not readable"):
        read(tmp_path, format="nemo_json", path=str(path))


QUERIES = [
    {"question_id": "q_0", "question": "a", "corpus_id": "c", "pos_doc": [{"id": "d_1"}], "neg_doc": [{"id": "d_2"}]},
    {"question_id": "q_1", "question": "b", "corpus_id": "c", "pos_doc": [{"id": "d_0"}], "neg_doc": []},
]  # fmt: skip


def test_a_nemotron_subset_with_texts(tmp_path):
    root = tmp_path / "FEVER"
    write_parquet(root / "queries.parquet", QUERIES)
    write_parquet(root / "corpus.parquet", [{"id": f"d_{n}", "text": f"t{n}"} for n in range(3)])
    (root / "dataset_metadata.json").write_text(json.dumps({"corpus_id": "c", "ids_only": False}))
    found = read(tmp_path, format="embed_nemotron", path=str(root))
    assert texts_of(found) == [("q_0", "a", "t1", ["t2"]), ("q_1", "b", "t0", [])]


@pytest.mark.parametrize("loader", ["column", "mteb"])
def test_a_nemotron_subset_of_ids_takes_its_texts_from_local_files(tmp_path, loader):
    root, original = tmp_path / "GooAQ", tmp_path / "original"
    write_parquet(
        root / "queries.parquet", [{k: v for k, v in row.items() if k != "question"} for row in QUERIES]
    )
    (root / "dataset_metadata.json").write_text(json.dumps({"corpus_id": "c", "ids_only": True}))
    config = {"loader_config": loader, "source_repo": "org/gooaq", "split": "train"}
    if loader == "column":
        config |= {"query_column": "question", "document_column": "answer"}
        write_parquet(original / "a.parquet", [{"question": f"Q{n}", "answer": f"A{n}"} for n in range(2)])
        write_jsonl(original / "b.jsonl", [{"question": "Q2", "answer": "A2"}])
    else:
        write_jsonl(
            original / "corpus.jsonl", [{"_id": f"x{n}", "title": "", "text": f"A{n}"} for n in range(3)]
        )
        write_jsonl(original / "queries.jsonl", [{"_id": f"y{n}", "text": f"Q{n}"} for n in range(3)])
    (root / "source_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"ships ids only; local_texts must say where 'org/gooaq' lies"):
        read(tmp_path, format="embed_nemotron", path=str(root))
    found = read(tmp_path, format="embed_nemotron", path=str(root), local_texts={"org/gooaq": str(original)})
    assert texts_of(found) == [("q_0", "Q0", "A1", ["A2"]), ("q_1", "Q1", "A0", [])]


def test_an_empty_source_is_refused_by_name(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"source 's'.*has no rows"):
        read(tmp_path, format="flagembedding", path=str(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match=r"source 's'.*has no file ending in"):
        read(tmp_path, format="flagembedding", path=str(tmp_path / "nowhere"))


def test_texts_are_found_by_id_across_batches(tmp_path):
    table = TextTable.build(tmp_path / "t", ((f"id{n}", f"text {n}") for n in range(3000)))
    assert len(table) == 3000
    assert [table.get(f"id{n}") for n in (0, 1023, 1024, 2999)] == [
        f"text {n}" for n in (0, 1023, 1024, 2999)
    ]
    assert table.get("id3000") is None
    with pytest.raises(DataError, match="'a' stands for two different texts"):
        TextTable.build(tmp_path / "u", [("a", "x"), ("b", "y"), ("a", "z")])


def test_a_changed_file_changes_the_state(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("{}")
    source = TrainingSource(name="s", format="flagembedding", path=str(path))
    before = source_state(source)
    path.write_text("{} ")
    assert source_state(source) != before


def test_source_sections_are_checked():
    with pytest.raises(ValueError, match="format mined takes no path"):
        TrainingSource(name="s", format="mined", path="x")
    with pytest.raises(ValueError, match="format beir needs a path"):
        TrainingSource(name="s", format="beir")
    with pytest.raises(ValueError, match="a weight and a cap"):
        TrainingSource(name="s", format="beir", path="x", weight=1, cap=1)
    weighted, plain = (
        TrainingSource(name="a", format="beir", path="x", weight=1),
        TrainingSource(name="b", format="beir", path="x"),
    )
    with pytest.raises(ValueError, match="'a' has a weight and 'b' none"):
        check_sources((weighted, plain))
    with pytest.raises(ValueError, match="different names"):
        check_sources((plain, plain))
