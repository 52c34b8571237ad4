"""Exact and near duplicates: what a query is compared by, and the comparison over all rows written so far."""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.compute.shards import run_tasks
from embedloom.config.synthesis import NearDuplicateCheck
from embedloom.core.storage import Place
from embedloom.core.text import band_rows, hash64, minhash
from embedloom.synthesis.families.base import Row
from embedloom.synthesis.refusals import Round, refusal_table

# Equal and nearly equal queries: what a row is compared by. The comparison over all rows runs elsewhere.
#
# MinHash is datasketch's. A signature estimates the Jaccard similarity of two queries' character 5-grams with a
# standard error of at most 0.044 (128 permutations); characters, because queries are too short for word n-grams and
# because that works without blanks between words.


_CHARACTERS = 5
_PERMUTATIONS = 128
_MISS_CHANCE = 1e-3  # of a pair whose similarity is exactly the threshold


def exact_key(row: Row) -> int:
    """64-bit hash of the query but for case, blanks and compatibility forms."""
    return hash64(_plain(row))


def signature(row: Row) -> bytes:
    """MinHash of the query's character 5-grams: 128 numbers of 32 bits."""
    text = _plain(row)
    grams = {text[n : n + _CHARACTERS].encode() for n in range(max(1, len(text) - _CHARACTERS + 1))}
    return minhash(grams, _PERMUTATIONS).astype("<u4").tobytes()


def band_keys(signed: bytes, threshold: float) -> list[int]:
    """64-bit keys of the signature's bands; rows of the threshold's similarity share one with a chance of 99.9 %."""
    # Below a threshold of about 0.06 even bands of one number miss more.
    rows = band_rows(threshold, _PERMUTATIONS, _MISS_CHANCE) or 1
    width = 4 * rows
    return [
        int.from_bytes(
            hashlib.blake2b(b"%d:" % start + signed[start : start + width], digest_size=8).digest(), "little"
        )
        for start in range(0, len(signed) - width + 1, width)
    ]


def _plain(row: Row) -> str:
    return " ".join(unicodedata.normalize("NFKC", str(row["query"])).casefold().split())


# Exact and near duplicates over all rows written so far: a shuffle by hash over files, in Ray tasks.
#
# Rows are sorted into buckets by the hashes they share with their duplicates (the text's own, and one per MinHash
# band); a bucket is small enough for one task, which holds it against the same bucket of earlier rounds. A row is
# refused if a row before it, by (round, id), has the same text or a similar signature in a shared band; ids are hashes,
# so no generator comes first. Nothing passes through the driver.


