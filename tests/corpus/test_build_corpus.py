"""The corpus stage from end to end (``corpus/stage.py``)."""

import pytest

from embedloom.config.corpus import CorpusConfig, CorpusSource
from embedloom.core.artefacts import Artefact
from embedloom.core.schemas import check_unique_ids, table_from_rows
from embedloom.corpus.stage import build_corpus
from embedloom.errors import DataError
from fakes_corpus import corpus_writer, jsonl_source, save_word_tokenizer, sentence, write_jsonl

NO_SPLIT = {"dev": 0, "test": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_word_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of forty modules with two documented functions each."""
    for package in ("firstdocs", "seconddocs"):
        (tmp_path / package).mkdir()
        for number in range(40):
            functions = [
                f'def f{index}():\n    """Summary of {package} {number} {index}.\n\n    {body(package, number, index)}\n    """\n'
                for index in range(2)
            ]
            (tmp_path / package / f"m{number}.py").write_text("\n".join(functions))
    monkeypatch.syspath_prepend(tmp_path)
    return CorpusSource(format="python_docs", packages=("firstdocs", "seconddocs"))


def key_of(package, number, index):
    return (package == "firstdocs") * 1000 + number * 10 + index


def body(package, number, index):
    return sentence(key_of(package, number, index), 30)


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))
    }


def build(tmp_path, tokenizer, records, **settings):
    source = jsonl_source(write_jsonl(tmp_path / "in.jsonl", records), **settings.pop("columns", {}))
    config = CorpusConfig(sources=(source,), **{"split": NO_SPLIT, "min_characters": 10, **settings})
    return build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "out"))


def rejected(artefact):
    return [
        (row["id"], row["reason"]) for row in artefact.place.read_tables("rejects", "rejects").to_pylist()
    ]


def test_python_docs_end_to_end_twice_gives_the_same_bytes(tmp_path, tokenizer, packages):
    config = CorpusConfig(sources=(packages,), chunk_tokens=16, split={"dev": 0.2, "test": 0.3})
    for name in ("a", "b"):
        artefact = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / name))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    counts = artefact.counts
    assert counts["read"] == counts["pairs"] == 160
    assert (
        counts["rows"] == 320 == counts["train"] + counts["dev"] + counts["test"]
    )  # 30 words in chunks of 16
    assert counts["tokens"] == 160 * 30
    assert counts["rejects"] == {}
    assert sum(counts["groups"].values()) == 80
    modules: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        documents = artefact.place.read_tables(f"documents/{split}", "documents")
        check_unique_ids(documents, split)
        ids = set(documents["id"].to_pylist())
        for row in documents.to_pylist():
            modules.setdefault(row["source"].rsplit(".", 1)[0], set()).add(split)
        pairs = artefact.place.read_tables(f"pairs/{split}", "pairs").to_pylist()
        assert len(pairs) == counts["pairs_by_split"][split]
        assert {pair["document_id"] for pair in pairs} <= ids
        assert {(p["origin"], p["task_type"], p["lang"], p["document_lang"]) for p in pairs} == {
            ("public", "retrieval", "eng", "eng")
        }
    assert len(modules) == 80 and all(len(splits) == 1 for splits in modules.values())


def test_a_pair_points_to_the_first_chunk(tmp_path, tokenizer, packages):
    config = CorpusConfig(sources=(packages,), chunk_tokens=16, split=NO_SPLIT)
    artefact = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "out"))
    documents = {row["id"]: row for row in artefact.place.read_tables("documents/train").to_pylist()}
    for pair in artefact.place.read_tables("pairs/train", "pairs").to_pylist():
        package, number, index = pair["query"].removesuffix(".").split()[2:]
        text = documents[pair["document_id"]]["text"]
        assert text.startswith(f"word{key_of(package, int(number), int(index))}x0 ")


def test_another_seed_holds_out_other_groups(tmp_path, tokenizer, packages):
    config = CorpusConfig(sources=(packages,))
    held_out = [
        build_corpus(config, seed, tokenizer, corpus_writer(tmp_path / str(seed))).place.read_tables(
            "documents/test"
        )
        for seed in (1, 2)
    ]
    assert set(held_out[0]["id"].to_pylist()) != set(held_out[1]["id"].to_pylist())


def test_rejects_are_counted_with_their_reasons(tmp_path, tokenizer):
    long = sentence(1, 60)
    records = [
        {"text": long, "key": "b"},
        {"text": f"{long} more", "key": "c"},
        {"text": long.upper(), "key": "a"},
        {"text": None, "key": "d"},
        {"text": "short", "key": "e"},
        {"text": sentence(2), "key": "f"},
    ]
    artefact = build(tmp_path, tokenizer, records, columns={"id_column": "key"})
    assert artefact.counts["rejects"] == {"duplicate": 1, "empty": 1, "near_duplicate": 1, "too_short": 1}
    assert rejected(artefact) == [
        ("d", "empty"),
        ("e", "too_short"),
        ("b", "duplicate"),
        ("c", "near_duplicate"),
    ]
    # The first in id order stays, and keeps the id the source gave it.
    assert artefact.place.read_tables("documents/train")["id"].to_pylist() == ["a", "f"]
    assert not artefact.place.exists("pairs")


def test_null_threshold_keeps_near_duplicates_and_null_chunk_keeps_documents_whole(tmp_path):
    long = sentence(1, 60)
    artefact = build(
        tmp_path, tmp_path / "no-tokenizer-needed", [{"text": long}, {"text": f"{long} more"}],
        near_duplicate_threshold=None, chunk_tokens=None,
    )  # fmt: skip
    assert artefact.counts["rows"] == 2 and "tokens" not in artefact.counts


def beir_corpus(folder, texts, queries, judgements):
    """A BEIR folder of documents d0.., queries q0.. and lines of (query, document, grade)."""
    write_jsonl(
        folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts)]
    )
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(queries)])
    (folder / "qrels").mkdir()
    lines = [f"q{query}\td{document}\t{grade}\n" for query, document, grade in judgements]
    (folder / "qrels" / "train.tsv").write_text("".join(lines))
    return CorpusSource(format="beir", path=str(folder))


def pairs_of(artefact, split="train"):
    return artefact.place.read_tables(f"pairs/{split}", "pairs").to_pylist()


def test_a_query_keeps_every_document_that_answers_it(tmp_path, tokenizer):
    """Two queries alike but for case and blanks with a document each, and two rows of one query and document."""
    source = beir_corpus(
        tmp_path / "beir",
        [sentence(n) for n in range(3)],
        ["same query", "Same  Query", "another", "another"],
        [(0, 1, 1), (1, 0, 1), (2, 2, 1), (3, 2, 1)],
    )
    config = CorpusConfig(sources=(source,), split=NO_SPLIT)
    artefact = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "out"))
    assert [(p["query"], p["document_id"], p["lang"]) for p in pairs_of(artefact)] == [
        ("Same Query", "d0", "und"),
        ("same query", "d1", "und"),
        ("another", "d2", "und"),
    ]
    assert artefact.counts["rejects"] == {"duplicate_query": 1}


def test_judgements_of_what_is_not_there_are_counted_rejects(tmp_path, tokenizer, capsys):
    """d7 is judged for two queries and d8 for one, of no document; q9 is no query; a grade of 0 asks for nothing."""
    judged = [(0, 0, 1), (0, 7, 1), (1, 7, 2), (1, 8, 1), (9, 1, 1), (8, 1, 0)]
    source = beir_corpus(tmp_path / "beir", [sentence(n) for n in range(2)], ["first", "second"], judged)
    config = CorpusConfig(sources=(source,), split=NO_SPLIT)
    artefact = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "out"))
    assert artefact.counts["rejects"] == {"judged_document_missing": 2, "judged_query_missing": 1}
    rejects = artefact.place.read_tables("rejects", "rejects").to_pylist()
    assert {(row["id"], row["detail"]) for row in rejects} == {
        ("d7", "not in corpus.jsonl; answers 2 train queries"), ("d8", "not in corpus.jsonl; answers 1 train queries"),
        ("q9", "qrels/train.tsv: not in queries.jsonl"),
    }  # fmt: skip
    assert [(p["query"], p["document_id"]) for p in pairs_of(artefact)] == [("first", "d0")]
    assert "2 rejects of reason judged_document_missing" in capsys.readouterr().err


def test_every_judged_document_is_a_pair_with_its_grade(tmp_path, tokenizer):
    source = beir_corpus(
        tmp_path / "beir",
        [sentence(n) for n in range(4)],
        ["first", "second"],
        [(0, 0, "2.0"), (0, 1, 1), (0, 2, 0), (1, 2, 1), (1, 3, 3), (1, 0, -1)],
    )
    config = CorpusConfig(sources=(source,), split=NO_SPLIT)
    artefact = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "out"))
    assert {(p["query"], p["document_id"]): p["attributes"] for p in pairs_of(artefact)} == {
        ("first", "d0"): '{"grade": 2.0}', ("first", "d1"): None, ("second", "d2"): None,
        ("second", "d3"): '{"grade": 3.0}',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "threshold"),
    [
        (["One  answer for all of them here", "one answer FOR all of them here"] * 2, None),
        ([sentence(1, 60), f"{sentence(1, 60)} more", f"{sentence(1, 60)} less", sentence(1, 60)], 0.8),
    ],
    ids=["exact", "near"],
)
def test_a_dropped_duplicate_leaves_its_questions_to_the_document_that_stays(
    tmp_path, tokenizer, answers, threshold
):
    """Four rows of two sources and two languages whose answers repeat: one document, all four questions."""
    records = [{"q": f"question {n}", "a": text} for n, text in enumerate(answers)]
    columns = {"text_column": "a", "query_column": "q"}
    sources = (
        jsonl_source(write_jsonl(tmp_path / "a.jsonl", records[:2]), lang="eng", dataset="faq", **columns),
        jsonl_source(
            write_jsonl(tmp_path / "b.jsonl", records[2:]), lang="deu", instruction="Finde es", **columns
        ),
    )
    config = CorpusConfig(
        sources=sources, split=NO_SPLIT, near_duplicate_threshold=threshold, min_characters=10
    )
    artefact = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "out"))
    (document,) = artefact.place.read_tables("documents/train").to_pylist()
    pairs = pairs_of(artefact)
    assert {pair["document_id"] for pair in pairs} == {document["id"]}
    assert {pair["document_lang"] for pair in pairs} == {document["lang"]}
    # Each question keeps what its own source says of it.
    assert {p["query"]: (p["lang"], p["dataset"]) for p in pairs} == {
        "question 0": ("eng", "faq"), "question 1": ("eng", "faq"),
        "question 2": ("deu", None), "question 3": ("deu", None),
    }  # fmt: skip
    assert {p["instruction"] for p in pairs if p["lang"] == "deu"} == {"Finde es"}
    assert artefact.counts["pairs"] == 4 and artefact.counts["pairs_of_duplicates"] == 3
    assert sum(artefact.counts["rejects"].values()) == 3


def test_a_question_is_asked_in_one_split_with_all_its_documents_there(tmp_path, tokenizer):
    """Forty documents answer one question: those of the best one's split are its pairs, the others are counted."""
    grades = {0: 1, 7: 2, **{n: 1 for n in range(1, 40) if n != 7}}
    source = beir_corpus(
        tmp_path / "beir",
        [sentence(n) for n in range(40)],
        ["the question"],
        [(0, document, grade) for document, grade in grades.items()],
    )
    config = CorpusConfig(sources=(source,), split={"dev": 0.3, "test": 0.3})
    artefact = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "out"))
    documents = {
        split: set(artefact.place.read_tables(f"documents/{split}")["id"].to_pylist())
        for split in ("train", "dev", "test")
    }
    assert all(documents.values())
    best = next(split for split, ids in documents.items() if "d7" in ids)
    assert {pair["document_id"] for pair in pairs_of(artefact, best)} == documents[best]
    assert artefact.counts["pairs"] == len(documents[best])
    assert artefact.counts["rejects"] == {"query_in_other_split": 40 - len(documents[best])}


