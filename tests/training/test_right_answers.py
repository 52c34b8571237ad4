"""No right answer to a query is its negative: over rows, sources and further positives, as the model sees the texts."""

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.config.training import TrainingSource
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.training.data import (
    KEY_SCHEMA,
    ExampleStore,
    RightAnswers,
    preparation_counts,
    prepare_sources,
)
from fakes_corpus import write_jsonl
from fakes_training import training_config


def flag(folder, rows, name="a", **settings):
    """A source of (query, positives, negatives) rows."""
    lines = [{"id": f"{name}{n}", "query": q, "pos": p, "neg": k} for n, (q, p, k) in enumerate(rows)]
    path = write_jsonl(folder / f"{name}.jsonl", lines)
    return TrainingSource(name=name, format="flagembedding", path=str(path), **settings)


@pytest.fixture
def prepare(tiny_model, tmp_path):
    """Prepares sources; gives their indexes and the store of their rows."""

    def call(*sources, negatives=2, **changes):
        data = Place(str(tmp_path / "data"))
        found = prepare_sources("t", training_config(**changes), negatives, sources, None, tiny_model, data)
        folders = {name: index["folder"] for name, index in found.items()}
        return found, ExampleStore(data, folders, negatives)

    return call


def texts(store):
    """(query, documents) of every row, read back from its bytes; token 3 + n is byte n of the alphabet."""
    from fakes import byte_tokenizer

    tokenizer = byte_tokenizer()
    return [
        (
            tokenizer.decode(group.query, skip_special_tokens=True).split("Query: ")[-1],
            [tokenizer.decode(ids, skip_special_tokens=True) for ids in group.documents],
        )
        for group in store.groups(range(sum(store.sizes.values())))
    ]


LONG = "x" * 70  # more than the 64 bytes that the model reads of a document


@pytest.mark.parametrize(
    ("positive", "same"),
    [
        ("The answer", "The answer"),
        ("The answer", "The answer "),
        ("The answer", "the\n Answer"),
        ("caf\u00e9 ist zu", "cafe\u0301 ist zu"),
        (f"{LONG} one end", f"{LONG} another end"),
    ],
    ids=["equal", "trailing-blank", "case-and-blanks", "composed-accent", "equal-up-to-the-limit"],
)
def test_a_negative_that_is_the_positive_is_taken_out_and_a_row_of_nothing_else_is_rejected(
    prepare, tmp_path, positive, same
):
    rows = [("q 1", [positive], [same]), ("q 2", [positive], [same, "wrong"]), ("q 3", ["p"], ["n"])]
    found, store = prepare(flag(tmp_path, rows))
    assert found["a"]["rejects"] == {"negative_is_positive": 1}
    assert found["a"]["cleaned"] == {"negative_is_positive": 1}
    assert [documents[1:] for _, documents in texts(store)] == [["wrong", "wrong"], ["n", "n"]]
    counts = preparation_counts(found)
    assert counts["rejects"] == counts["cleaned"] == {"negative_is_positive": 1}
    assert counts["repeated_negatives"] == 2


def test_a_negative_that_is_the_query_is_taken_out_but_a_label_may_be(prepare, tmp_path):
    rows = [("Joy", ["happiness"], ["joy ", "anger"])]
    found, _ = prepare(flag(tmp_path, rows))
    assert found["a"]["cleaned"] == {"negative_is_query": 1}
    labels, _ = prepare(flag(tmp_path, rows, "b", task_type="classification"))
    assert labels["b"]["cleaned"] == {}


@pytest.mark.parametrize("format", ["flagembedding", "nemo_json", "embed_nemotron", "beir"])
def test_a_rows_further_positives_are_no_negatives_in_any_format(prepare, tmp_path, format):
    """Two right documents in two languages, one of them given as a negative too, by its own id or by another's."""
    documents = {
        "d1": "the first answer",
        "d2": "die zweite Antwort",
        "d3": "Die zweite  Antwort",
        "d4": "wrong",
    }
    source = MAKERS[format](tmp_path / format, documents, ["d1", "d2"], ["d3", "d4"])
    found, store = prepare(source)
    assert texts(store) == [("what?", ["the first answer", "wrong", "wrong"])]
    assert found["s"]["cleaned"] == {"negative_is_positive": 1}
    (group,) = store.groups([0])
    assert len(group.right_keys) == 2 and group.right_keys[0] == group.document_keys[0]


def make_flag(folder, documents, right, wrong):
    rows = [("what?", [documents[name] for name in right], [documents[name] for name in wrong])]
    folder.mkdir()
    return flag(folder, rows, "s")


