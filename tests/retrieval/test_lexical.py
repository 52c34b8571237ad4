"""The BM25 index: to the bit what bm25s makes of the same words, whatever the shards; and what its files promise."""

import json

import bm25s
import numpy as np
import pyarrow as pa
import pytest

from embedloom.compute.shards import run_here
from embedloom.config.cluster import PoolConfig
from embedloom.config.embedding import EmbeddingConfig, LexicalConfig
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.inputs import open_input
from embedloom.retrieval.ledger import open_ledger
from embedloom.retrieval.lexical import (
    Analyzer,
    best_rows,
    build_lexical,
    index_texts,
    load_lexical,
    postings,
)

TEXTS = [
    "The cat sat on the mat, and the mat was flat.",
    "Cats and dogs run; a dog runs after a cat.",
    "東京都に住む猫は魚を食べる。",
    "京都の寺院へ行く。",
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "Die Katzen schlafen im Haus der Nachbarn.",
    "numpy.linspace(start, stop, num=50) returns evenly spaced samples",
    "12345",
    "हिन्दी में लिखा गया एक वाक्य",
    "the the the cat",
    "नमस्ते दुनिया",
    "returns a sample of the samples",
]
PLAIN = LexicalConfig(language=None)
QUERIES = [
    "the cat",
    "cat cat mat",
    "東京",
    "京都",
    "เมืองหลวง",
    "Katzen",
    "samples",
    "वाक्य",
    "nothing of it",
    "—",
    "",
]


def built(folder, texts=TEXTS, shard_rows=5, config=PLAIN):
    folder.mkdir(exist_ok=True)
    table = pa.table({"id": [f"d{n:03d}" for n in range(len(texts))], "text": texts})
    Place(str(folder)).write_table("in.parquet", table)
    out = Place(str(folder / "vectors"))
    source = open_input(str(folder / "in.parquet"), EmbeddingConfig(), out)
    ledger = open_ledger(source, out, shard_rows, None)
    facts = build_lexical(
        "embed", config, source, ledger.parts, ledger.rows, out, PoolConfig(), tasks=run_here
    )
    return out, facts


def bm25s_scores(texts, queries, config=PLAIN):
    """What bm25s makes of the words: index and scores are its own."""
    analyzer = Analyzer.of(config.language)
    index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
    index.index(list(analyzer.words(texts)), show_progress=False)
    found = [[word for word in words if word in index.vocab_dict] for words in analyzer.words(queries)]
    return [
        index.get_scores(words) if words else np.zeros(len(texts), np.float32) for words in found
    ], index.vocab_dict


@pytest.mark.parametrize("shard_rows", [1, 5, 100])
@pytest.mark.parametrize(
    "config", [PLAIN, LexicalConfig(language="eng"), LexicalConfig(language=None, k1=0.9, b=0.4)]
)
def test_scores_are_those_of_bm25s_to_the_bit(tmp_path, shard_rows, config):
    out, facts = built(tmp_path, shard_rows=shard_rows, config=config)
    index = load_lexical(out)
    expected, vocabulary = bm25s_scores(TEXTS, QUERIES, config)
    for query, scores in zip(QUERIES, expected, strict=True):
        np.testing.assert_array_equal(index.scores(query), scores)
        np.testing.assert_array_equal(index_texts(TEXTS, config).scores(query), scores)
    assert facts["rows"] == len(index) == len(TEXTS) and facts["terms"] == len(set(vocabulary) - {""})


def test_bm25s_reads_the_index_and_finds_the_same(tmp_path):
    out, _ = built(tmp_path)
    theirs = bm25s.BM25.load(out.local / "lexical", mmap=True)
    rows, scores = theirs.retrieve([["cat", "mat"]], k=3, show_progress=False)
    own_rows, own_scores = load_lexical(out).search("cat mat", 3)
    assert rows[0].tolist() == own_rows.tolist() and np.array_equal(scores[0], own_scores)


def test_the_arrays_stay_on_disk(tmp_path):
    out, _ = built(tmp_path)
    arrays = load_lexical(out)._index.scores
    assert all(isinstance(arrays[name], np.memmap) for name in ("data", "indices", "indptr"))


@pytest.mark.parametrize(
    ("query", "row"),
    [("猫が食べる", 2), ("寺院", 3), ("ประเทศไทย", 4), ("Haus", 5), ("NUMPY LINSPACE", 6), ("हिन्दी", 8)],
)
def test_words_of_every_script_are_found(tmp_path, query, row):
    out, _ = built(tmp_path)
    assert load_lexical(out).search(query, 1)[0].tolist() == [row]