def test_nothing_left_after_cleaning_states_the_counts(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"no document is left of 2 read; rejects: {'empty': 1, 'too_short': 1}; .*is 10"
    ):
        build(tmp_path, tokenizer, [{"text": ""}, {"text": "x"}])


def test_one_id_for_two_texts_is_refused(tmp_path, tokenizer):
    records = [{"text": sentence(number), "key": "same"} for number in (1, 2)]
    with pytest.raises(DataError, match=r"id 'same' stands for two texts \(.*in.jsonl:1 and .*in.jsonl:2\)"):
        build(tmp_path, tokenizer, records, columns={"id_column": "key"})


def test_no_training_group_is_refused_and_an_empty_test_split_is_noted(tmp_path, tokenizer, capsys):
    records = [{"text": sentence(1), "key": "only"}]
    columns = {"id_column": "key"}
    with pytest.raises(
        DataError, match=r"corpus.split: none of the 1 groups falls to train \(dev 0, test 0.99, seed 42"
    ):
        build(tmp_path, tokenizer, records, columns=columns, split={"dev": 0, "test": 0.99})
    artefact = build(tmp_path, tokenizer, records, columns=columns, split={"dev": 0, "test": 0.01})
    assert (artefact.counts["train"], artefact.counts["test"]) == (1, 0)
    assert artefact.counts["groups"]["test"] == 0
    assert "the test split is empty" in capsys.readouterr().err


