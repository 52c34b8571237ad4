"""The section on synthesis, from the details that the stage records."""

import html
import re

from embedloom.core.storage import Place
from embedloom.report.summary import Stage
from embedloom.report.synthesis import synthesis_lines, synthesis_section
from fakes_run import make_run
from test_report import report_of


def cell(family: str, generator: str, language: str = "eng", **changes: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "family": family, "generator": generator, "language": language, "quota": 60, "rows": 60, "attempts": 80,
        "asked": 80, "prompt_tokens": 8000, "output_tokens": 1200, "rejects": {"too_long": 15, "schema": 5},
    }  # fmt: skip
    return plain | changes


DETAILS = {
    "cells": [
        cell("sts", "big <llm>"),
        cell(
            "sts",
            "tiny",
            rows=20,
            quota=20,
            attempts=40,
            asked=40,
            output_tokens=400,
            rejects={"too_long": 20},
        ),
        cell(
            "existing_questions",
            "",
            "deu",
            rows=20,
            quota=20,
            attempts=20,
            asked=20,
            output_tokens=0,
            rejects={},
        ),
    ],
    "engines": {"big <llm>": {"output_tokens": 1200, "seconds": 8.0, "tokens_per_second": 150.0}},
    "diversity": {
        "sample": {"big <llm>": 60, "tiny": 20},
        "distinct": {
            "big <llm>": {"1": 0.5, "2": 0.75, "3": 0.9},
            "tiny": {"1": 0.25, "2": 0.5, "3": None},
            "all": {"1": 0.4, "2": 0.6, "3": 0.8},
        },
        "overlap": [{"left": "big <llm>", "right": "tiny", "jaccard": 0.0625}],
        "mean_cosine": 0.1234,
        "coverage": {"clusters": 40, "hit": 30, "share": 0.75, "documents": 2000},
    },
}


def section_text(details: dict[str, object]) -> str:
    markup = synthesis_section([Stage("synthesis", Place("nowhere"), {"details": details})])
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def test_figures_by_generator_family_language_and_reason():
    text = section_text(DETAILS)
    # generator: rows, share of 100, attempts, refused of asked, prompt and output tokens, tokens/s
    assert "big <llm> 60 60.00% 80 25.00% 8,000 1,200 150" in text
    assert "tiny 20 20.00% 40 50.00% 8,000 400 -" in text
    assert "none (extracted) 20 20.00% 20 0.00% 8,000 0 -" in text
    # family: rows, quota, attempts, refused (40 of 120), tokens, tokens a row
    assert "sts 80 80 120 33.33% 1,600 20" in text
    assert "deu 20 20 20 0.00% 0 0" in text
    # reason: all, then its share of each generator's asked rows
    assert "too_long 35 18.75% 50.00% 0.00%" in text
    assert "schema 5 6.25% 0.00% 0.00%" in text


def test_diversity_is_told():
    text = section_text(DETAILS)
    assert "big <llm> 60 0.5 0.75 0.9" in text
    assert "tiny 20 0.25 0.5 -" in text
    assert "all 80 0.4 0.6 0.8" in text
    assert "big <llm> tiny 0.0625" in text
    assert "two queries under the teacher: 0.1234" in text
    assert "30 of 40 clusters of the corpus (75.0%; 2,000 documents sampled)" in text


def test_a_run_without_cells_has_no_such_section(tmp_path):
    _, page = report_of(make_run(tmp_path / "run"))
    assert "Synthesis" not in page.text
    assert synthesis_lines({}) == []


def test_the_terminals_table_is_aligned():
    header, first, *_ = lines = synthesis_lines(DETAILS)
    assert header.split() == [
        "generator",
        "family",
        "language",
        "rows",
        "quota",
        "refused",
        "output",
        "tokens",
    ]
    assert first.split() == ["big", "<llm>", "sts", "eng", "60", "60", "25.00%", "1,200"]
    assert len({len(line) for line in lines}) == 1
