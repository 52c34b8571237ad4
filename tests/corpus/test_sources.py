import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedloom.config.corpus import CorpusSource
from embedloom.corpus.clean import Rejects
from embedloom.corpus.sources import FILE_READERS, WHOLE_READERS, pieces_of, read_piece, read_source
from embedloom.errors import DataError
from fakes_corpus import jsonl_source, write_jsonl

RECORDS = [{"text": "one", "heading": "A", "key": 7}, {"text": "two", "heading": None, "key": 8}]
COLUMNS = {"title_column": "heading", "id_column": "key"}


def read(format, path, **settings):
    return list(read_source(CorpusSource(format=format, path=str(path), **settings)))


def write(format, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif format == "jsonl":
        write_jsonl(path, RECORDS)
    else:
        path.write_text("text,heading,key\none,A,7\ntwo,,8\n")
    return path


def seen(rows):
    return [(row.id, row.title or None, row.text) for row in rows]


def test_every_format_of_the_config_has_a_reader():
    formats = CorpusSource.model_fields["format"].annotation.__args__
    assert set(formats) == set(FILE_READERS) | set(WHOLE_READERS)


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_tables_from_a_file_a_glob_and_a_folder(format, tmp_path):
    path = write(format, tmp_path / "data" / "deep" / f"b.{format}")
    write(format, tmp_path / "data" / f"a.{format}")
    write(format, tmp_path / "data" / ".hidden" / f"c.{format}")
    (tmp_path / "data" / "README").write_text("not data")
    expected = [("7", "A", "one"), ("8", None, "two")]
    rows = read(format, path, lang="eng", **COLUMNS)
    assert seen(rows) == expected
    assert [(row.source, row.lang, row.queries) for row in rows] == [
        (f"{path}:{n}", "eng", ()) for n in (1, 2)
    ]
    assert seen(read(format, tmp_path / "data", **COLUMNS)) == expected * 2
    assert seen(read(format, f"{tmp_path}/data/**/[ab].*", **COLUMNS)) == expected * 2
    named = read(format, tmp_path / "data", name="mine", **COLUMNS)
    assert [row.source for row in named][:3] == [
        f"mine/a.{format}:1",
        f"mine/a.{format}:2",
        f"mine/deep/b.{format}:1",
    ]
    assert [row.source for row in read(format, path, name="mine", **COLUMNS)] == ["mine:1", "mine:2"]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("key", ["text_column", "title_column", "id_column"])
def test_a_missing_column_is_named_with_those_found(format, key, tmp_path):
    path = write(format, tmp_path / f"a.{format}")
    with pytest.raises(DataError) as error:
        read(format, path, **{key: "body"})
    message = str(error.value)
    assert str(path) in message and "'body'" in message and key in message
    assert key == "title_column" or all(name in message for name in RECORDS[0])


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "text", "beir"])
def test_a_missing_path_is_named(format, tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}/nothing.*{format}"):
        read(format, tmp_path / "nothing")


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "text"])
def test_a_folder_without_fitting_files_is_named(format, tmp_path):
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{tmp_path}.*no {format} file; allowed endings: \."):
        read(format, tmp_path)


def test_sources_without_a_row_are_refused(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "a.csv").write_text("text\n")
    for format in ("parquet", "jsonl", "csv"):
        with pytest.raises(DataError, match=rf"{tmp_path}/a.{format} \({format}\) holds no document"):
            read(format, tmp_path / f"a.{format}")


def test_unreadable_parquet_is_named(tmp_path):
    good = write("parquet", tmp_path / "good.parquet").read_bytes()
    for name, content in {"empty": b"", "text": b"not parquet", "cut": good[: len(good) // 2]}.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{path}: not readable as Parquet"):
            read("parquet", path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "line 2 is not JSON .*allowed: one JSON object a line"),
        ('["text"]', "line 2 holds a list; allowed: one JSON object"),
        ('{"body": "x"}', r"line 2 has no key 'text' \(corpus.sources.text_column\); keys found: \['body'\]"),
        ('{"text": 5}', "row 2: column 'text' holds int '5'; allowed: text or null"),
    ],
)
def test_a_bad_json_line_is_named(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=f"{path}: {message}"):
        read("jsonl", path)


def test_json_lines_compressed_with_absent_titles_and_nulls(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.write('\ufeff{"text": "one"}\n\n{"text": null, "heading": "B"}\n')
    assert seen(read("jsonl", path, title_column="heading")) == [("", None, "one"), ("", "B", "")]


def test_files_that_are_not_utf8_are_named(tmp_path):
    for format, name in (("jsonl", "a.jsonl"), ("text", "a.txt"), ("csv", "a.csv")):
        path = tmp_path / name
        path.write_bytes(b'text\n{"text": "stra\xdfe"}\n')
        with pytest.raises(DataError, match=str(path)):
            read(format, path)


@pytest.mark.parametrize("value", [None, "", 1.5])
def test_an_id_that_is_none_is_refused(value, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "key": value}])
    with pytest.raises(DataError, match=r"row 1: column 'key' holds .*allowed: a text or whole number"):
        list(read_source(jsonl_source(path, id_column="key")))