DUPLICATES_FOLDER = "duplicates"
_KEYS_FOLDER = "keys"
_ROWS_PER_BUCKET = 20_000  # some 26 keys of 200 bytes each
_MOST_BUCKETS = 512
_KEY_SCHEMA = pa.schema(
    [("key", pa.uint64()), ("exact", pa.bool_()), ("part", pa.string()), ("id", pa.string()), ("signature", pa.binary())]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DuplicateSearch:
    """What the tasks need.

    Attributes:
        place: of the artefact.
        rounds: folders of all rounds whose rows are compared, in order; the last is the one that is judged.
        buckets: that keys are sorted into; where another number was used for earlier rounds, they are sorted anew.
        near: of the config; None where only equal texts count.
        group_column: rows are compared within one value of it.
    """

    place: Place
    rounds: tuple[str, ...]
    buckets: int
    near: NearDuplicateCheck | None
    group_column: str = "task_type"

    @property
    def folder(self) -> str:
        """The round that is judged."""
        return self.rounds[-1]

    def keys(self, folder: str, bucket: int) -> str:
        """Where a round's keys of a bucket lie."""
        return f"{folder}/{_KEYS_FOLDER}/of-{self.buckets:04d}/{bucket:04d}"


def bucket_count(rows: int) -> int:
    """Buckets for this many rows in all; a bucket is held in one task's memory."""
    return max(1, min(_MOST_BUCKETS, rows // _ROWS_PER_BUCKET))


def refuse_duplicates(stage: str, search: DuplicateSearch, one: Round) -> None:
    """Write ``duplicates/`` of a round; what is there already is kept."""
    place = search.place
    todo = [item for folder in search.rounds for item in _unsorted(replace(one, folder=folder), search)]
    for _ in run_tasks(stage, _write_keys, todo, search):
        pass
    done = set(place.names(f"{search.folder}/{DUPLICATES_FOLDER}", ".parquet"))
    missing = [
        bucket
        for bucket in range(search.buckets)
        if f"{search.folder}/{DUPLICATES_FOLDER}/bucket-{bucket:04d}.parquet" not in done
    ]
    for _ in run_tasks(stage, _search_bucket, missing, search):
        pass


def _unsorted(one: Round, search: DuplicateSearch) -> list[tuple[str, int, tuple[str, ...]]]:
    """Groups of a round's parts that have no keys of this number of buckets yet; the last bucket's file is written last."""
    last = search.keys(one.folder, search.buckets - 1)
    have = set(search.place.names(last, ".parquet"))
    return [
        (one.folder, number, group)
        for number, group in enumerate(one.groups(search.place))
        if f"{last}/{_group_file(number)}" not in have
    ]


def _group_file(number: int) -> str:
    return f"group-{number:06d}.parquet"


def _write_keys(item: tuple[str, int, tuple[str, ...]], search: DuplicateSearch) -> None:
    """Sort the keys of a group of a round's parts into buckets."""
    folder, number, parts = item
    one = Round(folder)
    tables = [_keys(one, part, search) for part in parts]
    table = pa.concat_tables(tables)
    buckets = table.column("key").to_numpy() % np.uint64(search.buckets)
    for bucket in range(search.buckets):
        chosen = table.filter(pa.array(buckets == bucket))
        search.place.write_table(f"{search.keys(folder, bucket)}/{_group_file(number)}", chosen)


def _keys(one: Round, part: str, search: DuplicateSearch) -> pa.Table:
    """One row of _KEY_SCHEMA per text, and one per band."""
    columns = list(dict.fromkeys(["id", "generator", search.group_column, "exact_key", "signature"]))
    found: dict[str, list[Any]] = {name: [] for name in _KEY_SCHEMA.names}

    def add(key: int, exact: bool, identity: str, signed: bytes | None) -> None:
        for name, value in zip(_KEY_SCHEMA.names, (key, exact, part, identity, signed), strict=True):
            found[name].append(value)

    for row in one.rows(search.place, part, columns).to_pylist():
        group = row[search.group_column]
        if row["exact_key"] is not None:
            add(row["exact_key"] ^ hash64(f"exact:{group}"), True, row["id"], None)
        if search.near is not None and row["signature"] is not None:
            scope = row["generator"] if search.near.scope == "generator" else ""
            salt, short = hash64(f"near:{group}:{scope}"), short_signature(row["signature"])
            for key in band_keys(row["signature"], search.near.threshold):
                add(key ^ salt, False, row["id"], short)
    return pa.table(found, schema=_KEY_SCHEMA)


def short_signature(signed: bytes) -> bytes:
    """The lowest byte of each number: a quarter of the size, and it is written once a band."""
    return np.frombuffer(signed, dtype="<u4").astype(np.uint8).tobytes()


def short_similarity(left: bytes, right: bytes) -> float:
    """Estimated Jaccard similarity of two short signatures (b-bit MinHash, Li and Koenig 2010, for long lists).

    One in 256 of the numbers that differ agrees in its lowest byte; the estimate takes them off again.
    """
    same = float(np.mean(np.frombuffer(left, np.uint8) == np.frombuffer(right, np.uint8)))
    return max(0.0, (same - 1 / 256) / (1 - 1 / 256))


def _search_bucket(bucket: int, search: DuplicateSearch) -> None:
    """Find the duplicates of one bucket among the last round's rows."""
    tables = [
        search.place.read_table(name).append_column(
            "order", pa.array([order] * search.place.parquet_footer(name)[1], pa.int32())
        )
        for order, folder in enumerate(search.rounds)
        for name in search.place.names(search.keys(folder, bucket), ".parquet")
    ]
    table = pa.concat_tables(tables)
    keys = [(name, "ascending") for name in ("exact", "key", "order", "id")]
    table = table.take(pc.sort_indices(table, sort_keys=keys))
    refused: dict[str, dict[str, object]] = {}
    for start, stop in _shared(table):
        for row in _judge_group(table.slice(start, stop - start).to_pylist(), search):
            known = refused.setdefault(str(row["id"]), row)
            if (row["reason"], row["detail"]) < (known["reason"], known["detail"]):
                refused[str(row["id"])] = row
    found = refusal_table(refused[identity] for identity in sorted(refused))
    search.place.write_table(f"{search.folder}/{DUPLICATES_FOLDER}/bucket-{bucket:04d}.parquet", found)


def _shared(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Runs of at least two rows with the same key, in a table that is sorted by it."""
    if not table.num_rows:
        return
    keys = table.column("key").to_numpy()
    exact = table.column("exact").to_numpy(zero_copy_only=False)
    changes = np.flatnonzero((keys[1:] != keys[:-1]) | (exact[1:] != exact[:-1])) + 1
    bounds = np.concatenate([[0], changes, [table.num_rows]])
    for number in np.flatnonzero(np.diff(bounds) > 1):
        yield int(bounds[number]), int(bounds[number + 1])


def _judge_group(group: Sequence[dict[str, Any]], search: DuplicateSearch) -> Iterator[dict[str, object]]:
    """Refusals among rows that share a key, in order of precedence."""
    last = len(search.rounds) - 1
    for place, row in enumerate(group):
        if row["order"] != last or not place:
            continue
        refusal = {"part": row["part"], "id": row["id"]}
        if row["exact"]:
            yield {**refusal, "reason": "duplicate", "detail": f"of {group[0]['id']}"}
            continue
        threshold = search.near.threshold if search.near is not None else 1.0
        for earlier in group[:place]:
            score = short_similarity(earlier["signature"], row["signature"])
            if earlier["id"] != row["id"] and score >= threshold:
                yield {**refusal, "reason": "near_duplicate", "detail": f"{score:.2f} of {earlier['id']}"}
                break
