"""Search of an embedded corpus: against brute force, and what it refuses to load."""

import json

import numpy as np
import pyarrow as pa
import pytest

from embedloom.config.corpus import CorpusConfig
from embedloom.config.embedding import EmbeddingConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.storage import Place
from embedloom.corpus.stage import build_corpus
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.embed import vector_table
from embedloom.retrieval.inputs import open_input
from embedloom.retrieval.ledger import open_ledger
from embedloom.serving.corpus import link_of, load_corpus
from embedloom.serving.schemas import SearchHit
from fakes_corpus import save_word_tokenizer
from fakes_search import ENCODER, HASH, artefact
from fakes_serving import FakeEncoder, client_of, refused

TEXTS = [f"document number {number}" for number in range(30)]


def load(place, documents=None, contract_hash=HASH, model="f00d"):
    return load_corpus(place, documents, contract_hash, model, normalize=True)


def best(query, texts=TEXTS, dimensions=8):
    scores = (ENCODER.embed([f"T {text}" for text in texts], "document")[:, :dimensions]).astype(np.float64)
    scores /= np.linalg.norm(scores, axis=1, keepdims=True)
    scores = scores @ (query[:dimensions] / np.linalg.norm(query[:dimensions]))
    return sorted(range(len(texts)), key=lambda row: (-scores[row], row)), scores


@pytest.mark.parametrize("index", [None, "flat", "hnsw"])
def test_hits_are_brute_forces(tmp_path, index):
    place = artefact(tmp_path, TEXTS, index=index)
    corpus = load(place, str(tmp_path / "in.parquet"))
    assert (corpus.card.documents, corpus.card.index, corpus.card.texts) == (30, index or "exact", True)
    query = ENCODER.embed(["where?"], "query")[0]
    order, scores = best(query)
    hits = corpus.search(query, 5, with_texts=True)
    assert [hit.id for hit in hits] == [f"d{row:02d}" for row in order[:5]]
    assert np.allclose([hit.score for hit in hits], scores[order[:5]], atol=1e-5)
    assert [(hit.title, hit.text) for hit in hits] == [("T", TEXTS[row]) for row in order[:5]]
    assert len(corpus.search(query, 1000, with_texts=False)) == 30


def test_equal_documents_come_in_the_order_of_their_ids(tmp_path):
    corpus = load(artefact(tmp_path, ["same", "other", "same", "same"]))
    query = ENCODER.embed(["T same"], "document")[0]
    assert [hit.id for hit in corpus.search(query, 3, with_texts=False)] == ["d00", "d02", "d03"]


def test_a_query_is_cut_like_the_corpus(tmp_path):
    corpus = load(artefact(tmp_path, TEXTS, dimensions=4))
    query = ENCODER.embed(["where?"], "query")[0]
    order, scores = best(query, dimensions=4)
    hits = corpus.search(query, 3, with_texts=False)
    assert [hit.id for hit in hits] == [f"d{row:02d}" for row in order[:3]]
    assert hits[0].score == pytest.approx(scores[order[0]], abs=1e-5)


def test_a_text_that_was_edited_since_is_not_shown(tmp_path):
    place = artefact(tmp_path, TEXTS)
    path = Place(str(tmp_path))
    table = path.read_table("in.parquet")
    texts = table.column("text").to_pylist()
    edited = [text if row < 15 else text + " (new)" for row, text in enumerate(texts)]
    path.write_table("in.parquet", table.set_column(2, "text", pa.array(edited)))
    corpus = load(place, str(tmp_path / "in.parquet"))
    for hit in corpus.search(ENCODER.embed(["where?"], "query")[0], 30, with_texts=True):
        assert (hit.text is not None) == (int(hit.id[1:]) < 15)


def test_without_the_documents_hits_are_ids(tmp_path):
    place = artefact(tmp_path, TEXTS)
    (tmp_path / "in.parquet").unlink()
    corpus = load(place)
    assert not corpus.card.texts
    hit = corpus.search(ENCODER.embed(["where?"], "query")[0], 1, with_texts=True)[0]
    assert (hit.title, hit.text) == (None, None)


def hit_of(source, tmp_path, config=None) -> SearchHit:
    """The best hit for the text "open a file" in an input that was embedded as `embedloom embed` embeds it."""
    place = Place(str(tmp_path / "vectors"))
    config = EmbeddingConfig(**(config or {}))
    writer = ArtefactWriter(place, "vectors", "c", {"corpus": "x"}, "local")
    opened = open_input(str(source), config, place)
    ledger = open_ledger(opened, place, 8, None)
    tables = [place.read_table(f"rows/{part}") for part in ledger.parts]
    ids = [name for table in tables for name in table.column("id").to_pylist()]
    places = [(row["file"], row["row"]) for table in tables for row in table.to_pylist()]
    texts = [
        opened.place.read_table(opened.files[file][0]).column(opened.text)[row].as_py()
        for file, row in places
    ]
    table = vector_table(ids, ENCODER.embed(texts, "document"), HASH, "f00d", 1)
    place.write_table("vectors/part-000000.parquet", table)
    details = {"contract_hash": HASH, "model_id": "f00d", "recipe": {"side": "document"}}
    writer.commit({"rows": len(ids)}, {**details, "input": {"path": str(source), **config.columns}})
    query = ENCODER.embed(["open a file"], "document")[0]
    return load(place).search(query, 1, with_texts=True)[0]


