"""Corpora as people have them: folders of mixed files, odd tables, broken rows; each a case that once went wrong."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict, load_dataset

import fakes_documents as fakes
from embedloom.config.base import validate
from embedloom.config.corpus import CorpusConfig, CorpusSource
from embedloom.corpus import chunk, sources
from embedloom.corpus.clean import Rejects, clean_row
from embedloom.corpus.inspection import Columns, inspect
from embedloom.corpus.sources import read_source
from embedloom.corpus.stage import build_corpus
from embedloom.documents.outline import packed, unpacked
from embedloom.errors import ConfigError, DataError
from fakes_corpus import corpus_writer, save_word_tokenizer, write_jsonl


def read(format, path, rejects=None, **settings):
    section = {"format": format, "path": str(path), **settings}
    return list(read_source(validate(CorpusSource, section, "corpus.sources.0"), rejects))


def texts(rows):
    return [row.text for row in rows]


def by_name(rows, folder):
    return {row.source.removeprefix(f"{folder}/"): row for row in rows}


@pytest.fixture
def notes(monkeypatch):
    said = []
    monkeypatch.setattr(sources, "note", lambda stage, text: said.append(text))
    return said


@pytest.fixture
def site(tmp_path):
    """A Docusaurus site as it lies in a repository."""
    folder = tmp_path / "site [v2]"
    for name, content in fakes.every_kind().items():
        (folder / "docs").mkdir(parents=True, exist_ok=True)
        (folder / "docs" / name).write_bytes(content)
    (folder / "docs" / "[slug].md").write_text("# A slug\n\nIts text.")
    (folder / "docs" / "_category_.json").write_text('{"label": "Docs"}')
    (folder / "docs" / "logo.png").write_bytes(b"\x89PNG")
    (folder / "docs" / "chart.png").write_bytes(b"\x89PNG")
    (folder / "LICENSE").write_text("Do what you like.")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "linked.md").symlink_to(folder / "docs" / "[slug].md")
    (folder / "gone.md").symlink_to(folder / "nothing.md")
    return folder


def test_a_folder_is_read_whole_and_the_rest_is_named_with_what_would_read_it(site, notes):
    rows = by_name(read("documents", site), site)
    expected = {f"docs/{name}" for name in fakes.every_kind()} - {"docs/guide.mbox"}
    assert set(rows) == expected | {"docs/guide.mbox#1", "docs/guide.mbox#2", "docs/[slug].md", "linked.md"}
    assert rows["docs/guide.mbox#1"].group == rows["docs/guide.mbox#2"].group == f"{site}/docs/guide.mbox"
    assert rows["docs/guide.md"].title == "Pump guide" and "tags:" not in rows["docs/guide.md"].text
    (said,) = notes
    assert (
        "16 files are read, passed over: 2 .png, 1 .json, 1 broken link, 1 hidden, 1 link to a folder, 1 without an ending; "
        ".json are tables: a source of their own format reads them; read_as ({.ENDING: text}) reads more"
    ) in said


def test_further_files_are_read_as_the_user_says(site):
    rows = by_name(read("documents", site, read_as={"LICENSE": "text"}), site)
    assert rows["LICENSE"].text == "Do what you like." and rows["LICENSE"].title == "LICENSE"
    with pytest.raises(ConfigError, match=r"read_as.*LICENSE"):
        read("documents", site, read_as={"LICENSE": "novel"})


def test_a_text_source_says_what_the_documents_format_would_read(site, notes):
    assert len(read("text", site)) == 5
    assert ".html" in notes[0] and "format documents reads .adoc, .docx" in notes[0]


def test_a_folder_without_any_document_names_what_it_holds(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no documents file; allowed endings: .*\.pdf.*found: 1 \.png"):
        read("documents", tmp_path)


def test_titles_can_be_switched_off(site):
    rows = by_name(read("documents", site, titles=False), site)
    assert {row.title for row in rows.values()} == {None}
    assert rows["docs/[slug].md"].text == "# A slug\n\nIts text."
    assert {row.title for row in read("text", site, titles=False)} == {None}


def test_front_matter_of_text_sources_is_metadata(tmp_path):
    (tmp_path / "a.md").write_text("---\ntitle: Real title\nid: 7\n---\n\n## Prerequisites\n\nText.\n")
    (tmp_path / "b.md").write_text("---\nid: 7\n---\n\n## Prerequisites\n\nText.\n")
    a, b = read("text", tmp_path)
    assert (a.title, a.text.strip()) == ("Real title", "## Prerequisites\n\nText.")
    assert (b.title, b.text.strip()) == ("Prerequisites", "Text.")


def test_chunks_of_documents_name_page_and_heading(tmp_path):
    (tmp_path / "a.pdf").write_bytes(fakes.pdf(tuple(f"Page {number} " + "word " * 5 for number in range(4))))
    (row,) = map(clean_row, read("documents", tmp_path, name="mine"))
    outline = unpacked(row.outline)
    pieces = chunk.cut_document(row.text, [(n, n + 1) for n in range(len(row.text))], outline, 40)
    spans = [chunk.Span(piece.start, piece.stop, piece.tokens) for piece in pieces]
    found = [made.row.source for made in chunk._chunks(row, spans)]
    assert found == [f"mine/a.pdf#page={number}" for number in (1, 2, 3, 4)]
    assert packed(outline) == row.outline and packed(()) == "" and unpacked("") == ()


def test_init_takes_a_folder_of_documents_as_one_source(site):
    (found,), unread = inspect(str(site), Columns())
    assert found.section["format"] == "documents" and found.rows == 16
    assert unread == {".png": 2, ".json": 1, "LICENSE": 1}


@pytest.mark.parametrize("name", ["data [2024]/docs.jsonl", "data [2024]"])
def test_a_path_with_brackets_that_exists_is_a_path(name, tmp_path):
    (tmp_path / "data [2024]").mkdir()
    write_jsonl(tmp_path / "data [2024]" / "docs.jsonl", [{"text": "one"}])
    assert texts(read("jsonl", tmp_path / name)) == ["one"]


@pytest.mark.parametrize("frames", [1, 2])
def test_zstd_json_lines_and_tables_in_other_packings(frames, tmp_path):
    lines = b'{"text": "one"}\n' * 3
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines) * frames)
    assert texts(read("jsonl", tmp_path)) == ["one"] * 3 * frames
    (tmp_path / "a.csv.zst").write_bytes(zstandard.compress(b"text\none\n"))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"text\ntwo\n"))
    assert texts(read("csv", tmp_path)) == ["one", "two"]


def test_a_title_absent_from_some_files_is_no_title_there_whatever_their_order(tmp_path):
    for first, second in (("a", "b"), ("b", "a")):
        folder = tmp_path / first
        folder.mkdir()
        pq.write_table(pa.table({"text": ["one"], "title": ["T"]}), folder / f"{first}.parquet")
        pq.write_table(pa.table({"text": ["two"]}), folder / f"{second}.parquet")
        rows = read("parquet", folder, title_column="title")
        assert {(row.text, row.title) for row in rows} == {("one", "T"), ("two", "")}
    with pytest.raises(DataError, match=r"no column 'heading' \(corpus.sources.title_column\) in any file"):
        read("parquet", tmp_path / "a", title_column="heading")


def test_text_as_bytes_views_lists_and_nested_fields(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "raw": pa.array(["strä".encode()], pa.binary()),
            "view": pa.array(["seen"], pa.string_view()),
            "parts": [["One.", "Two."]],
            "doc": [{"body": {"text": "deep"}, "lang": "de"}],
        }
    )
    pq.write_table(table, path)
    for column, text in (
        ("raw", "strä"),
        ("view", "seen"),
        ("parts", "One.\n\nTwo."),
        ("doc.body.text", "deep"),
    ):
        assert texts(read("parquet", path, text_column=column)) == [text]
    assert texts(read("parquet", path, text_column="view", where={"doc.lang": "de"})) == ["seen"]
    write_jsonl(tmp_path / "a.jsonl", [{"doc": {"body": "deep"}}, {"doc": None}])
    assert texts(read("jsonl", tmp_path / "a.jsonl", text_column="doc.body")) == ["deep", ""]


def test_hive_folders_are_columns(tmp_path):
    for lang in ("de", "en"):
        (tmp_path / f"lang={lang}").mkdir()
        pq.write_table(pa.table({"text": [f"in {lang}"]}), tmp_path / f"lang={lang}" / "part-0.parquet")
    assert texts(read("parquet", tmp_path, where={"lang": "de"})) == ["in de"]
    assert [(row.text, row.title) for row in read("parquet", tmp_path, title_column="lang")] == [
        ("in de", "de"), ("in en", "en"),
    ]  # fmt: skip


def test_a_json_array_is_read_as_its_objects(tmp_path):
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=indent))
        assert texts(read("jsonl", tmp_path / "a.json")) == ["one", "two"]
    (tmp_path / "a.json").write_text('[{"text": "one"}, 5]')
    with pytest.raises(DataError, match="element 2 of the array is int"):
        read("jsonl", tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"text": "one"},]')
    with pytest.raises(DataError, match="neither JSON lines nor a JSON array"):
        read("jsonl", tmp_path / "a.json")


def test_csv_of_other_delimiters_encodings_and_without_a_header(tmp_path):
    (tmp_path / "a.csv").write_bytes("text;n\nstraße, lang;1\n".encode("cp1252"))
    assert texts(read("csv", tmp_path / "a.csv", delimiter=";", encoding="cp1252")) == ["straße, lang"]
    (tmp_path / "b.tsv").write_text("1\tone\n2\ttwo\n")
    rows = read("csv", tmp_path / "b.tsv", column_names=["n", "text"], id_column="n")
    assert [(row.id, row.text) for row in rows] == [("1", "one"), ("2", "two")]
    (tmp_path / "c.csv").write_bytes("text\nstraße\n".encode("utf-16"))
    assert texts(read("csv", tmp_path / "c.csv", encoding="utf-16")) == ["straße"]
    with pytest.raises(ConfigError, match=r"encoding.*unknown; allowed: an encoding that Python knows"):
        read("csv", tmp_path / "c.csv", encoding="utf-99")
    with pytest.raises(ConfigError, match="delimiter does not fit format jsonl; allowed: csv"):
        read("jsonl", tmp_path / "c.csv", delimiter=";")


def test_a_data_set_saved_to_disk_is_read(tmp_path):
    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "one")
    assert texts(read("huggingface", tmp_path / "one")) == ["one", "two"]
    assert texts(read("huggingface", tmp_path / "one", limit=1)) == ["one"]
    DatasetDict({"train": Dataset.from_dict({"text": ["three"]})}).save_to_disk(tmp_path / "dict")
    assert texts(read("huggingface", tmp_path / "dict")) == ["three"]


def test_a_limit_streams_a_data_set_of_the_hub(tmp_path, monkeypatch):
    asked = []
    real = load_dataset
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *a, **k: asked.append(k["streaming"]) or real(*a, **k)
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    assert texts(read("huggingface", tmp_path / "set", limit=1)) == ["one"]
    assert (
        asked == [True]
        and texts(read("huggingface", tmp_path / "set")) == ["one", "two"]
        and asked == [True, False]
    )
    with pytest.raises(DataError, match=r"no column 'heading' \(corpus.sources.title_column\)"):
        read("huggingface", tmp_path / "set", title_column="heading")


BAD_LINES = ['{"text": "x"', '["text"]', '{"body": "x"}', '{"text": 5}', '{"text": "stra\udcdfe"}']


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_ends_the_command_or_is_a_counted_reject(line, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {number}"}) for number in range(99)]
    lines.insert(50, line)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=str(path)):
        read("jsonl", path)
    rejects = Rejects()
    assert texts(read("jsonl", path, rejects, max_unreadable=0.01)) == [
        f"text {number}" for number in range(99)
    ]
    (reject,) = rejects.rows
    assert (
        reject["reason"] == "unreadable"
        and str(path) in reject["detail"]
        and reject["id"].startswith(str(path))
    )
    with pytest.raises(
        DataError, match=r"1 of 100 files or rows are unreadable \(1.0%\); allowed by max_unreadable: 0.5%"
    ):
        read("jsonl", path, max_unreadable=0.005)


def test_bad_rows_of_csv_and_bad_files_are_counted_rejects(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f"{n},t{n}\n" for n in range(9)) + "9,b,c,d\n")
    rejects = Rejects()
    assert len(read("csv", tmp_path / "a.csv", rejects, max_unreadable=0.1)) == 9
    assert rejects.counts == {"unreadable": 1} and "4 cells, expected 2" in rejects.rows[0]["detail"]
    for name, content in {
        "a.txt": b"fine",
        "b.txt": "stra\xdfe".encode("latin-1"),
        "c.pdf": b"no pdf",
    }.items():
        (tmp_path / name).write_bytes(content)
    rejects = Rejects()
    assert texts(read("documents", tmp_path, rejects, max_unreadable=0.7)) == ["fine"]
    assert [row["id"] for row in rejects.rows] == [f"{tmp_path}/b.txt", f"{tmp_path}/c.pdf"]
    with pytest.raises(DataError, match=r"2 of 3 files or rows are unreadable"):
        read("documents", tmp_path, max_unreadable=0.5)
    with pytest.raises(DataError, match=rf"{tmp_path}/b.txt: not readable as text: byte 4 is not utf-8"):
        read("documents", tmp_path)


def test_a_corpus_of_documents_is_built_with_pages_and_headings(site, tmp_path):
    (site / "docs" / "long.pdf").write_bytes(
        fakes.pdf(tuple(f"Page {n} of the pump. " + "It runs. " * 8 for n in range(6)))
    )
    (site / "broken.pdf").write_bytes(b"no pdf")
    tokenizer = save_word_tokenizer(tmp_path / "words")
    section = {"format": "documents", "path": str(site), "name": "site", "max_unreadable": 0.1}
    config = validate(
        CorpusConfig,
        {"sources": [section], "chunk_tokens": 32, "min_characters": 5, "near_duplicate_threshold": None,
         "split": {"dev": 0, "test": 0}},
        "corpus",
    )  # fmt: skip
    artefact = build_corpus(config, 1, tokenizer, corpus_writer(tmp_path / "out"))
    found = artefact.place.read_tables("documents/train").column("source").to_pylist()
    assert {f"site/docs/long.pdf#page={n}" for n in range(1, 7)} <= set(found)
    assert "site/docs/guide.docx § Install > On Linux" in found
    assert artefact.counts["rejects"]["unreadable"] == 1
    short = validate(CorpusConfig, {"sources": [{**section, "max_unreadable": 0.01}]}, "corpus")
    with pytest.raises(DataError, match=r"1 of \d+ files or rows are unreadable"):
        build_corpus(short, 1, tokenizer, corpus_writer(tmp_path / "short"))
