"""Pairs of several artefacts become one table of queries in equal parts."""

import pytest

from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.registry import open_model
from embedloom.errors import DataError
from embedloom.mining.queries import inline_id, pair_files, write_queries
from embedloom.mining.stage import room_check
from embedloom.retrieval.embedder import EncoderSource
from fakes_foreign import OLD, make_transformer, write_old_layout
from fakes_mining import document_row, make_corpus, make_synthesis, pair_row

DOCUMENTS = [document_row(f"d{n}", f"text {n}") for n in range(4)]


def written(tmp_path, pairs, others=(), shard_rows=2):
    corpus = make_corpus(tmp_path / "corpus", DOCUMENTS, pairs)
    synthesis = [make_synthesis(tmp_path / "synthesis", others)] if others else []
    out = Place(str(tmp_path / "out"))
    counts = write_queries(pair_files(corpus, synthesis), (corpus.place, "documents/train"), out, shard_rows)
    rows = [row for name in out.names("queries", ".parquet") for row in out.read_table(name).to_pylist()]
    return out, counts, rows


def test_parts_cross_artefacts_and_keep_order(tmp_path):
    natural = [pair_row(f"n{n}", f"query {n}", f"d{n}") for n in range(3)]
    synthetic = [pair_row(f"s{n}", f"other {n}", f"d{n}", origin="synthetic") for n in range(2)]
    out, counts, rows = written(tmp_path, natural, synthetic)
    assert [row["id"] for row in rows] == ["n0", "n1", "n2", "s0", "s1"]
    assert [row["part"] for row in rows] == [f"part-00000{n}.parquet" for n in (0, 0, 1, 1, 2)]
    assert (counts["rows"], counts["pairs"]) == (5, {"public": 3, "synthetic": 2})
    assert counts["parts"] == {"corpus": [f"part-00000{n}.parquet" for n in range(3)]}
    assert counts["given"] == [] and not out.exists("given")


def test_pairs_with_a_name_of_their_own_keep_it(tmp_path):
    natural = [pair_row("n0", "query 0", "d0", dataset="faq"), pair_row("n1", "query 1", "d1")]
    _, counts, rows = written(tmp_path, natural)
    assert [row["dataset"] for row in rows] == ["faq", "public"]
    assert counts["pairs"] == {"faq": 1, "public": 1}


def test_one_query_text_knows_all_its_positives(tmp_path):
    natural = [pair_row("n0", "shared", "d2"), pair_row("n1", "alone", "d1")]
    _, _, rows = written(tmp_path, natural, [pair_row("s0", "shared", "d0", origin="synthetic")])
    assert [row["known_positives"] for row in rows] == [["d0", "d2"], ["d1"], ["d0", "d2"]]


def test_given_texts_the_corpus_lacks_are_listed_once(tmp_path):
    pairs = [
        pair_row("n0", "a", "d0", positive="known anyway"),
        pair_row("n1", "b", "stranger", positive="label yes", negatives=["label no", "label maybe"]),
        pair_row("n2", "c", "stranger", positive="label no", negatives=["label yes"]),
    ]
    out, counts, _ = written(tmp_path, pairs)
    table = out.read_tables("given/unsearched").to_pylist()
    assert [row["text"] for row in table] == ["label yes", "label no", "label maybe"]
    assert [row["id"] for row in table] == [inline_id(row["text"], "retrieval", "") for row in table]
    assert counts["given"] == ["unsearched"]


def test_labels_without_negatives_get_wrong_ones_of_their_own_task(tmp_path):
    """Three labels of one task, two of another; a label is embedded bare, so its task type is retrieval."""
    mood = [("joy", "Name the mood"), ("anger", "Name the mood"), ("fear", "Name the mood")]
    tongue = [("French", "Name the language"), ("Dutch", "Name the language")]
    pairs = [
        pair_row(f"p{n}", f"text {n}", "none", positive=label, task_type="classification", instruction=task)
        for n, (label, task) in enumerate([*mood, *tongue])
    ]
    out, _, rows = written(tmp_path, pairs, shard_rows=9)
    wrong = {row["positive"]: set(row["negatives"]) for row in rows}
    moods = {"joy", "anger", "fear"}
    assert wrong == {label: moods - {label} for label in moods} | {"French": {"Dutch"}, "Dutch": {"French"}}
    assert {row["task_type"] for row in out.read_tables("given/unsearched").to_pylist()} == {"retrieval"}