def test_hits_of_text_files_name_their_file(tmp_path):
    (tmp_path / "in/guide").mkdir(parents=True)
    (tmp_path / "in/guide/files.md").write_text("# Files\n\nopen a file", encoding="utf-8")
    (tmp_path / "in/other.txt").write_text("something else", encoding="utf-8")
    hit = hit_of(tmp_path / "in", tmp_path)
    assert (hit.source, hit.title, hit.url, hit.chunk) == ("guide/files.md", "Files", None, None)


@pytest.mark.parametrize(
    ("fields", "source", "url"),
    [
        ({}, "in.jsonl:2", None),
        ({"source": "Handbuch, S. 3"}, "Handbuch, S. 3", None),
        ({"url": "https://example.org/ü?a=1"}, "https://example.org/ü?a=1", "https://example.org/ü?a=1"),
        ({"source": "a.pdf", "url": "http://example.org/a"}, "a.pdf", "http://example.org/a"),
        ({"source": "https://example.org/a"}, "https://example.org/a", "https://example.org/a"),
        (
            {"metadata": {"url": "https://example.org/beir"}},
            "https://example.org/beir",
            "https://example.org/beir",
        ),
        ({"metadata": {"source": "لغة.txt"}}, "لغة.txt", None),
        ({"source": "javascript:alert(1)", "url": "data:text/html,x"}, "javascript:alert(1)", None),
        ({"source": 7, "metadata": "x"}, "in.jsonl:2", None),
        ({"source": "half \ud800", "url": ""}, "in.jsonl:2", None),
    ],
)
def test_hits_of_json_lines_say_what_their_records_say(tmp_path, fields, source, url):
    rows = [{"text": "something else"}, {"text": "open a file", **fields}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    hit = hit_of(tmp_path / "in.jsonl", tmp_path)
    assert (hit.text, hit.source, hit.url) == ("open a file", source, url)


@pytest.mark.parametrize("columns", [{}, {"text_column": "body", "title_column": "heading"}])
def test_hits_of_parquet_are_read_where_it_lies(tmp_path, columns):
    """Without ``serving.documents``: the artefact says what it was made from, and which columns were read."""
    text, title = columns.get("text_column", "text"), columns.get("title_column", "title")
    table = {text: ["x", "open a file"], title: ["", ""], "url": [None, "https://example.org/open"]}
    Place(str(tmp_path / "in")).write_table("a.parquet", pa.table({text: ["y"], title: [""], "url": [""]}))
    Place(str(tmp_path / "in")).write_table("b.parquet", pa.table(table))
    hit = hit_of(tmp_path / "in", tmp_path, columns)
    assert (hit.text, hit.source, hit.url) == ("open a file", *[table["url"][1]] * 2)
    Place(str(tmp_path / "in")).write_table(
        "b.parquet", pa.table({text: ["x", "open a file"], title: ["", ""]})
    )
    hit = hit_of(tmp_path / "in", tmp_path, columns)
    assert (hit.source, hit.url) == ("b.parquet:2", None)


def test_hits_of_a_runs_corpus_name_source_and_chunk(tmp_path):
    """A document that was cut says which of its parts was found; one that was not says nothing."""
    folder = tmp_path / "docs"
    folder.mkdir()
    words = [f"word{number}" for number in range(60)]
    rows = [
        {"text": " ".join(words), "at": "https://example.org/long"},
        {"text": "open a file", "at": "https://example.org/short"},
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    save_word_tokenizer(tmp_path / "base")
    config = CorpusConfig.model_validate(
        {
            "sources": [{"format": "jsonl", "path": str(folder / "a.jsonl"), "source_column": "at"}],
            "min_characters": 1,
            "chunk_tokens": 24,
            "split": {"dev": 0, "test": 0},
        }
    )
    out = ArtefactWriter(Place(str(tmp_path / "corpus")), "corpus", "c", {}, "local")
    corpus = build_corpus(config, 0, tmp_path / "base", out).place
    documents = {row["id"]: row for row in corpus.read_tables("documents/train").to_pylist()}
    pieces = {row["id"]: (row["chunk"], row["chunks"]) for row in corpus.read_tables("chunks").to_pylist()}
    hit = hit_of(tmp_path / "corpus", tmp_path)
    assert (hit.source, hit.url, hit.chunk, hit.chunks) == (rows[1]["at"], rows[1]["at"], None, None)
    found = load(Place(str(tmp_path / "vectors"))).search(ENCODER.embed(["x"], "document")[0], 99, True)
    cut = [hit for hit in found if hit.chunk is not None]
    assert len(cut) == len(pieces) == len(documents) - 1 >= 3
    assert {hit.id: (hit.chunk, hit.chunks) for hit in cut} == pieces
    assert {hit.source for hit in cut} == {rows[0]["at"]}
    # In the order of their numbers the parts are the document again: nothing but counting says so.
    assert " ".join(hit.text for hit in sorted(cut, key=lambda hit: hit.chunk)) == rows[0]["text"]


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://example.org", True), ("HTTP://例え.jp/パス?q=1#x", True), ("http://127.0.0.1:8000/a", True),
        ("javascript:alert(1)", False), (" javascript:alert(1)", False), ("java\nscript:alert(1)", False),
        ("data:text/html,<script>", False), ("file:///etc/passwd", False), ("//example.org/a", False),
        ("https:/example.org", False), ("https://", False), ("https://bank.example@evil.example", False),
        ("https://example.org/a b", False), ("https://example.org/\\evil", False), ("http://[", False),
        ("https://example.org/\"onclick=x", False), ("ftp://example.org/a", False), ("", False), (None, False),
    ],
)  # fmt: skip
def test_only_what_a_browser_may_be_sent_to_is_a_link(text, safe):
    assert link_of(text) == (text if safe else None)


