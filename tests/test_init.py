"""`embedloom init`: what it finds out about somebody's data, what it writes, and that what it writes runs."""

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.cli import init as cli_init
from embedloom.config.run import load_run
from embedloom.errors import ConfigError, DataError
from embedloom.pipeline.commands import load
from embedloom.pipeline.graph import build_missing, finished, graph
from embedloom.pipeline.plan import plan_table
from embedloom.pipeline.preflight import problems
from embedloom.pipeline.starter import BUDGETS, run_name

CLUSTER = Path(__file__).parent.parent / "cluster" / "cluster.yaml"
TOPICS = ["rivers", "graphs", "sorting", "planets", "colours", "letters"]


def init(*words, keys=None):
    return CliRunner().invoke(app, ["init", *map(str, words)], input=keys)


def written(tmp_path, *words):
    """The config that is written, read back, and what the command says."""
    path = tmp_path / "own.yaml"
    result = init(*words, "-o", path)
    assert result.exit_code == 0, result.exception
    assert result.output.splitlines()[-1] == str(path)
    return load_run(path), result.output


def handbook(folder, pages=24):
    folder.mkdir()
    for number in range(pages):
        topic = TOPICS[number % len(TOPICS)]
        (folder / f"page{number}.md").write_text(
            f"# What to know about {topic} in case {number}\n\nHere it is told how {topic} behave in case {number}, and "
            f"why chapter {number * 7} of the book on {topic} treats them otherwise than one would think.\n"
        )
    return folder


def answers(path, rows=40):
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["Nummer", "question", "answer"])
        for number in range(rows):
            table.writerow([
                number,
                f"Wie beantrage ich Urlaub für die Abteilung {number}?",
                f"Der Urlaub für die Abteilung {number} wird im Portal unter dem Menüpunkt {number * 3} beantragt.",
            ])  # fmt: skip
    return path


def notes(path, rows=30, **extra):
    path.write_text(
        "".join(
            json.dumps(
                {
                    "_id": f"n{i}",
                    "body": f"Note {i} is about {TOPICS[i % 6]}. It holds {i} remarks on the matter.",
                    **extra,
                }
            )
            + "\n"
            for i in range(rows)
        )
    )
    return path


def test_a_folder_of_texts_asks_by_its_headings(tmp_path):
    (tmp_path / "scans").mkdir()
    folder = handbook(tmp_path / "handbook")
    (folder / "scan.png").write_bytes(b"%PDF")
    config, told = written(tmp_path, folder)
    (source,) = config.corpus.sources
    assert (source.format, source.path, source.query_from, source.lang) == (
        "text",
        str(folder),
        "title",
        "eng",
    )
    assert config.run.name == "handbook"
    assert "24 documents" in told and "not read: 1 .png files" in told
    assert config.synthesis is not None and config.training.mix["synthetic"] > 0
    assert config.corpus.split.test == 0.3  # of 24 documents, a tenth might hold out none


def test_json_lines_without_titles_ask_by_first_sentences(tmp_path):
    config, told = written(
        tmp_path, notes(tmp_path / "notes.jsonl", url="https://example.org"), "--no-synthetic"
    )
    (source,) = config.corpus.sources
    assert (source.format, source.text_column, source.id_column) == ("jsonl", "body", "_id")
    assert source.query_from == "first_sentence" and source.source_column == "url"
    assert config.synthesis is None and config.training.mix == {"public": 1}
    assert "30 documents" in told


def test_pairs_in_a_second_language(tmp_path):
    config, told = written(tmp_path, answers(tmp_path / "faq.csv"))
    (source,) = config.corpus.sources
    assert (source.format, source.text_column, source.query_column) == ("csv", "answer", "question")
    assert source.lang == "deu" and source.query_from is None
    assert source.id_column is None  # rows of pairs repeat their texts
    assert config.synthesis is None  # the pairs suffice
    assert "40 pairs" in told and "documents are in 'deu', and minilm-l6 learnt English" in told


def test_written_queries_are_in_the_language_of_the_documents(tmp_path):
    config, _ = written(tmp_path, answers(tmp_path / "faq.csv"), "--synthetic")
    assert config.synthesis.languages == {"deu": 1}
    config, _ = written(tmp_path, answers(tmp_path / "more.csv"), "--synthetic", "--lang", "fra", "--force")
    assert config.synthesis.languages == {"fra": 1} and config.corpus.sources[0].lang == "fra"


