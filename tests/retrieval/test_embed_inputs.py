"""Inputs, ids, rejects and the ledger, without a model: which row takes which vector."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fakes_documents
from embedloom.config.base import validate
from embedloom.config.embedding import EmbeddingConfig
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.core.trained_prompts import Prompt, TrainedPrompt, trained_contract
from embedloom.encoder.tokenizer import load_tokenizer
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval import corpora, inputs
from embedloom.retrieval.corpora import _with_task
from embedloom.retrieval.inputs import Cutter, check_instruction, input_state, open_input
from embedloom.retrieval.ledger import first_of_equals, open_ledger, origin_column
from fakes_corpus import save_word_tokenizer
from fakes_serial import serial_tasks


def table(folder, name, **columns):
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table(columns), folder / name)


def ledger_rows(path, out, shard_rows=4, previous=None, **config):
    place = Place(str(out))
    ledger = open_ledger(open_input(str(path), EmbeddingConfig(**config), place), place, shard_rows, previous)
    return ledger, place.read_tables("rows").to_pylist()


def test_equal_texts_take_the_vector_of_the_first(tmp_path):
    texts = ["a", "b", "a", "c", "c", " a ", "d", "b", "e"]
    table(tmp_path, "in.parquet", id=list(range(9)), text=texts)
    ledger, rows = ledger_rows(tmp_path / "in.parquet", tmp_path / "out")
    first = {}
    expected = [first.setdefault(text.strip(), number) for number, text in enumerate(texts)]
    assert [row["origin"] for row in rows] == expected
    assert [row["id"] for row in rows] == [str(n) for n in range(9)]
    assert (ledger.rows, ledger.own) == ((4, 4, 1), (3, 1, 1))
    assert ledger.counts == {"rows": 9, "embedded": 5, "shared": 4, "reused": 0, "removed": 0, "rejects": {}}


def test_equal_texts_with_other_titles_are_other_texts(tmp_path):
    table(tmp_path, "in.parquet", id=["1", "2", "3"], title=["x", None, "x"], text=["a", "a", "a"])
    _, rows = ledger_rows(tmp_path / "in.parquet", tmp_path / "out")
    assert [row["origin"] for row in rows] == [0, 1, 0]
    _, rows = ledger_rows(tmp_path / "in.parquet", tmp_path / "queries", side="query")
    assert [row["origin"] for row in rows] == [0, 0, 0]


def test_first_of_equals_against_a_dictionary():
    digests = np.random.default_rng(0).integers(0, 6, (500, 2)).astype(np.uint64)
    first = {}
    expected = [first.setdefault(tuple(pair), number) for number, pair in enumerate(digests.tolist())]
    assert first_of_equals(digests).tolist() == expected


def test_empty_texts_are_counted_rejects(tmp_path):
    table(tmp_path, "in.parquet", id=["a", "b", "c", "d"], text=["x", None, " \n", "y"])
    ledger, rows = ledger_rows(tmp_path / "in.parquet", tmp_path / "out")
    assert [row["id"] for row in rows] == ["a", "d"] and ledger.counts["rejects"] == {"empty": 2}
    rejects = Place(str(tmp_path / "out")).read_tables("rejects", "rejects").to_pylist()
    assert [(row["id"], row["reason"]) for row in rejects] == [("b", "empty"), ("c", "empty")]
    table(tmp_path, "none.parquet", id=["a"], text=[""])
    with pytest.raises(DataError, match="no row with a text"):
        ledger_rows(tmp_path / "none.parquet", tmp_path / "out2")


@pytest.mark.parametrize(
    ("ids", "message"),
    [(["a", "b", "a"], "id 'a' stands for two texts"), (["a", None, "b"], r"row 1: column 'id' holds None"), (["a", "", "b"], "holds ''"),
     ([1.5, 2.5, 3.5], "column 'id' is double; allowed: text or whole numbers")],
)  # fmt: skip
def test_bad_ids_are_named(tmp_path, ids, message):
    table(tmp_path, "in.parquet", id=ids, text=["x", "y", "z"])
    with pytest.raises(DataError, match=message):
        ledger_rows(tmp_path / "in.parquet", tmp_path / "out")


@pytest.mark.parametrize("scan_rows", [2, 100])
def test_a_row_that_repeats_id_and_text_of_another_is_a_counted_reject(tmp_path, monkeypatch, scan_rows):
    """As building a corpus does, and BEIR's readers; equal texts of other ids stay rows of their own."""
    monkeypatch.setattr("embedloom.retrieval.ledger._SCAN_ROWS", scan_rows)
    ids, texts = ["a", "b", "a", "c", "a", "d", "b"], ["x", "y", " x", "x", "x", "z", "y "]
    table(tmp_path, "in.parquet", id=ids, text=texts)
    ledger, rows = ledger_rows(tmp_path / "in.parquet", tmp_path / "out", shard_rows=2)
    assert [(row["id"], row["row"], row["origin"]) for row in rows] == [
        ("a", 0, 0), ("b", 1, 1), ("c", 3, 0), ("d", 5, 3),
    ]  # fmt: skip
    assert ledger.counts == {
        "rows": 4, "embedded": 3, "shared": 1, "reused": 0, "removed": 0, "rejects": {"repeated": 3},
    }  # fmt: skip
    rejects = Place(str(tmp_path / "out")).read_tables("rejects", "rejects").to_pylist()
    assert [(row["id"], row["detail"]) for row in rejects] == [
        ("a", "file 0, row 2"), ("a", "file 0, row 4"), ("b", "file 0, row 6"),
    ]  # fmt: skip


