import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.synthesis.attempts import PositiveTexts, RowSource, chosen_rows, hash_ranks, ordered_ranks


def documents(place: Place, langs: list[str | None]) -> RowSource:
    """One document a language given, five to a file."""
    rows = [
        {"id": f"d{n}", "text": f"text {n}", "title": f"title {n}", "lang": lang, "source": "s"}
        for n, lang in enumerate(langs)
    ]
    for start in range(0, len(rows), 5):
        table = table_from_rows("documents", rows[start : start + 5])
        place.write_table(f"documents/part-{start:06d}.parquet", table)
    names = place.names("documents", ".parquet")
    return RowSource("documents", tuple((place, name) for name in names), same_language=True)


@pytest.fixture
def mixed(tmp_path: Path) -> RowSource:
    """12 German documents, and 8 English ones of which two do not say so."""
    langs = ["deu", "eng", "deu", "deu", "eng"] * 4
    return documents(Place(str(tmp_path)), [None if n in (1, 6) else lang for n, lang in enumerate(langs)])


def test_hash_ranks_are_the_first_eight_bytes_of_a_blake2b():
    (rank,) = hash_ranks("42:sts", ["abc"])
    assert int(rank) == int.from_bytes(hashlib.blake2b(b"42:sts:abc", digest_size=8).digest(), "little")


def test_every_place_of_an_order_is_a_different_document_of_its_language(mixed: RowSource):
    orders = ordered_ranks(mixed, ["deu", "eng"], "1:f", "synthesis.families.f")
    assert {label: len(order) for label, order in orders.items()} == {"deu": 12, "eng": 8}
    wanted = {"deu": np.arange(12), "eng": np.arange(8)}
    found = list(chosen_rows(mixed, orders, wanted, "1:f"))
    assert Counter((label, index) for label, index, _ in found) == {
        **{("deu", n): 1 for n in range(12)},
        **{("eng", n): 1 for n in range(8)},
    }
    assert {row["id"] for label, _, row in found if label == "eng"} == {
        "d1", "d4", "d6", "d9", "d11", "d14", "d16", "d19",
    }  # fmt: skip
    by_hash = sorted(
        (int(hash_ranks("1:f", [row["id"]])[0]), row["id"]) for label, _, row in found if label == "deu"
    )
    assert [row["id"] for _, _, row in sorted((i, i, r) for label, i, r in found if label == "deu")] == [
        identity for _, identity in by_hash
    ]


def test_a_place_may_be_wanted_twice_and_most_not_at_all(mixed: RowSource):
    orders = ordered_ranks(mixed, ["deu"], "1:f", "f")
    found = list(chosen_rows(mixed, orders, {"deu": np.array([3, 7, 3])}, "1:f"))
    by_index = {index: row["id"] for _, index, row in found}
    assert sorted(by_index) == [0, 1, 2]
    assert by_index[0] == by_index[2] != by_index[1]


def test_pairs_serve_every_language_but_their_own(tmp_path: Path):
    place = Place(str(tmp_path))
    pairs = [
        {"id": f"p{n}", "query": f"q{n}", "document_id": "d", "task_type": "retrieval", "instruction": "i",
         "lang": lang, "document_lang": lang, "origin": "public"}
        for n, lang in enumerate(["eng", "deu", "eng"])
    ]  # fmt: skip
    place.write_table("pairs/part-000000.parquet", table_from_rows("pairs", pairs))
    source = RowSource("pairs", ((place, "pairs/part-000000.parquet"),), same_language=False)
    orders = ordered_ranks(source, ["deu", "fra"], "1", "f")
    assert {label: len(order) for label, order in orders.items()} == {"deu": 2, "fra": 3}
    found = chosen_rows(source, orders, {"deu": np.arange(2), "fra": np.arange(0)}, "1")
    assert sorted(row["id"] for _, _, row in found) == ["p0", "p2"]


def test_a_language_without_documents_is_named_with_those_there_are(mixed: RowSource):
    with pytest.raises(
        DataError,
        match=r"^synthesis.families.f: the corpus has no documents in 'fra'; its languages: deu, eng$",
    ):
        ordered_ranks(mixed, ["fra"], "1", "synthesis.families.f")


def test_a_corpus_without_the_needed_columns_is_named(tmp_path: Path):
    place = Place(str(tmp_path))
    place.write_table("documents/part-000000.parquet", pa.table({"key": ["a"], "text": ["b"]}))
    source = RowSource("documents", ((place, "documents/part-000000.parquet"),), same_language=True)
    with pytest.raises(DataError, match=r"part-000000.parquet: no column 'id'; a documents table needs"):
        ordered_ranks(source, ["eng"], "1", "f")


def test_positives_come_from_the_corpus_where_a_pair_has_none(mixed: RowSource, tmp_path: Path):
    rows = [
        {"id": "a", "document_id": "d3", "positive": None},
        {"id": "b", "document_id": "elsewhere", "positive": "own"},
        {"id": "c", "document_id": "d99", "positive": None},
        {"id": "d", "document_id": "d5", "positive": None},
    ]
    place = Place(str(tmp_path / "pairs"))
    columns = {"query": ["q"] * 4, "lang": ["deu"] * 4}
    place.write_table("pairs.parquet", pa.Table.from_pylist(rows).append_column("lang", [columns["lang"]]))
    pairs = RowSource("pairs", ((place, "pairs.parquet"),), same_language=False)
    orders = ordered_ranks(pairs, ["eng"], "1", "f")
    every = {"eng": np.arange(4)}
    reads: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = RowSource.tables
        patch.setattr(
            RowSource,
            "tables",
            lambda self, columns=None: (reads.append(1) if self is mixed else None, real(self, columns))[1],
        )
        texts = PositiveTexts(pairs, orders, every, "1", mixed)
    texts.fill(rows[:2])
    texts.fill(rows[3:])
    assert [rows[n]["positive"] for n in (0, 1, 3)] == ["title 3 text 3", "own", "title 5 text 5"]
    assert len(reads) == 1  # one pass over the corpus, however many pairs
    with pytest.raises(DataError, match="pair 'c': its document 'd99' is not in the train split"):
        texts.fill(rows[2:3])
    texts.close()
