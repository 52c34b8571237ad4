"""Exact and near duplicates over all rows written so far: a shuffle by hash over files, in Ray tasks.

Rows are sorted into buckets by the hashes they share with their duplicates (the text's own, and one per MinHash
band); a bucket is small enough for one task, which holds it against the same bucket of earlier rounds. A row is
refused if a row before it, by (round, id), has the same text or a similar signature in a shared band; ids are hashes,
so no generator comes first. Nothing passes through the driver.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.config.quality import NearDuplicateCheck
from embedloom.engines.tasks import run_tasks
from embedloom.storage import Place
from embedloom.synthesis.attempts import number64
from embedloom.synthesis.quality.duplicates import band_keys, similarity
from embedloom.synthesis.refusals import Round, refusal_table

DUPLICATES_FOLDER = "duplicates"
_KEYS_FOLDER = "keys"
_ROWS_PER_BUCKET = 50_000
_MOST_BUCKETS = 256
_KEY_SCHEMA = pa.schema(
    [("key", pa.uint64()), ("exact", pa.bool_()), ("part", pa.string()), ("id", pa.string()), ("signature", pa.binary())]
)  # fmt: skip
_Entry = tuple[int, dict[str, Any]]  # (round, row of _KEY_SCHEMA)


@dataclass(frozen=True, slots=True)
class DuplicateSearch:
    """What the tasks need.

    Attributes:
        place: of the artefact.
        rounds: folders of all rounds whose rows are compared, in order; the last is the one that is judged.
        buckets: the same for every round.
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


def bucket_count(rows: int) -> int:
    """Buckets for this many rows in all; a bucket is held in one task's memory."""
    return max(1, min(_MOST_BUCKETS, rows // _ROWS_PER_BUCKET))


def refuse_duplicates(stage: str, search: DuplicateSearch, one: Round) -> None:
    """Write ``duplicates/`` of a round; what is there already is kept."""
    place = search.place
    groups = one.groups(place)
    have = set(place.names(f"{search.folder}/{_KEYS_FOLDER}/{search.buckets - 1:04d}", ".parquet"))
    todo = [
        (number, group)
        for number, group in enumerate(groups)
        if f"{search.folder}/{_KEYS_FOLDER}/{search.buckets - 1:04d}/{_group_file(number)}" not in have
    ]
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


def _group_file(number: int) -> str:
    return f"group-{number:06d}.parquet"


def _write_keys(item: tuple[int, tuple[str, ...]], search: DuplicateSearch) -> None:
    """Sort the keys of a group of parts into buckets; the last bucket's file is written last."""
    number, parts = item
    one = Round(search.folder)
    entries = [entry for part in parts for entry in _entries(one, part, search)]
    table = pa.Table.from_pylist(entries, schema=_KEY_SCHEMA)
    buckets = table.column("key").to_numpy() % np.uint64(search.buckets)
    for bucket in range(search.buckets):
        chosen = table.filter(pa.array(buckets == bucket))
        name = f"{search.folder}/{_KEYS_FOLDER}/{bucket:04d}/{_group_file(number)}"
        search.place.write_table(name, chosen)


def _entries(one: Round, part: str, search: DuplicateSearch) -> Iterator[dict[str, Any]]:
    columns = list(dict.fromkeys(["id", "generator", search.group_column, "exact_key", "signature"]))
    for row in one.rows(search.place, part, columns).to_pylist():
        group = row[search.group_column]
        if row["exact_key"] is not None:
            key = row["exact_key"] ^ number64(f"exact:{group}")
            yield {"key": key, "exact": True, "part": part, "id": row["id"], "signature": None}
        if search.near is None or row["signature"] is None:
            continue
        scope = row["generator"] if search.near.scope == "generator" else ""
        salt = number64(f"near:{group}:{scope}")
        for key in band_keys(row["signature"], search.near.threshold):
            yield {
                "key": key ^ salt,
                "exact": False,
                "part": part,
                "id": row["id"],
                "signature": row["signature"],
            }


def _search_bucket(bucket: int, search: DuplicateSearch) -> None:
    """Find the duplicates of one bucket among the last round's rows."""
    entries: list[_Entry] = [
        (order, row)
        for order, folder in enumerate(search.rounds)
        for name in search.place.names(f"{folder}/{_KEYS_FOLDER}/{bucket:04d}", ".parquet")
        for row in search.place.read_table(name).to_pylist()
    ]
    entries.sort(key=lambda entry: (entry[1]["exact"], entry[1]["key"], entry[0], entry[1]["id"]))
    keys = [(row["exact"], row["key"]) for _, row in entries]
    starts = [n for n, (a, b) in enumerate(pairwise([None, *keys])) if a != b]
    refused: dict[str, dict[str, object]] = {}
    for start, stop in pairwise([*starts, len(entries)]):
        if stop - start > 1:
            for row in _judge_group(entries[start:stop], search):
                known = refused.setdefault(str(row["id"]), row)
                if (row["reason"], row["detail"]) < (known["reason"], known["detail"]):
                    refused[str(row["id"])] = row
    table = refusal_table(refused[identity] for identity in sorted(refused))
    search.place.write_table(f"{search.folder}/{DUPLICATES_FOLDER}/bucket-{bucket:04d}.parquet", table)


def _judge_group(group: Sequence[_Entry], search: DuplicateSearch) -> Iterator[dict[str, object]]:
    """Refusals among rows that share a key, in order of precedence."""
    last = len(search.rounds) - 1
    for place, (order, row) in enumerate(group):
        if order != last or not place:
            continue
        refusal = {"part": row["part"], "id": row["id"]}
        if row["exact"]:
            yield {**refusal, "reason": "duplicate", "detail": f"of {group[0][1]['id']}"}
            continue
        threshold = search.near.threshold if search.near is not None else 1.0
        for _, earlier in group[:place]:
            if earlier["id"] == row["id"]:
                continue
            score = similarity(earlier["signature"], row["signature"])
            if score >= threshold:
                yield {**refusal, "reason": "near_duplicate", "detail": f"{score:.2f} of {earlier['id']}"}
                break