def test_several_formats_become_several_sources(tmp_path):
    folder = handbook(tmp_path / "mixed")
    notes(folder / "notes.jsonl")
    config, _ = written(tmp_path, folder, answers(tmp_path / "faq.csv"))
    assert [source.format for source in config.corpus.sources] == ["text", "jsonl", "csv"]


def test_columns_that_are_named_hold(tmp_path):
    table = pa.table({
        "key": [f"k{i}" for i in range(30)],
        "headline": [f"About {TOPICS[i % 6]} number {i}" for i in range(30)],
        "summary": ["short words"] * 30,
        "article": [f"The long story of {TOPICS[i % 6]}, part {i}, told at length and in detail." for i in range(30)],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "news.parquet")
    found, _ = written(tmp_path, tmp_path / "news.parquet")
    assert found.corpus.sources[0].text_column == "article"  # the longest, as no name tells
    assert (
        found.corpus.sources[0].title_column == "headline" and found.corpus.sources[0].query_from == "title"
    )
    named, _ = written(
        tmp_path, tmp_path / "news.parquet", "--text-column", "summary", "--query-column", "headline",
        "--id-column", "key", "--force",
    )  # fmt: skip
    source = named.corpus.sources[0]
    assert (source.text_column, source.query_column, source.id_column) == ("summary", "headline", "key")


def test_short_texts_are_not_dropped(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"what is a {i}?", "answer": f"item {i}"}) + "\n" for i in range(30))
    )
    config, _ = written(tmp_path, path)
    assert config.corpus.min_characters <= len("item 0")


def test_long_texts_are_cut_to_what_the_models_read(tmp_path):
    folder = handbook(tmp_path / "long")
    (folder / "page0.md").write_text("# A heading that is long enough\n\n" + "many words " * 2000)
    (folder / "page1.md").write_text("# Another heading of the book\n\n" + "more words " * 2000)
    config, _ = written(tmp_path, folder)
    assert config.corpus.chunk_tokens == config.encoder.max_document_tokens


def test_the_budget_bounds_rows_and_steps(tmp_path, monkeypatch):
    monkeypatch.setitem(
        BUDGETS, "small", BUDGETS["small"].__class__(limit=25, written=7, most_steps=11, batch=4, tokens=64)
    )
    config, _ = written(tmp_path, notes(tmp_path / "notes.jsonl"), "--synthetic")
    assert config.corpus.sources[0].limit == 25 and config.training.stages[0].max_steps == 11
    assert config.synthesis.families[0].rows == 7 and config.encoder.max_document_tokens == 64
    medium, _ = written(tmp_path, notes(tmp_path / "notes.jsonl"), "--budget", "medium", "--force")
    assert medium.corpus.sources[0].limit is None


def test_the_command_and_the_budgets_agree():
    assert {one.value for one in cli_init.Budget} == set(BUDGETS)