def make_beir(folder, documents, right, wrong):
    write_jsonl(folder / "corpus.jsonl", [{"_id": name, "text": text} for name, text in documents.items()])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "what?"}])
    (folder / "qrels").mkdir()
    lines = [f"q\t{name}\t{grade}\n" for names, grade in ((right, "1.0"), (wrong, 0)) for name in names]
    (folder / "qrels" / "train.tsv").write_text("".join(lines) + "\n")
    return TrainingSource(name="s", format="beir", path=str(folder))


def write_corpus(path, documents):

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(documents), "text": list(documents.values())})
    pa.parquet.write_table(table, path)


def make_nemo(folder, documents, right, wrong):
    write_corpus(folder / "c" / "corpus.parquet", documents)
    (folder / "c" / "merlin_metadata.json").write_text(json.dumps({"corpus_id": "c"}))
    row = {
        "question_id": "q", "question": "what?", "corpus_id": "c",
        "pos_doc": [{"id": name} for name in right], "neg_doc": [{"id": name} for name in wrong],
    }  # fmt: skip
    (folder / "train.json").write_text(json.dumps({"corpus": {"path": "c"}, "data": [row]}))
    return TrainingSource(name="s", format="nemo_json", path=str(folder / "train.json"))


def make_nemotron(folder, documents, right, wrong):

    write_corpus(folder / "corpus.parquet", documents)
    (folder / "dataset_metadata.json").write_text(json.dumps({"ids_only": False}))
    columns = {
        "question_id": ["q"], "question": ["what?"], "pos_doc": [[{"id": name} for name in right]],
        "neg_doc": [[{"id": name} for name in wrong]],
    }  # fmt: skip
    pa.parquet.write_table(pa.table(columns), folder / "queries.parquet")
    return TrainingSource(name="s", format="embed_nemotron", path=str(folder))


MAKERS = {
    "flagembedding": make_flag, "beir": make_beir, "nemo_json": make_nemo, "embed_nemotron": make_nemotron,
}  # fmt: skip


def test_right_answers_of_other_rows_and_sources_are_no_negatives(prepare, tmp_path):
    """One question in two sources, another in two rows of one; a row that this leaves with nothing is rejected."""
    first = flag(
        tmp_path,
        [
            ("Where is it?", ["in Rome"], ["in  rom", "in Oslo"]),
            ("twice", ["right 1"], ["right 2", "wrong"]),
            ("twice", ["right 2"], ["RIGHT 1"]),
            ("alone", ["in Rom"], ["in Rome"]),
        ],
        "a",
    )
    second = flag(tmp_path, [("where  is it?", ["in Rom"], ["nowhere"])], "b", instruction="Finde den Ort")
    found, store = prepare(first, second)
    assert texts(store) == [
        ("Where is it?", ["in Rome", "in Oslo", "in Oslo"]),
        ("twice", ["right 1", "wrong", "wrong"]),
        ("alone", ["in Rom", "in Rome", "in Rome"]),
        ("where  is it?", ["in Rom", "nowhere", "nowhere"]),
    ]
    assert found["a"]["cleaned"] == {"negative_is_positive": 2}
    assert found["a"]["rejects"] == {"negative_is_positive": 1}
    assert (found["a"]["parts"], found["b"]["parts"]) == ([3], [1])
    # Rows 0, 1 and 2 have one negative of their own left, row 3 too: two are wanted.
    assert preparation_counts(found)["repeated_negatives"] == 4
    rome, twice, alone, rom = store.groups(range(4))
    assert rome.query_key == rom.query_key != alone.query_key
    assert set(rome.right_keys) == set(rom.right_keys) and len(rome.right_keys) == len(twice.right_keys) == 2
    assert store.lengths(range(4)) == [group.lengths for group in (rome, twice, alone, rom)]


def test_rows_of_our_own_examples_know_each_others_answers(prepare, tmp_path):
    rows = [
        {
            "id": f"e{n}", "query": query, "query_instruction": "Find", "positive": positive, "positive_score": 0.9,
            "negatives": negatives, "negative_scores": [0.1] * len(negatives), "task_type": "retrieval", "dataset": "d",
        }
        for n, (query, positive, negatives) in enumerate([
            ("How to zip", "Use zip.", ["Use tar.", "Never."]), ("how to zip", "Use tar.", ["Use zip.", "Never."]),
        ])
    ]  # fmt: skip
    Place(str(tmp_path / "mined")).write_table("examples/part-0.parquet", table_from_rows("examples", rows))
    source = TrainingSource(name="e", format="examples", path=str(tmp_path / "mined"))
    _, store = prepare(source, negatives=1)
    assert [documents for _, documents in texts(store)] == [["Use zip.", "Never."], ["Use tar.", "Never."]]