def test_texts_that_stand_opposite_each_other_are_searched_among_themselves(tmp_path):
    """STS and bitext pairs that the corpus does not hold: a collection per dataset and task type, instructed texts."""
    pairs = [pair_row(f"s{n}", f"left {n}", "none", positive=f"right {n}", task_type="sts") for n in range(3)]
    pairs += [pair_row("b0", "hello", "none", positive="bonjour", task_type="bitext")]
    pairs += [pair_row("b1", "hello you", "none", positive="salut", negatives=["tout"], task_type="bitext")]
    pairs += [pair_row("s9", "left 9", "d1", task_type="sts"), pair_row("r0", "query", "d0")]
    out, counts, rows = written(tmp_path, pairs, shard_rows=9)
    of = {row["id"]: row["collection"] for row in rows}
    assert of == {"s0": "public-sts", "s1": "public-sts", "s2": "public-sts", "b0": "public-bitext",
                  "b1": "corpus", "s9": "corpus", "r0": "corpus"}  # fmt: skip
    assert sorted(counts["given"]) == ["public-bitext", "public-sts", "unsearched"]
    texts = out.read_tables("given/public-sts").to_pylist()
    assert [row["text"] for row in texts] == ["right 0", "right 1", "right 2"]
    assert {row["task_type"] for row in texts} == {"sts"}
    assert {row["document_id"] for row in rows if row["collection"] == "public-sts"} == {
        row["id"] for row in texts
    }
    for names in counts["parts"].values():
        assert all(
            len({row["collection"] for row in out.read_table(f"queries/{name}").to_pylist()}) == 1
            for name in names
        )


def test_every_right_answer_of_a_shared_text_is_known(tmp_path):
    """One text with two labels, one sentence with two translations: neither becomes a negative of the other."""
    task = {"task_type": "multilabel_classification", "instruction": "Topics"}
    pairs = [
        pair_row(f"l{n}", "one text", "none", positive=label, **task)
        for n, label in enumerate(["art", "law"])
    ]
    pairs += [pair_row("l9", "other text", "none", positive="sport", **task)]
    pairs += [
        pair_row(f"b{n}", "hello", "none", positive=text, task_type="bitext")
        for n, text in enumerate(["hola", "salut"])
    ]
    _, _, rows = written(tmp_path, pairs, shard_rows=9)
    of = {row["id"]: row for row in rows}
    assert [of[name]["negatives"] for name in ("l0", "l1")] == [["sport"], ["sport"]]
    assert sorted(of["l9"]["negatives"]) == ["art", "law"]
    assert (
        of["b0"]["known_positives"]
        == of["b1"]["known_positives"]
        == sorted(inline_id(text, "bitext", "Find the text") for text in ("hola", "salut"))
    )
    assert of["b0"]["document_id"] != of["b1"]["document_id"]


def test_unusable_pairs_are_counted(tmp_path):
    pairs = [
        pair_row("a", " ", "d0"),
        pair_row("b", "x", "none"),
        pair_row("c", "x", "none", positive=" "),
        pair_row("d", "y", "d1"),
    ]
    out, counts, rows = written(tmp_path, pairs)
    assert [row["id"] for row in rows] == ["d"]
    assert counts["rejects"] == {"empty_positive": 1, "empty_query": 1, "positive_not_in_corpus": 1}
    assert {row["id"]: row["reason"] for row in out.read_tables("rejects").to_pylist()} == {
        "a": "empty_query", "b": "positive_not_in_corpus", "c": "empty_positive",
    }  # fmt: skip


def test_finished_queries_are_not_written_again(tmp_path):
    out, counts, _ = written(tmp_path, [pair_row("n0", "a", "d0")])
    (out.local / "queries/part-000000.parquet").unlink()
    assert write_queries([], (out, ""), out, 2) == counts
    assert not out.exists("queries/part-000000.parquet")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([pair_row("n0", "a", "d0"), pair_row("n0", "b", "d1")], "pair id 'n0' stands 2 times"),
        ([pair_row("n0", "a", "d0", task_type="juggling")], "pair 'n0': task_type 'juggling' is unknown"),
    ],
)
def test_bad_pairs_are_named(tmp_path, pairs, message):
    with pytest.raises(DataError, match=message):
        written(tmp_path, pairs)


