"""Queries that are taken out of plain documents."""

import pytest

from embedloom.config.base import validate
from embedloom.config.corpus import CorpusSource
from embedloom.corpus.clean import SourceRow
from embedloom.corpus.pseudo_queries import first_sentence, with_query
from embedloom.corpus.sources import read_source
from embedloom.errors import ConfigError
from fakes_corpus import jsonl_source, write_jsonl


@pytest.mark.parametrize(
    ("text", "sentence", "rest"),
    [
        ("Rivers flow north. They carry sand.", "Rivers flow north.", "They carry sand."),
        ("Is 3.14 enough? Nearly.", "Is 3.14 enough?", "Nearly."),
        ("A heading\nand its text", "A heading", "and its text"),
        ("東京は首都です。大阪は西です。", "東京は首都です。", "大阪は西です。"),
        ("नदी उत्तर बहती है। रेत", "नदी उत्तर बहती है।", "रेत"),
        ("  One. Two.", "One.", "Two."),
        ("no end at all", "", "no end at all"),
    ],
)
def test_first_sentence_and_what_follows(text, sentence, rest):
    assert first_sentence(text) == (sentence, rest)


def row(text, title=None):
    return SourceRow(text=text, source="here", title=title)


def test_the_query_is_no_longer_in_the_document():
    found = with_query(row("Rivers flow north. They carry sand."), "first_sentence", None)
    assert found.queries == ("Rivers flow north.",) and found.text == "They carry sand."
    found = with_query(row("They carry sand.", "How rivers flow"), "title", "Find the page")
    assert found.queries == ("How rivers flow",) and found.title is None and found.text == "They carry sand."
    assert found.instruction == "Find the page"


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        ("title", row("A text.")),
        ("title", row("A text.", "FAQ")),  # asks nothing
        ("first_sentence", row("One sentence alone.")),
        ("first_sentence", row("word " * 100 + ". Rest")),  # no sentence is so long
        ("first_sentence", row("Ends with a mark.\n\n")),
    ],
)
def test_a_document_without_a_query_stays_as_it_is(kind, document):
    assert with_query(document, kind, None) is document


def test_a_source_gives_the_pairs(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": f"Chapter {i} starts. It goes on for {i} pages."} for i in range(3)]
    )
    rows = list(read_source(jsonl_source(path, query_from="first_sentence", dataset="own")))
    assert [one.queries for one in rows] == [
        ("Chapter 0 starts.",),
        ("Chapter 1 starts.",),
        ("Chapter 2 starts.",),
    ]
    assert {one.dataset for one in rows} == {"own"}
    assert [one.text for one in rows] == [f"It goes on for {i} pages." for i in range(3)]


@pytest.mark.parametrize(
    "own", [{"format": "beir", "path": "x"}, {"format": "jsonl", "path": "x", "query_column": "q"}]
)
def test_what_has_queries_already_is_refused(own):
    with pytest.raises(ConfigError, match=r"query_from is 'title' beside .* allowed: one of them"):
        validate(CorpusSource, {**own, "query_from": "title"}, "source")


def test_a_source_without_the_key_has_the_fingerprint_it_had():
    assert "query_from" not in CorpusSource(format="text", path="x").model_dump()