def test_rows_without_ids_are_known_by_their_texts(tmp_path):
    table(tmp_path / "in", "1.parquet", text=["x", "y"])
    table(tmp_path / "in", "2.parquet", text=["z", "x"])
    ledger, rows = ledger_rows(tmp_path / "in", tmp_path / "out", shard_rows=2)
    assert ledger.counts["rejects"] == {"repeated": 1} and ledger.rows == (2, 1)
    table(tmp_path / "other", "1.parquet", text=["z", "y", "x"])
    _, other = ledger_rows(tmp_path / "other", tmp_path / "out2")
    assert [row["id"] for row in other] == [row["id"] for row in reversed(rows)]


def test_json_lines_and_text_folders_become_documents(tmp_path):
    lines = [{"_id": 7, "text": "x", "title": "t"}, {"_id": "b", "text": "y", "extra": [1]}]
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines))
    _, rows = ledger_rows(tmp_path / "in.jsonl.gz", tmp_path / "out")
    documents = Place(str(tmp_path / "out")).read_tables("documents").to_pylist()
    assert [row["id"] for row in rows] == ["7", "b"]
    said = [{key: row[key] for key in ("id", "title", "text", "source")} for row in documents]
    assert said == [
        {"id": "7", "title": "t", "text": "x", "source": "in.jsonl.gz:1"},
        {"id": "b", "title": None, "text": "y", "source": "in.jsonl.gz:2"},
    ]
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / "sub" / "one.md").write_text("# Head\nbody")
    (tmp_path / "texts" / "two.txt").write_text("plain")
    _, rows = ledger_rows(tmp_path / "texts", tmp_path / "out2")
    assert [row["id"] for row in rows] == ["sub/one.md", "two.txt"]
    assert Place(str(tmp_path / "out2")).read_tables("documents").column("title").to_pylist() == [
        "Head",
        "two",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"id": "a"}', "line 1 has no key 'text'"), ('{"id": "a", "text": 3}', "key 'text' holds int '3'"), ("[1]", "holds a list"),
     ('{"id": "a", "text": "\\ud800"}', "not Unicode")],
)  # fmt: skip
def test_bad_json_lines_are_named(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        ledger_rows(tmp_path / "in.jsonl", tmp_path / "out")


def test_unclear_inputs_say_what_is_allowed(tmp_path):
    with pytest.raises(DataError, match="does not exist or holds no such file; allowed: a corpus artefact"):
        input_state(str(tmp_path / "nowhere"))
    table(tmp_path / "in", "1.parquet", text=["x"])
    (tmp_path / "in" / "README.md").write_text("about")
    with pytest.raises(
        DataError,
        match=r"several kinds \(1 parquet, 1 documents\); give a glob, such as .*/\*.parquet' or .*/\*.md'",
    ):
        input_state(str(tmp_path / "in"))
    _, rows = ledger_rows(f"{tmp_path}/in/*.parquet", tmp_path / "out")
    assert len(rows) == 1
    with pytest.raises(DataError, match=r"no column 'body' \(embedding.text_column\)"):
        ledger_rows(f"{tmp_path}/in/*.parquet", tmp_path / "out2", text_column="body")


def test_a_changed_file_changes_the_state(tmp_path):
    table(tmp_path, "in.parquet", text=["x"])
    before = input_state(str(tmp_path / "in.parquet"))
    table(tmp_path, "in.parquet", text=["x", "y"])
    assert input_state(str(tmp_path / "in.parquet")) != before


def test_earlier_vectors_are_found_by_text_and_lost_ids_counted(tmp_path):
    table(tmp_path, "old.parquet", id=["a", "b", "c"], text=["x", "y", "z"])
    ledger_rows(tmp_path / "old.parquet", tmp_path / "old")
    table(tmp_path, "new.parquet", id=["n", "c", "b", "m"], text=["z", "z", "y2", "y2"])
    before = ("f1", Place(str(tmp_path / "old")))
    ledger, rows = ledger_rows(tmp_path / "new.parquet", tmp_path / "new", previous=before)
    assert [row["origin"] for row in rows] == [-3, -3, 2, 2]
    assert ledger.counts | {"rejects": {}} == {
        "rows": 4, "embedded": 1, "shared": 1, "reused": 2, "removed": 1, "rejects": {},
    }  # fmt: skip
    with pytest.raises(DataError, match="takes vectors from the artefact 'f1', now given is 'f2'"):
        ledger_rows(tmp_path / "new.parquet", tmp_path / "new", previous=("f2", before[1]))


def test_large_files_are_read_by_row_range(tmp_path):
    pq.write_table(pa.table({"n": list(range(100))}), tmp_path / "in.parquet", row_group_size=7)
    place = Place(str(tmp_path))
    for start, stop in ((0, 1), (6, 8), (13, 14), (0, 100), (95, 100), (20, 41)):
        assert place.read_rows("in.parquet", start, stop, ["n"]).column("n").to_pylist() == list(
            range(start, stop)
        )
    with pytest.raises(DataError, match="has 100 rows, 101 were expected"):
        place.read_rows("in.parquet", 99, 101, ["n"])


@pytest.mark.parametrize(
    ("section", "message"),
    [({"dtype": "int4"}, "dtype: "), ({"task_type": "x"}, "task_type: unknown; allowed: retrieval"), ({"dtype": "binary", "dimensions": 12}, "dimensions is 12"),
     ({"dtype": "binary", "index": {"kind": "flat"}}, "faiss.IndexBinaryFlat"), ({"index": {"kind": "hnsw", "lists": 4}}, "kind hnsw does not read lists"),
     ({"index": {"kind": "ivf", "neighbours": 4}}, "kind ivf does not read neighbours")],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        validate(EmbeddingConfig, section, "c")


def test_an_instruction_that_no_document_would_carry_is_refused():
    with pytest.raises(ConfigError, match="documents of task_type 'retrieval' carry no instruction"):
        check_instruction(EmbeddingConfig(instruction="x"), ("sts",))
    check_instruction(EmbeddingConfig(instruction="x", side="query"), ("sts",))
    check_instruction(EmbeddingConfig(instruction="x", task_type="sts"), ("sts",))


@pytest.mark.parametrize(
    ("stated", "gpus", "computed"),
    [("auto", 0, "float32"), ("auto", 0.5, "bfloat16"), ("auto", 1, "bfloat16"), ("float32", 1, "float32"), ("bfloat16", 0, "bfloat16")],
)  # fmt: skip
def test_the_recipe_says_what_the_pool_computes_in(stated, gpus, computed):
    config = EmbeddingConfig(compute_dtype=stated).computed(gpus)
    assert config.recipe["compute_dtype"] == computed
    assert config.computed(0) == config  # said once


def test_origins_are_int64(tmp_path):
    table(tmp_path, "in.parquet", text=["x"])
    ledger_rows(tmp_path / "in.parquet", tmp_path / "out")
    assert origin_column(Place(str(tmp_path / "out")).read_tables("rows")).dtype == np.int64


def test_texts_are_taken_for_the_models_default_task_unless_one_is_stated():
    pairs = [
        TrainedPrompt(Prompt("sts", "Alike?", "Alike?"), "pairs", 3.0),
        TrainedPrompt(Prompt("sts", "Same thing?", "Same thing?"), "twins", 1.0),
    ]
    contract = trained_contract(PromptContract(), pairs, 4.0)

    def text(**section):
        config = _with_task(validate(EmbeddingConfig, section, "c"), contract)
        return contract.format("x", config.side, config.task_type), config.recipe["task_type"]

    assert text() == ("Instruct: Alike?\nQuery: x", "sts")
    assert text(task="twins") == ("Instruct: Same thing?\nQuery: x", "twins")
    assert text(task_type="retrieval") == ("x", "retrieval")
    with pytest.raises(ConfigError, match=r"embedding.task: 'twin' is unknown; allowed: .*'?twins"):
        text(task="twin")
    with pytest.raises(ConfigError, match="task is 'twins' beside a task_type"):
        text(task="twins", task_type="sts")
    assert "task" not in EmbeddingConfig().model_dump(mode="json")  # fingerprints of older configs stay


def documents(path, out, limit=None, **config):
    """Rows of a folder of documents, cut for a model of so many words; each word is a token."""
    place, section = Place(str(out)), EmbeddingConfig(**config)
    cutter = None
    if limit is not None:
        tokenizer = load_tokenizer(save_word_tokenizer(out.parent / "words"))
        cutter = Cutter.of(tokenizer, PromptContract(max_document_tokens=limit), section)
    open_input(str(path), section, place, cutter)
    return place.read_tables("documents").to_pylist()


def test_a_folder_of_documents_is_read_whole_though_json_lies_beside_them(tmp_path):
    folder = tmp_path / "site [v2]"
    folder.mkdir()
    for name, content in fakes_documents.every_kind().items():
        (folder / name).write_bytes(content)
    (folder / "_category_.json").write_text("{}")
    (folder / "app.log").write_text("A line.")
    rows = {row["id"]: row for row in documents(folder, tmp_path / "out")}
    names = set(fakes_documents.every_kind()) - {"guide.mbox"}
    assert set(rows) == names | {"guide.mbox#1", "guide.mbox#2"}
    assert rows["guide.md"]["title"] == "Pump guide" and "water" not in rows["guide.md"]["text"]
    assert set(input_state(str(folder))) == set(fakes_documents.every_kind())
    more = documents(folder, tmp_path / "more", read_as={".log": "text"}, titles=False)
    assert "app.log" in [row["id"] for row in more] and {row["title"] for row in more} == {None}


def test_documents_longer_than_the_model_are_cut_into_chunks_and_said(tmp_path, capsys):
    """Three pages that differ in their last line only: the model would not see it."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        sections = "\n\n".join(f"## Part {part}\n\n" + "word " * 30 for part in range(4))
        (tmp_path / "in" / f"{number}.md").write_text(f"# Guide\n\n{sections}\n\nThe end {number}.")
    (tmp_path / "in" / "short.md").write_text("# Short\n\nOne line.")
    rows = documents(tmp_path / "in", tmp_path / "out", limit=40)
    mine = [row for row in rows if row["id"].startswith("1.md")]
    assert [row["id"] for row in mine] == [f"1.md#chunk={number}" for number in (1, 2, 3, 4)]
    assert mine[1]["source"] == "1.md § Part 1" and mine[1]["title"] == "Guide"
    assert mine[3]["text"].endswith("The end 1.")
    assert [row["id"] for row in rows if "short" in row["id"]] == ["short.md"]
    # Title, prompt and text together are what the model reads.
    assert all(len(f"{row['title']} {row['text']}".split()) <= 40 for row in rows)
    assert "3 of 4 documents are longer" in capsys.readouterr().err
    whole = documents(tmp_path / "in", tmp_path / "whole", limit=40, chunks=False)
    assert [row["id"] for row in whole] == ["0.md", "1.md", "2.md", "short.md"]


def test_views_of_texts_are_texts(tmp_path):
    view = pa.array(["one", "two", "one"], pa.string_view())
    table(tmp_path, "in.parquet", id=pa.array(["a", "b", "c"], pa.string_view()), text=view)
    ledger, rows = ledger_rows(tmp_path / "in.parquet", tmp_path / "out")
    assert [row["id"] for row in rows] == ["a", "b", "c"] and ledger.counts["embedded"] == 2


def test_an_identical_repeat_is_counted_and_left_out(tmp_path):
    lines = [{"_id": "d1", "text": "same"}, {"_id": "d1", "text": "same"}, {"_id": "d2", "text": "other"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger, rows = ledger_rows(tmp_path / "in.jsonl", tmp_path / "out")
    assert [row["id"] for row in rows] == ["d1", "d2"] and ledger.counts["rejects"] == {"repeated": 1}


def test_files_in_one_row_group_are_read_once_into_a_copy(tmp_path, monkeypatch):
    """A shard of a file in one row group would decode all rows before its own."""
    monkeypatch.setattr(inputs, "_REGROUPED_ROWS", 10)
    monkeypatch.setattr(corpora, "GROUP_ROWS", 30)
    monkeypatch.setattr(corpora, "run_tasks", serial_tasks)
    small, large = (
        pa.table(
            {
                "id": [f"{name}{n}" for n in range(95)],
                "text": [f"{name} text {n}" for n in range(95)],
                "other": [0] * 95,
            }
        )
        for name in "sl"
    )
    place = Place(str(tmp_path / "in"))
    place.write_table("a.parquet", small)
    (tmp_path / "in").mkdir(exist_ok=True)
    pq.write_table(small, tmp_path / "in" / "a.parquet", row_group_size=30)
    pq.write_table(large, tmp_path / "in" / "b.parquet", row_group_size=95)
    out = Place(str(tmp_path / "out"))
    config = EmbeddingConfig(corpus=place.uri)
    plain = inputs.open_input(place.uri, config, out)
    source = corpora._regrouped(plain, out)
    assert out.files() == ["regrouped/000001.parquet"] and out.parquet_groups("regrouped/000001.parquet") == [
        10
    ] * 9 + [5]
    assert out.parquet_footer("regrouped/000001.parquet")[0].names == ["id", "text"]
    ledger = open_ledger(source, out, 40, None)
    read, slow = (corpora.OwnTexts(one, out, 40) for one in (source, plain))
    for number, part in enumerate(ledger.parts):
        shard = corpora.OwnShard(number, part, True)
        assert read(shard).equals(slow(shard)) and read(shard).num_rows == ledger.rows[number]
    before = (tmp_path / "out" / "regrouped" / "000001.parquet").stat().st_ino
    corpora._regrouped(plain, out)  # an interrupted build goes on with the copy
    assert (tmp_path / "out" / "regrouped" / "000001.parquet").stat().st_ino == before