def test_no_pairs_at_all_is_refused(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", DOCUMENTS)
    with pytest.raises(DataError, match="no pairs in"):
        pair_files(corpus, [])
    empty = make_synthesis(tmp_path / "synthesis", [])
    with pytest.raises(DataError, match="no usable pair in"):
        write_queries(
            pair_files(corpus, [empty]), (corpus.place, "documents/train"), Place(str(tmp_path / "o")), 2
        )


def test_pairs_whose_instruction_leaves_a_teacher_nothing_of_a_cut_query_are_rejected_with_the_numbers(
    tmp_path, tiny_model
):
    """Three bytes of query fit beside 18 + 105 and BOS in 128; forty do not, and beside a short instruction all do."""
    long = {"instruction": "y" * 105}
    pairs = [
        pair_row("n0", "abc", "d0", **long), pair_row("n1", "q" * 40, "d1", **long), pair_row("n2", "q" * 40, "d2"),
    ]  # fmt: skip
    corpus = make_corpus(tmp_path / "corpus", DOCUMENTS, pairs)
    teacher = EncoderSource("tiny", tiny_model, PromptContract.load(tiny_model))
    out = Place(str(tmp_path / "out"))
    counts = write_queries(
        pair_files(corpus, []), (corpus.place, "documents/train"), out, 9, room_check([teacher])
    )
    assert (counts["rows"], counts["rejects"]) == (2, {"instruction_too_long": 1})
    (reject,) = out.read_tables("rejects", "rejects").to_pylist()
    assert reject["id"] == "n1"
    assert "teacher 'tiny': the instruction takes 124 tokens" in reject["detail"]
    assert "leaves 4 of the limit of 128 for a query" in reject["detail"]


def test_documents_that_carry_an_instruction_are_looked_at_as_queries_are(tmp_path, tiny_model):
    """Documents have 64 bytes, of which 18 + 40 and BOS leave 5; queries 128, which hold everything here."""
    sts = {"task_type": "sts", "instruction": "y" * 40}
    label = {"task_type": "classification", "instruction": "y" * 40, "negatives": ["no"]}
    pairs = [
        pair_row("s0", "one", "x0", positive="abc", **sts), pair_row("s1", "one", "x1", positive="p" * 30, **sts),
        pair_row("s2", "two", "x2", positive="abc", negatives=["n" * 30], **sts),
        pair_row("c0", "three", "x3", positive="p" * 70, **label), pair_row("n0", "four", "d0", instruction="y" * 40),
    ]  # fmt: skip
    corpus = make_corpus(tmp_path / "corpus", DOCUMENTS, pairs)
    out = Place(str(tmp_path / "out"))
    rooms = room_check([EncoderSource("tiny", tiny_model, PromptContract.load(tiny_model))])
    counts = write_queries(pair_files(corpus, []), (corpus.place, "documents/train"), out, 9, rooms)
    assert (counts["rows"], counts["rejects"]) == (3, {"instruction_too_long": 2})
    rejects = {row["id"]: row["detail"] for row in out.read_tables("rejects", "rejects").to_pylist()}
    assert sorted(rejects) == ["s1", "s2"]
    assert "leaves 5 of the limit of 64 for a document" in rejects["s1"]
    assert "allowed: max_document_tokens of" in rejects["s2"]


def test_the_room_of_a_foreign_teacher_is_known_wherever_its_transformer_lies(tmp_path):
    """The prompt's 35 words and two special tokens leave three of 40: two words fit, four are cut."""
    bert = make_transformer(tmp_path / "bert", limit=300)
    folder = write_old_layout(
        tmp_path / "model", bert, **OLD["0_Transformer"], prompts={"prompts": {"query": "query " * 35}}
    )
    too_long = room_check([EncoderSource("old", folder, open_model(folder).contract)])
    assert too_long("cats dogs", "query", "retrieval", "") is None
    problem = too_long("cats dogs sort list", "query", "retrieval", "")
    assert problem is not None
    assert (
        "teacher 'old': the instruction takes 37 tokens" in problem
        and "leaves 3 of the limit of 40" in problem
    )
