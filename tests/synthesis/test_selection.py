import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.errors import DataError
from embedloom.records import content_id, table_from_rows
from embedloom.storage import Place
from embedloom.synthesis.selection import hash_ranks, quotas, work_folder, write_work


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        (10, [1.0], [10]),
        (10, [1.0, 1.0], [5, 5]),
        (10, [2.0, 1.0], [7, 3]),  # 6.67 and 3.33: the larger remainder gets the odd one
        (10, [1.0, 1.0, 1.0], [4, 3, 3]),  # equal remainders: the first
        (7, [0.5, 0.3, 0.2], [4, 2, 1]),  # 3.5, 2.1, 1.4
        (2, [5.0, 5.0, 0.001], [1, 1, 0]),
        (1, [1.0, 3.0], [0, 1]),
    ],
)
def test_quotas_by_hand(total: int, weights: list[float], shares: list[int]):
    assert quotas(total, weights) == shares


@given(total=st.integers(0, 10_000), weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_quotas_sum_up_and_are_within_one_of_the_exact_share(total: int, weights: list[float]):
    shares = quotas(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) <= 1 + 1e-6


def test_hash_ranks_are_the_first_eight_bytes_of_a_blake2b():
    (rank,) = hash_ranks(42, ["abc"])
    assert int(rank) == int.from_bytes(hashlib.blake2b(b"42:abc", digest_size=8).digest(), "little")


@pytest.fixture
def corpus(tmp_path: Path) -> Place:
    """100 documents in three files, one of them empty."""
    place = Place(str(tmp_path / "corpus"))
    rows = [{"id": content_id(str(n)), "text": f"text {n}", "source": "s"} for n in range(100)]
    for number, (start, stop) in enumerate([(0, 61), (61, 61), (61, 100)]):
        place.write_table(f"train/part-{number:06d}.parquet", table_from_rows("documents", rows[start:stop]))
    return place


def ids(out: Place, generator: int) -> list[str]:
    return out.read_tables(work_folder(generator), "documents").column("id").to_pylist()


def test_each_generator_gets_its_quota_of_the_lowest_hashes(corpus: Place, tmp_path: Path):
    out = Place(str(tmp_path / "out"))
    assert write_work(corpus, "train", out, 30, [2.0, 0.001, 1.0], seed=7) == [20, 0, 10]
    everyone = corpus.read_tables("train").column("id").to_pylist()
    order = sorted(
        everyone,
        key=lambda one: int.from_bytes(
            hashlib.blake2b(f"7:{one}".encode(), digest_size=8).digest(), "little"
        ),
    )
    assert set(ids(out, 0)) == set(order[:20])
    assert set(ids(out, 2)) == set(order[20:30])
    assert out.names(work_folder(1)) == []
    assert ids(out, 0) == [one for one in everyone if one in order[:20]], "rows keep the corpus order"


def test_more_documents_keep_the_smaller_choice(corpus: Place, tmp_path: Path):
    few, many, other = (Place(str(tmp_path / name)) for name in ("few", "many", "other"))
    write_work(corpus, "train", few, 10, [1.0], seed=7)
    write_work(corpus, "train", many, 40, [1.0], seed=7)
    write_work(corpus, "train", other, 10, [1.0], seed=8)
    assert set(ids(few, 0)) < set(ids(many, 0))
    assert set(ids(few, 0)) != set(ids(other, 0))


def test_a_small_corpus_gives_all_it_has(corpus: Place, tmp_path: Path):
    out = Place(str(tmp_path / "out"))
    assert write_work(corpus, "train", out, 1000, [1.0, 3.0], seed=7) == [25, 75]
    assert sorted(ids(out, 0) + ids(out, 1)) == sorted(corpus.read_tables("train").column("id").to_pylist())


def test_finished_work_is_not_written_again(corpus: Place, tmp_path: Path):
    out = Place(str(tmp_path / "out"))
    counts = write_work(corpus, "train", out, 30, [1.0, 1.0], seed=7)
    corpus.remove()
    assert write_work(corpus, "train", out, 30, [1.0, 1.0], seed=7) == counts


def test_an_empty_corpus_is_named(tmp_path: Path):
    corpus = Place(str(tmp_path / "corpus"))
    with pytest.raises(DataError, match="train: no Parquet file"):
        write_work(corpus, "train", Place(str(tmp_path / "out")), 30, [1.0], seed=7)
    corpus.write_table("train/part-000000.parquet", table_from_rows("documents", []))
    with pytest.raises(DataError, match="train: no document to write queries for"):
        write_work(corpus, "train", Place(str(tmp_path / "out")), 30, [1.0], seed=7)