def test_csv_keeps_cells_as_text_and_quoted_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,text,number\n007,"two\nlines, ""quoted""",1\nNA,NA,x\n')
    assert seen(read("csv", path, id_column="id")) == [
        ("007", None, 'two\nlines, "quoted"'),
        ("NA", None, "NA"),
    ]
    (tmp_path / "b.tsv").write_text("id\ttext\n1\ta, b\n")
    assert seen(read("csv", tmp_path / "b.tsv", id_column="id")) == [("1", None, "a, b")]


def test_ragged_csv_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a\n2,b,c,d\n")
    with pytest.raises(DataError, match=rf"{path}: not readable as CSV: .*Expected 2 columns, got 4"):
        read("csv", path)


def test_limit_stops_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nbroken')
    assert seen(read("jsonl", path, limit=2)) == [("", None, "one"), ("", None, "two")]


def test_text_files_take_their_title_from_heading_or_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "guide.md").write_text("\n# The *guide* #\n\nBody.\n\n## Later\n")
    (tmp_path / "late.markdown").write_text("Intro.\n\n```sh\n# a comment\n```\n\n## Heading\nBody.\n")
    (tmp_path / "plain.txt").write_text("# not a heading here\n")
    (tmp_path / "sub" / "notes.rst").write_text("Notes\n=====\n")
    (tmp_path / "code.py").write_text("x = 1\n")
    rows = {row.source.removeprefix(f"{tmp_path}/"): row for row in read("text", tmp_path)}
    assert {name: row.title for name, row in rows.items()} == {
        "guide.md": "The *guide*",
        "late.markdown": "Heading",
        "plain.txt": "plain",
        "sub/notes.rst": "notes",
    }
    assert rows["guide.md"].text.strip() == "Body.\n\n## Later"
    assert rows["late.markdown"].text.startswith("Intro.")
    assert all(row.group == row.source for row in rows.values())


def test_beir_rows_carry_their_train_queries(tmp_path):
    write_jsonl(
        tmp_path / "corpus.jsonl",
        [{"_id": f"d{n}", "title": f"T{n}", "text": f"text {n}"} for n in (1, 2, 3)],
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in (1, 2, 3, 4)])
    (tmp_path / "qrels").mkdir()
    judged = ["query-id\tcorpus-id\tscore", "q1\td2\t1", "q1\td1\t2", "q2\td1\t1", "q2\td2\t1", "q3\td3\t0"]
    (tmp_path / "qrels" / "train.tsv").write_text("\n".join(judged) + "\n")
    rows = read("beir", tmp_path, name="bench")
    assert seen(rows) == [("d1", "T1", "text 1"), ("d2", "T2", "text 2"), ("d3", "T3", "text 3")]
    # Every relevant document answers the query, not its best one alone; q3 is judged irrelevant.
    assert [(row.queries, row.grades) for row in rows] == [
        (("query 1", "query 2"), (2, 1)), (("query 1", "query 2"), (1, 1)), ((), ()),
    ]  # fmt: skip
    assert rows[0].source == "bench:1" and rows[0].instruction


def test_beir_files_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(DataError, match=rf"{tmp_path}.*no corpus.jsonl; found: \['other.txt'\]"):
        read("beir", tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "d1", "text": "x"}])
    with pytest.raises(
        DataError, match=r"corpus.jsonl: line 1 has no key '_id'; keys found: \['id', 'text'\]"
    ):
        read("beir", tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "d1", "text": "x"}])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "x"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\tgood\n")
    with pytest.raises(DataError, match=r"train.tsv: line 2 is \['q1', 'd1', 'good'\]; expected query-id"):
        read("beir", tmp_path)


def test_beir_oddities_are_read_as_beir_reads_them(tmp_path):
    """A blank last line, grades as floats, Windows line ends, and a document that is its title alone."""
    write_jsonl(
        tmp_path / "corpus.jsonl",
        [{"_id": "d1", "title": "Only a title", "text": ""}, {"_id": "d2", "title": "", "text": ""}],
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "which?"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_bytes(b"query-id\tcorpus-id\tscore\r\nq1\td1\t1.0\r\n\r\n \n")
    rows = read("beir", tmp_path)
    assert [(row.title, row.text, row.queries, row.grades) for row in rows] == [
        ("", "Only a title", ("which?",), (1,)), ("", "", (), ()),
    ]  # fmt: skip


def test_hub_datasets_are_read_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "set" / "train.jsonl", RECORDS)
    write_jsonl(tmp_path / "set" / "test.jsonl", RECORDS[:1])
    name = str(tmp_path / "set")
    assert seen(read("huggingface", name, **COLUMNS)) == [("7", "A", "one"), ("8", None, "two")]
    assert seen(read("huggingface", f"{name}:default:test", **COLUMNS)) == [("7", "A", "one")]
    with pytest.raises(DataError, match=r"no split 'dev'; allowed: \['train', 'test'\]"):
        read("huggingface", f"{name}:default:dev")
    with pytest.raises(
        DataError, match=r"no column 'body' \(corpus.sources.text_column\); columns found: .*'heading'"
    ):
        read("huggingface", name, text_column="body")