def test_documents_of_another_corpus_are_refused(tmp_path):
    place = artefact(tmp_path, TEXTS)
    other = Place(str(tmp_path / "other"))
    other.write_table("in.parquet", pa.table({"id": ["a"], "text": ["something else"]}))
    with pytest.raises(DataError, match=r"serving\.documents: .* is not what"):
        load(place, str(tmp_path / "other" / "in.parquet"))


def test_another_contract_other_weights_and_queries_are_refused(tmp_path):
    place = artefact(tmp_path, TEXTS)
    with pytest.raises(DataError, match="contract_hash"):
        load(place, contract_hash="0" * 16)
    with pytest.raises(DataError, match=r"embedded by model 'f00d', the served model is 'beef'"):
        load(place, model="beef")
    manifest = Artefact.open(place).manifest
    manifest["details"]["recipe"]["side"] = "query"
    place.write_bytes("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ConfigError, match="side 'query'"):
        load(place)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        load(Place(str(tmp_path / "nothing")))


def test_search_over_http_states_scores_timing_and_contract(tmp_path):
    corpus = load(artefact(tmp_path, TEXTS), str(tmp_path / "in.parquet"))
    encoder = FakeEncoder(limit=128)
    with client_of(encoder, corpus=corpus) as client:
        reply = client.post("/v1/search", json={"query": "where?", "top_k": 3, "instruction": "Find"})
        query = encoder.embed(["where?"], "query", instruction="Find")[0]
        body = reply.json()
        assert [hit["id"] for hit in body["results"]] == [f"d{row:02d}" for row in best(query)[0][:3]]
        assert body["results"][0]["text"].startswith("document number")
        assert body["timing"]["embed_seconds"] > 0 and body["timing"]["search_seconds"] > 0
        assert body["contract_hash"] == reply.headers["x-contract-hash"] == HASH
        assert body["usage"]["total_tokens"] == 1 + len("Instruct: Find\nQuery: where?")
        (card,) = client.get("/v1/models").json()["data"]
        assert card["corpus"] == {
            "documents": 30,
            "dimension": 8,
            "index": "exact",
            "texts": True,
            "modes": ["dense"],
            "mode": "dense",
        }
        plain = client.post("/v1/search", json={"query": "where?", "return_documents": False}).json()
        assert len(plain["results"]) == 10 and plain["results"][0]["text"] is None
        for change, param in (({"top_k": 0}, "top_k"), ({"top_k": 1001}, "top_k"), ({"query": " "}, "query")):
            assert refused(client.post("/v1/search", json={"query": "a", **change}), 400)["param"] == param
        pin = {"query": "a", "contract_hash": "0" * 16}
        assert refused(client.post("/v1/search", json=pin), 409)["code"] == "contract_mismatch"


def test_an_index_never_meets_vectors_of_a_model_that_replaced_its_own(tmp_path):
    corpus = load(artefact(tmp_path, TEXTS))
    with client_of(FakeEncoder(limit=128), corpus=corpus, fingerprint="new weights") as client:
        reply = client.post("/v1/search", json={"query": "where?"})
        assert refused(reply, 503)["code"] == "model_replaced"
        assert reply.headers["retry-after"] == "1"


def test_without_a_corpus_there_is_no_search():
    with client_of(FakeEncoder()) as client:
        refused(client.post("/v1/search", json={"query": "a"}), 404)
        assert client.get("/v1/models").json()["data"][0]["corpus"] is None