def test_an_interrupted_build_leaves_no_part_behind(tmp_path, tokenizer):
    writer = corpus_writer(tmp_path / "out")
    stale = table_from_rows("documents", [{"id": "stale", "text": "t", "source": "s"}])
    writer.place.write_table("documents/test/part-000000.parquet", stale)
    with pytest.raises(DataError, match="unfinished"):
        Artefact.open(writer.place)
    artefact = build(tmp_path, tokenizer, [{"text": sentence(1)}])
    assert not artefact.place.exists("documents/test")
    assert Artefact.open(artefact.place, "corpus").counts == artefact.counts


def test_pairs_carry_the_name_that_training_asks_for(tmp_path, tokenizer):
    records = [{"text": sentence(number, 20), "ask": f"what is number {number}?"} for number in range(4)]
    columns = {"query_column": "ask", "dataset": "faq"}
    corpus = build(tmp_path, tokenizer, records, columns=columns, chunk_tokens=None)
    pairs = corpus.place.read_tables("pairs/train", "pairs").to_pylist()
    assert {(pair["dataset"], pair["origin"]) for pair in pairs} == {("faq", "public")}
    assert {pair["query"] for pair in pairs} == {record["ask"] for record in records}
    texts = dict(
        zip(
            *corpus.place.read_tables("documents/train").select(["id", "text"]).to_pydict().values(),
            strict=True,
        )
    )
    asked = {record["ask"]: record["text"] for record in records}
    assert all(texts[pair["document_id"]] == asked[pair["query"]] for pair in pairs)