def test_an_unreachable_hub_dataset_is_named():
    with pytest.raises(
        DataError, match=r"dataset 'nobody/nothing' \(huggingface.*without a network give local files"
    ):
        read("huggingface", "nobody/nothing")  # the tests run with the hub offline


PAIRS = [
    {"q": "how to zip", "a": "Use zip.", "kind": "how"},
    {"q": "compress a folder", "a": "Use zip.", "kind": "how"},
    {"q": "what is zip", "a": "A format.", "kind": "what"},
    {"q": "how to zip", "a": "Use zip.", "kind": "how"},
]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_rows_that_are_pairs_become_a_document_a_text(format, tmp_path):
    path = tmp_path / f"pairs.{format}"
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(PAIRS), path)
    elif format == "jsonl":
        write_jsonl(path, PAIRS)
    else:
        path.write_text("q,a,kind\n" + "".join(f"{row['q']},{row['a']},{row['kind']}\n" for row in PAIRS))
    columns = {"text_column": "a", "query_column": "q"}
    rows = read(format, path, instruction="Find it", dataset="faq", **columns)
    assert [(row.text, row.queries) for row in rows] == [
        ("Use zip.", ("how to zip", "compress a folder")),
        ("A format.", ("what is zip",)),
    ]
    assert {(row.instruction, row.dataset) for row in rows} == {("Find it", "faq")}
    only = read(format, path, where={"kind": "what"}, **columns)
    assert [row.text for row in only] == ["A format."] and "question" in only[0].instruction
    assert [row.queries for row in read(format, path, limit=1, **columns)] == [("how to zip",)]
    with pytest.raises(DataError, match=r"no column 'sort' \(corpus\.sources\.where\.sort\)|'sort'"):
        read(format, path, where={"sort": "x"}, **columns)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "text", "query_column": "q"}, "query_column does not fit format text"),
        ({"format": "beir", "where": {"a": "b"}}, "where does not fit format beir"),
        ({"format": "parquet", "instruction": "Find it"}, "instruction needs query_column"),
    ],
)
def test_keys_of_pairs_need_a_table(settings, message):
    with pytest.raises(ValueError, match=message):
        CorpusSource(path="x", **settings)


def pieces_read(source, most_bytes):
    pieces = pieces_of(source, most_bytes)
    return pieces, [row for piece in pieces for row in read_piece(piece, Rejects())]


@pytest.mark.parametrize(("group_rows", "count"), [(10, 5), (50, 1)], ids=["groups", "one group"])
def test_the_pieces_of_a_parquet_file_are_its_rows_under_the_same_names(group_rows, count, tmp_path):
    """Fifty rows of 1,000 bytes; a row group is never cut, as reading from its middle decodes what stands before."""
    texts = [f"{number:04d}" * 250 for number in range(50)]
    path = tmp_path / "a.parquet"
    table = pa.table({"text": texts, "kind": ["x" if number % 3 else "y" for number in range(50)]})
    pq.write_table(table, path, row_group_size=group_rows, use_dictionary=False)
    source = CorpusSource(format="parquet", path=str(path), where={"kind": "x"})
    pieces, rows = pieces_read(source, 12_000)
    assert len(pieces) == count
    assert rows == list(read_source(source))
    assert [row.text for row in rows] == [text for number, text in enumerate(texts) if number % 3]
    assert rows[0].source == f"{path}:2" and rows[-1].source == f"{path}:50"


def test_the_pieces_of_a_folder_are_whole_files_together(tmp_path):
    for number in range(6):
        write_jsonl(tmp_path / f"{number}.jsonl", [{"text": "t" * 3000 + str(number)}] * 2)
    source = CorpusSource(format="jsonl", path=str(tmp_path))
    pieces, rows = pieces_read(source, 25_000)
    assert [len(piece.files) for piece in pieces] == [2, 2, 2]
    assert rows == list(read_source(source))
    # How many rows pass a limit is known only where they are read in order.
    limited = source.model_copy(update={"limit": 3})
    pieces, rows = pieces_read(limited, 25_000)
    assert len(pieces) == 1 and rows == list(read_source(limited)) and len(rows) == 3