def test_nothing_is_overwritten_unless_forced(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("mine")
    folder = handbook(tmp_path / "handbook")
    refused = init(folder, "-o", path)
    assert isinstance(refused.exception, ConfigError) and "--force" in str(refused.exception)
    assert path.read_text() == "mine"
    assert init(folder, "-o", path, "--force").exit_code == 0
    assert yaml.safe_load(path.read_text())["run"]["name"] == "handbook"


def test_a_base_with_prompts_keeps_them_and_its_temperature(tmp_path):
    base = ("--base", "multilingual-e5-small", "--teacher", "multilingual-e5-small")
    config, told = written(tmp_path, answers(tmp_path / "faq.csv"), *base)
    assert (config.encoder.template, config.encoder.document_template) == ("query: {text}", "passage: {text}")
    assert config.training.temperature == 0.02 and "learnt English" not in told
    stage = config.training.stages[0]
    assert (stage.max_steps, stage.epochs, stage.learning_rate) == (10, 1.0, 2e-5)  # 40 pairs are few


def test_passes_are_over_the_pairs_that_are_left(tmp_path):
    rows = [
        {
            "question": f"Wo liegt die Datei {n}?",
            "answer": f"Die Datei {n} liegt im Ordner {n * 7}, seit Jahren.",
        }
        for n in range(300)
    ]
    path = tmp_path / "faq.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, _ = written(tmp_path, path)
    assert (config.training.stages[0].max_steps, config.training.stages[0].epochs) == (None, 3)


def test_on_a_terminal_it_asks_what_is_not_given(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_init, "on_terminal", lambda: True)
    path = tmp_path / "own.yaml"
    result = init(handbook(tmp_path / "handbook"), "-o", path, keys="smollm2-135m\nn\nmedium\n")
    assert result.exit_code == 0, result.exception
    config = load_run(path)
    assert config.encoder.base == "smollm2-135m" and config.synthesis is None
    assert config.encoder.max_document_tokens == BUDGETS["medium"].tokens
    quiet = init(tmp_path / "handbook", "-o", path, "--force", "--yes", keys="")
    assert quiet.exit_code == 0 and load_run(path).encoder.base == "minilm-l6"


@pytest.mark.parametrize(
    ("make", "words", "error", "message"),
    [
        (lambda path: path / "none", (), DataError, "does not exist or is empty"),
        (lambda path: handbook(path / "few", 3), (), DataError, "3 rows are too few .* allowed: 20 or more"),
        (lambda path: notes(path / "a.jsonl"), ("--text-column", "txt"), DataError, "no column 'txt'"),
    ],
)
def test_data_that_cannot_be_used_is_refused(make, words, error, message, tmp_path):
    result = init(make(tmp_path), "-o", tmp_path / "own.yaml", *words)
    assert isinstance(result.exception, error)
    assert re.search(message, str(result.exception))
    assert not (tmp_path / "own.yaml").exists()


def test_files_that_no_reader_knows_are_named(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.png").write_bytes(b"%PDF")
    result = init(tmp_path / "scans", "-o", tmp_path / "own.yaml")
    assert isinstance(result.exception, DataError)
    assert "'.png': 1" in str(result.exception) and ".md" in str(result.exception)


@pytest.mark.parametrize(
    ("path", "name"), [("docs/My handbook/", "My_handbook"), ("a.b/faq.de.jsonl", "faq"), ("./-", "own")]
)
def test_the_run_is_named_after_the_data(path, name):
    assert run_name(path) == name


def test_strange_paths_are_quoted(tmp_path):
    folder = handbook(tmp_path / "a: #b 'c'")
    config, _ = written(tmp_path, folder)
    assert config.corpus.sources[0].path == str(folder)


def test_plan_accepts_what_is_written_at_once(tmp_path):
    for name, make in (
        ("folder", lambda path: handbook(path / "h")),
        ("pairs", lambda path: answers(path / "f.csv")),
    ):
        (tmp_path / name).mkdir()
        written(tmp_path / name, make(tmp_path / name))
        run = load(tmp_path / name / "own.yaml", "local", CLUSTER, [f"run.output_dir={tmp_path}/runs"])
        assert list(problems(run, {node.verb for node in graph(run).values()})) == []
        assert "0 of" in plan_table(run)


@pytest.mark.ray
def test_what_is_written_runs_to_its_end(ray_local, tiny_llama, tiny_model, tmp_path):
    folder = handbook(tmp_path / "handbook", pages=40)
    written(tmp_path, folder, "--base", tiny_llama, "--teacher", tiny_model, "--no-synthetic")
    run = load(
        tmp_path / "own.yaml",
        "local",
        CLUSTER,
        # Random weights score all documents alike, so a margin would leave no negatives; bytes are its tokens.
        [f"run.output_dir={tmp_path}/runs", "mining.selection.margin_ratio=1.0", "mining.max_query_tokens=128",
         "encoder.max_query_tokens=128", "training.stages.0.max_steps=2"],
    )  # fmt: skip
    built = build_missing(run)
    assert built[-1] == "vectors" and "training/tuned/finetune" in built
    done = finished(run, graph(run))
    assert set(done) == set(graph(run))
    assert done["corpus"].counts["pairs"] > 20
    scores = run.place.child("evaluation").read_json("scores.json")
    assert 0 <= scores["models"]["merged"]["heldout"] <= 1
