"""Sources at an address, ``s3://`` on a server that the test starts, give the documents that their copies in a folder give."""

import gzip
import json
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedloom.config.corpus import CorpusConfig, CorpusSource
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.storage import Place, is_remote
from embedloom.corpus.sources import read_source, source_contents, source_state
from embedloom.corpus.stage import build_corpus
from embedloom.encoder.registry import NodeModel
from embedloom.errors import DataError
from fakes_corpus import sentence
from fakes_store import s3_server

BUCKET = "docs"
TEXTS = [f"{sentence(number, 12)} ภาษาไทย" for number in range(30)]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A folder of each format, here and in the bucket."""
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    with s3_server():
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), BUCKET, path.relative_to(folder).as_posix())
        yield folder


def write_sources(folder: Path) -> None:
    for name in ("parquet/lang=de", "jsonl", "csv", "text/deep", "beir/qrels"):
        (folder / name).mkdir(parents=True)
    table = pa.table({"id": [f"p{n}" for n in range(30)], "text": TEXTS, "title": ["t"] * 30})
    pq.write_table(table, folder / "parquet/lang=de/a.parquet", row_group_size=7)
    pq.write_table(table.slice(0, 3), folder / "parquet/b.parquet")
    lines = "".join(json.dumps({"text": text, "q": f"what is {n}?"}) + "\n" for n, text in enumerate(TEXTS))
    (folder / "jsonl/a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "jsonl/other.bin").write_bytes(b"no data")
    (folder / "csv/a.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS))
    (folder / "text/one.md").write_text(f"# Heading\n\n{TEXTS[0]}\n")
    (folder / "text/deep/two.txt").write_text(TEXTS[1])
    beir = "".join(
        json.dumps({"_id": f"d{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(TEXTS)
    )
    (folder / "beir/corpus.jsonl").write_text(beir)
    (folder / "beir/queries.jsonl").write_text('{"_id": "q1", "text": "what is one?"}\n')
    (folder / "beir/qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")


SOURCES = {
    "parquet": {"format": "parquet", "title_column": "title", "id_column": "id", "name": "p"},
    "jsonl": {"format": "jsonl", "query_column": "q", "name": "j"},
    "csv": {"format": "csv", "name": "c"},
    "text": {"format": "text", "name": "t"},
    "documents": {"format": "documents", "name": "d"},
    "beir": {"format": "beir", "name": "b"},
}


def source_at(root: str, kind: str, **changes) -> CorpusSource:
    folder = "text" if kind == "documents" else kind
    return CorpusSource.model_validate({**SOURCES[kind], "path": f"{root}/{folder}", **changes})


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_of_an_address_are_those_of_the_folder(kind, bucket):
    here, there = source_at(str(bucket), kind), source_at(f"s3://{BUCKET}", kind)
    rows = list(read_source(there))
    assert rows == list(read_source(here))
    assert len(rows) == {"parquet": 33, "text": 2, "documents": 2}.get(kind, 30)
    assert sorted(source_contents(there) or {}) == sorted(source_contents(here) or {})


def test_a_file_by_its_address_and_rows_by_a_folder_s_name(bucket):
    one = source_at(f"s3://{BUCKET}", "parquet", path=f"s3://{BUCKET}/parquet/b.parquet")
    assert [row.id for row in read_source(one)] == ["p0", "p1", "p2"]
    german = source_at(f"s3://{BUCKET}", "parquet", where={"lang": "de"})
    # The file without the column's folder lacks the column.
    with pytest.raises(DataError, match="no column 'lang'"):
        list(read_source(german))


def test_a_changed_object_is_another_source(bucket):
    source = source_at(f"s3://{BUCKET}", "csv")
    before = source_state(source)
    boto3.client("s3").put_object(Bucket=BUCKET, Key="csv/more.csv", Body=b"text\nmore of it\n")
    assert source_state(source) != before
    boto3.client("s3").delete_object(Bucket=BUCKET, Key="csv/more.csv")
    assert source_state(source) == before


def test_an_empty_address_is_named(bucket):
    with pytest.raises(DataError, match=r"s3://docs/nothing.*does not exist or is empty"):
        list(read_source(source_at(f"s3://{BUCKET}", "csv", path=f"s3://{BUCKET}/nothing")))
    assert is_remote("hf://datasets/a/b") and not is_remote("file:///tmp") and not is_remote("a/b")


def test_the_corpus_of_buckets_is_the_corpus_of_folders(bucket, tmp_path):
    made = []
    for number, root in enumerate((str(bucket), f"s3://{BUCKET}")):
        config = CorpusConfig.model_validate(
            {
                "sources": [source_at(root, kind).model_dump() for kind in SOURCES],
                "chunk_tokens": None,
                "min_characters": 5,
                "split": {"dev": 0.1, "test": 0.1},
            }
        )
        place = Place(str(tmp_path / str(number)))
        made.append(
            build_corpus(config, 1, NodeModel("none"), ArtefactWriter(place, "corpus", "c", {}, "local"))
        )
    here, there = (artefact.place for artefact in made)
    assert made[0].counts == made[1].counts and made[0].counts["rows"] == 30
    names = [name for name in here.files() if name.endswith(".parquet")]
    assert names == [name for name in there.files() if name.endswith(".parquet")]
    for name in names:
        assert here.read_table(name).equals(there.read_table(name)), name
