"""What is judged relevant to a query never becomes its negative, by id or by text; worked by hand, without teachers."""

import pyarrow as pa
import pytest

from embedloom.config.mining import SelectionConfig
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.mining.candidates import SCORES_SCHEMA, Mined, given_texts
from embedloom.mining.examples import ExampleWorker
from embedloom.mining.queries import pair_files, write_queries
from fakes_mining import document_row, make_corpus, make_synthesis, pair_row

NAIVE = SelectionConfig(method="naive", negatives=4)


def examples(folder, documents, pairs, ranked, selection=NAIVE, others=(), chunks=()):
    """Examples, rejects and audit rows of pairs whose candidates are ``ranked`` (best first, scores 0.9, 0.8, ...)."""
    corpus = make_corpus(folder / "corpus", documents, pairs)
    more = [make_synthesis(folder / "synthesis", others)] if others else []
    out = Place(str(folder / "mining"))
    counts = write_queries(pair_files(corpus, more), (corpus.place, "documents/train"), out, 100)
    (name,) = out.names("queries", ".parquet")
    rows = out.read_table(name).to_pylist()
    candidates = [
        {
            "query_id": row["id"], "document_ids": ranked, "scores": [0.9 - 0.1 * n for n in range(len(ranked))],
            "teacher": "t", "contract_hash": "h",
        }
        for row in rows
    ]  # fmt: skip
    scores = [
        {
            "query_id": row["id"], "teacher": "t", "positive_score": 0.85, "lowest_score": 0.85,
            "given_scores": [0.2] * len(row["negatives"] or ()),
        }
        for row in rows
    ]  # fmt: skip
    assert all(len(given_texts(row)) >= len(row["negatives"] or ()) for row in rows)
    out.write_table("candidates/part-000000.parquet", table_from_rows("candidates", candidates))
    out.write_table("positive_scores/part-000000.parquet", pa.Table.from_pylist(scores, schema=SCORES_SCHEMA))
    if chunks:
        corpus.place.write_table("chunks/part-000000.parquet", table_from_rows("chunks", chunks))
    texts = [(corpus.place, "documents/train"), *((out, f"given/{group}") for group in counts["given"])]
    mined = Mined(out, ("part-000000.parquet",), 1, tuple(texts), corpus.place)
    worker = ExampleWorker(selection, mined)
    tables = worker(out.read_table(name))
    found = {row["id"]: row["negatives"] for row in tables["examples"].to_pylist()}
    return (
        found,
        tables["rejects"].to_pylist(),
        {row["query_id"]: row for row in tables["audit"].to_pylist()},
        counts,
    )


DOCUMENTS = [
    document_row("d1", "first answer"), document_row("d2", "zweite Antwort"), document_row("d3", "wrong one"),
    document_row("d4", "First  Answer"), document_row("d5", "far off"),
]  # fmt: skip


def test_all_documents_of_a_question_are_positives_in_every_row_and_language(tmp_path):
    """d1 and d2 answer it, asked in two spellings and two artefacts; d4 is d1 but for case: d3 and d5 are left."""
    natural = [pair_row("n1", "What is it?", "d1"), pair_row("n2", "Other", "d5")]
    synthetic = [pair_row("s1", "what  is IT?", "d2", origin="synthetic", instruction="Finde", lang="de")]
    found, rejects, audit, _ = examples(
        tmp_path, DOCUMENTS, natural, ["d2", "d4", "d1", "d3", "d5"], others=synthetic
    )
    assert found["n1"] == found["s1"] == ["wrong one", "far off"]
    assert rejects == []
    # d4 stands for d1, so two different texts of right answers were looked at.
    assert audit["n1"]["removed_as_positive"] == audit["s1"]["removed_as_positive"] == 2
    assert found["n2"] == ["zweite Antwort", "first answer", "wrong one"]


def test_a_document_that_is_the_query_itself_is_no_negative(tmp_path):
    pairs = [pair_row("n1", "Wrong  one", "d1")]
    found, _, _, _ = examples(tmp_path, DOCUMENTS, pairs, ["d3", "d2", "d5"])
    assert found == {"n1": ["zweite Antwort", "far off"]}


def test_answers_that_came_as_text_count_where_the_corpus_holds_them_under_another_id(tmp_path):
    pairs = [
        pair_row("n1", "what?", "d1"), pair_row("n2", "What?", "elsewhere", positive="WRONG one"),
    ]  # fmt: skip
    found, _, _, _ = examples(tmp_path, DOCUMENTS, pairs, ["d3", "d2", "d5"])
    assert found["n1"] == ["zweite Antwort", "far off"]


@pytest.mark.parametrize("document", ["d1", "elsewhere"])
def test_given_negatives_that_are_right_answers_are_taken_out_and_counted(tmp_path, document):
    """Of three given negatives one is the row's positive, one the other row's; a row with no other is rejected."""
    pairs = [
        pair_row("n1", "what?", document, positive="first answer", negatives=["First answer ", "zweite  antwort", "no"]),
        pair_row("n2", "What?", "d2", negatives=["first answer"]),
        pair_row("n3", "else?", "d5", negatives=["FAR off", "yes"]),
    ]  # fmt: skip
    found, rejects, _, counts = examples(tmp_path, DOCUMENTS, pairs, ["d3", "d5"])
    assert found["n1"] == ["no"] and found["n3"] == ["yes"]
    if "n2" in found:  # nothing given is left, so its negatives are mined
        assert found["n2"] == ["wrong one", "far off"]
    else:
        assert [(row["id"], row["reason"]) for row in rejects] == [("n2", "negative_is_positive")]
    assert counts["cleaned"].get("negative_is_positive", 0) >= 1


def test_a_label_that_is_right_under_one_task_is_wrong_under_another(tmp_path):
    pairs = [
        pair_row("a1", "a text", "none", positive="yes", negatives=["no"], task_type="classification", instruction="Short?"),
        pair_row("b1", "a text", "none", positive="no", negatives=["yes"], task_type="classification", instruction="Long?"),
        pair_row("c1", "A text", "none", positive="maybe", negatives=["yes", "no"], task_type="classification", instruction="Short?"),
    ]  # fmt: skip
    found, _, _, _ = examples(tmp_path, DOCUMENTS, pairs, ["d1"])
    assert found == {"a1": ["no"], "b1": ["yes"], "c1": ["no"]}


def test_the_pieces_of_a_judged_document_are_no_negatives_of_its_question(tmp_path):
    """d1 was cut into d1, d2 and d3, of which the first is judged; a piece that lies in another split is not searched."""
    chunks = [
        {"id": name, "document_id": "whole", "chunk": n, "chunks": 4}
        for n, name in enumerate(["d1", "d2", "d3", "in-dev"], start=1)
    ]
    pairs = [pair_row("n1", "what?", "d1"), pair_row("n2", "else?", "d5")]
    found, _, audit, _ = examples(tmp_path, DOCUMENTS, pairs, ["d2", "d3", "d1", "d5"], chunks=chunks)
    assert found == {"n1": ["far off"], "n2": ["zweite Antwort", "wrong one", "first answer"]}
    assert audit["n1"]["removed_as_positive"] == 3