def test_a_language_finds_inflections():
    plain, english = (index_texts(TEXTS, LexicalConfig(language=language)) for language in (None, "eng"))
    assert plain.search("running", 9)[0].tolist() == []
    assert english.search("running", 9)[0].tolist() == [1]


def test_the_language_of_most_texts_is_found(tmp_path):
    german = [f"Die Katzen schlafen im Haus der Nachbarn, sagt Nummer {n}." for n in range(20)]
    _, facts = built(tmp_path / "a", german, config=LexicalConfig())
    assert facts["language"] == index_texts(german, LexicalConfig()).facts["language"] == "deu"
    mixed = [*german[:5], *(f"The cats are sleeping in the house of number {n}." for n in range(5)), *TEXTS]
    assert built(tmp_path / "b", mixed, config=LexicalConfig())[1]["language"] is None
    japanese = ["東京都に住む猫は魚を食べるのが大好きで、毎日市場へ行く。"] * 4
    assert index_texts(japanese, LexicalConfig()).facts["language"] is None  # Snowball has no stems for it


def test_lucenes_formula_by_hand():
    index = index_texts(["a a b", "b c", "c c c c"], PLAIN)
    # Three texts of 3, 2 and 4 words, 3 on average; "a" stands in one of them, twice.
    weight = np.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    by_hand = weight * 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * 3 / 3))
    assert index.scores("a").tolist() == pytest.approx([by_hand, 0, 0])


def test_postings_by_hand():
    table = postings([["b", "a", "b"], [], ["a"]])
    assert table.to_pylist() == [
        {"term": "b", "rows": [0], "counts": [2]},
        {"term": "a", "rows": [0, 2], "counts": [1, 1]},
    ]
    assert postings([]).num_rows == 0


def test_a_killed_build_counts_no_shard_twice(tmp_path):
    out, _ = built(tmp_path / "a")
    whole = {name: out.read_bytes(f"lexical/{name}") for name in ("data.csc.index.npy", "vocab.index.json")}
    place = Place(str(tmp_path / "b"))
    other, _ = built(tmp_path / "b")
    for name in ("lexical", "postings"):
        other.child(name).remove()
    other.delete("lexical.json")
    # The first shard is there, of other words than its texts have: it is taken as it is.
    other.write_table("postings/part-000000.parquet", postings([["taken"]] * 5))
    source = open_input(str(place.local / "in.parquet"), EmbeddingConfig(), other)
    ledger = open_ledger(source, other, 5, None)
    build_lexical("embed", PLAIN, source, ledger.parts, ledger.rows, other, PoolConfig(), tasks=run_here)
    assert load_lexical(other).search("taken", 9)[0].tolist() == [0, 1, 2, 3, 4]
    assert not other.exists("postings") and whole["vocab.index.json"] != other.read_bytes(
        "lexical/vocab.index.json"
    )


def test_best_rows_are_above_zero_and_equals_in_order():
    scores = np.array([0, 2, 1, 2, 0, 1, 1], np.float32)
    assert [best_rows(scores, k)[0].tolist() for k in (1, 3, 4, 7, 99)] == [
        [1], [1, 3, 2], [1, 3, 2, 5], [1, 3, 2, 5, 6], [1, 3, 2, 5, 6],
    ]  # fmt: skip
    assert (
        best_rows(np.zeros(3, np.float32), 2)[0].tolist()
        == best_rows(np.empty(0, np.float32), 2)[0].tolist()
        == []
    )
    drawn = np.random.default_rng(0).integers(0, 20, 500).astype(np.float32)
    by_sort = sorted(np.flatnonzero(drawn).tolist(), key=lambda row: (-drawn[row], row))
    assert all(best_rows(drawn, k)[0].tolist() == by_sort[:k] for k in range(1, 500, 7))


def test_no_index_is_none_and_a_broken_one_is_named(tmp_path):
    out, facts = built(tmp_path)
    assert load_lexical(Place(str(tmp_path))) is None
    out.write_json("lexical.json", {**facts, "rows": 11})
    with pytest.raises(DataError, match=r"12 rows.*says 11.*embed again"):
        load_lexical(out)
    out.write_json("lexical.json", facts)
    out.write_bytes("lexical/data.csc.index.npy", b"no array")
    with pytest.raises(DataError, match="not readable as an index of bm25s"):
        load_lexical(out)


def test_what_has_no_stemmer_or_no_words_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"embedding\.lexical\.language: 'jpn'.*allowed: auto, null.*english"
    ):
        Analyzer.of("jpn")
    with pytest.raises(DataError, match="no text has a word"):
        built(tmp_path, texts=["—", "?!"])
    assert json.loads(EmbeddingConfig(lexical={}).model_dump_json())["lexical"] == {
        "language": "auto", "k1": 1.5, "b": 0.75,
    }  # fmt: skip