def test_a_text_may_have_another_label_in_another_task(prepare, tmp_path):
    """ "yes" is right for one task and wrong for the other, and both rows stay as they are."""
    one = flag(
        tmp_path, [("a text", ["yes"], ["no"])], "a", task_type="classification", instruction="Is it short?"
    )
    two = flag(
        tmp_path, [("a text", ["no"], ["yes"])], "b", task_type="classification", instruction="Is it long?"
    )
    found, store = prepare(one, two, negatives=1)
    assert [documents for _, documents in texts(store)] == [["yes", "no"], ["no", "yes"]]
    assert preparation_counts(found) == {"repeated_negatives": 0, "rejects": {}}
    both = flag(
        tmp_path,
        [("a text", ["no"], ["yes", "maybe"])],
        "c",
        task_type="classification",
        instruction="Is it short?",
    )
    rows = [("a text", ["yes"], ["no"]), ("another text", ["yes"], ["no"])]
    one = flag(tmp_path, rows, "d", task_type="classification", instruction="Is it short?")
    found, store = prepare(both, one, negatives=1)
    assert found["d"]["rejects"] == {"negative_is_positive": 1}
    assert [documents for _, documents in texts(store)] == [["no", "maybe"], ["yes", "no"]], (
        "row a has nothing left"
    )


ROW = st.tuples(
    st.integers(0, 4),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.lists(st.integers(0, 9), max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(ROW, min_size=1, max_size=6), min_size=1, max_size=3))
def test_right_answers_equal_a_look_at_all_pairs_of_rows(sources):
    tables = [
        pa.table(
            dict(zip(KEY_SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True)), schema=KEY_SCHEMA
        )
        for rows in sources
    ]
    answers = RightAnswers(tables)
    right = {}
    for query, rights, _ in (row for rows in sources for row in rows):
        right.setdefault(query, set()).update(rights)
    several = {query: found for query, found in right.items() if len(found) > 1}  # a row alone knows its own
    for query in right:
        assert set(answers.of(query)) == several.get(query, set())
    for table, rows in zip(tables, sources, strict=True):
        wrong = any(key in several.get(query, ()) for query, _, negatives in rows for key in negatives)
        assert answers.touches(table) is wrong


def test_rows_whose_instruction_fills_the_limit_are_counted_and_a_source_of_such_rows_is_refused(
    prepare, tmp_path, capsys
):
    """64 rows of one instruction of 110 bytes, of a limit of 128: with its template nothing is left to the text."""
    rows = [(f"question number {n} of many", ["p"], ["n"]) for n in range(64)]
    numbers = r"the instruction takes 129 tokens .* leaves 0 of the limit of 128 for a query"
    with pytest.raises(
        DataError, match=rf"source 'a': no usable row; rejects: {{'instruction_too_long': 64}}; {numbers}"
    ):
        prepare(flag(tmp_path, rows, instruction="y" * 110))
    # 100 bytes leave 9, one more than must be.
    _, store = prepare(flag(tmp_path, rows, "c", instruction="y" * 100))
    assert len(store.groups(range(64))) == 64
    lines = [
        {"query": "question number one", "pos": ["p"], "neg": ["n"], "prompt": prompt}
        for prompt in ("Find", "y" * 110)
    ]
    path = write_jsonl(tmp_path / "own.jsonl", lines)
    found, _ = prepare(TrainingSource(name="o", format="flagembedding", path=str(path)), negatives=1)
    assert found["o"]["rejects"] == {"instruction_too_long": 1} and found["o"]["parts"] == [1]
    assert "takes 129 tokens" in capsys.readouterr().err


def test_the_instruction_of_a_document_may_fill_its_limit_too(prepare, tmp_path):
    source = flag(tmp_path, [("q", ["p" * 9], ["n"])], task_type="sts", instruction="y" * 50)
    with pytest.raises(DataError, match=r"takes 69 tokens .* leaves 0 of the limit of 64 for a document"):
        prepare(source)


def test_cut_texts_are_counted_and_said(prepare, tmp_path, capsys):
    """A positive of 100 bytes under a limit of 64 with BOS: 63 are read, 37 left out; of 10,000 the estimate is exact."""
    rows = [("q", ["a" * 100], ["n"]), ("r", ["word " * 2000], ["n"])]
    found, _ = prepare(flag(tmp_path, rows), negatives=1)
    counts = preparation_counts(found)
    assert (counts["texts_cut"], counts["tokens_left_out"]) == (2, 37 + 10_000 - 63)
    assert "2 of 6 texts cut" in capsys.readouterr().err
