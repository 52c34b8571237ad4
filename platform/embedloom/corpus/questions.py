"""What is dropped, and which documents answer which questions: every one that a source says, whatever duplicates it came by.

A document that is dropped as a duplicate leaves its questions to the one that stays, and a question may have many
documents: any of them would else become a negative of the question that it answers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.config.corpus import SplitConfig
from embedloom.core.schemas import SCHEMAS, content_id, table_from_rows
from embedloom.core.text import folded, hashes64
from embedloom.corpus.dedup import (
    DROP_SCHEMA,
    EXACT_BY_FIRST,
    NEAR_BY_FIRST,
    NEAR_BY_ROW,
)
from embedloom.corpus.exchange import Counts, read_rows, received, send, write_rows
from embedloom.corpus.reading import (
    REJECT_SCHEMA,
    ROW_SCHEMA,
    Work,
    place_of,
    position,
    range_of,
    sorted_name,
)

# Train, dev and test: drawn by group, so that neighbours (one module, one file) never stand on two sides.


SPLITS = ("train", "dev", "test")


def split_of(group: str, config: SplitConfig, seed: int) -> str:
    """Split of a group: a function of its name, the shares and the seed alone.

    Adding documents therefore never moves another group, and a larger test share only takes from train.
    """
    place = int(content_id("split", str(seed), group)[:16], 16) / 2**64  # uniform in [0, 1)
    if place < config.dev:
        return "dev"
    # Counted from the other end: a change of one share leaves the other split as it was.
    return "test" if place >= 1 - config.test else "train"


# Drops: what every range is told of its rows that stay out, and what stands for them.


SETTLED_SCHEMA = pa.schema(
    [("row", pa.int64()), ("stay", pa.int64()), ("source", pa.string()), ("similarity", pa.float64())]
)
SETTLED_FOLDER = "settled"
_GROUP_SCHEMA = pa.schema([("group", pa.uint64()), ("split", pa.int8())])
GROUPS_FOLDER = "groups"
DUPLICATE_REJECTS, NEAR_REJECTS = "rejects-duplicate", "rejects-near"
QUERY_REJECTS, SPLIT_REJECTS = "rejects-query", "rejects-split"
_ASKED_SCHEMA = pa.schema(
    [
        ("stay", pa.int64()), ("row", pa.int64()), ("number", pa.int32()), ("text", pa.string()),
        ("grade", pa.float64()), ("instruction", pa.string()), ("lang", pa.string()), ("dataset", pa.string()),
        ("source", pa.string()), ("id", pa.string()),
    ]
)  # fmt: skip
_ASKED_FOLDER = "asked"


def settle(item: None, number: int, work: Work) -> Counts:
    """Tell every range of the rows that repeat one of this range: the one that stays in the end, and the repeated source.

    The row that an exact duplicate repeats may itself be a near-duplicate of another, which then stays for both.
    """
    tables = list(read_rows(work.place, sorted_name(number), ROW_SCHEMA, ["source"]))
    exact = received(work.place, EXACT_BY_FIRST, number, DROP_SCHEMA)
    near = received(work.place, NEAR_BY_FIRST, number, DROP_SCHEMA)
    own = received(work.place, NEAR_BY_ROW, number, DROP_SCHEMA)
    kept = dict(zip(own.column("row").to_pylist(), own.column("first").to_pylist(), strict=True))
    drops = pa.concat_tables([exact, near])
    if not drops.num_rows:
        return {}
    firsts = drops.column("first").to_numpy()
    sources = pa.concat_tables(tables).column("source").take(pa.array(place_of(firsts)))
    stays = [kept.get(first, first) for first in firsts.tolist()]
    settled = pa.table(
        [drops.column("row"), stays, sources, drops.column("similarity")], schema=SETTLED_SCHEMA
    )
    send(
        work.place, f"{SETTLED_FOLDER}/{number:06d}.arrow", settled, range_of(drops.column("row").to_numpy())
    )
    return {}


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of the rows of a range, by their places in it."""

    stays: dict[int, int]
    source: dict[int, str]
    similarity: dict[int, float | None]

    @classmethod
    def of(cls, work: Work, number: int) -> "Settled":
        """As the ranges of what they repeat have told."""
        table = received(work.place, SETTLED_FOLDER, number, SETTLED_SCHEMA)
        places = place_of(table.column("row").to_numpy()).tolist()
        others = (table.column(name).to_pylist() for name in SETTLED_SCHEMA.names[1:])
        return cls(*(dict(zip(places, values, strict=True)) for values in others))


def drop_duplicates(item: None, number: int, work: Work, buckets: int, asked: bool) -> Counts:
    """Note the rejects of a range, send its questions to the documents that stay, and count groups where equal ones meet."""
    settled = Settled.of(work, number)
    exact: list[dict[str, object]] = []
    near: list[dict[str, object]] = []
    questions: list[tuple[Any, ...]] = []
    groups: dict[str, str] = {}
    kept = 0
    for place, row in enumerate(_records(work, number)):
        similarity = settled.similarity.get(place)
        if place not in settled.stays:
            kept += 1
            groups.setdefault(row["group"], "")
        elif similarity is None:
            exact.append(_reject(row, "duplicate", f"{row['source']} repeats {settled.source[place]}"))
        else:
            repeats = f"{row['source']} repeats {settled.source[place]}, Jaccard {similarity:.3f}"
            near.append(_reject(row, "near_duplicate", repeats))
        if row["queries"]:
            here = position(number, place)
            questions += _asked(row, here, settled.stays.get(place, here))
    write_rejects(work, DUPLICATE_REJECTS, number, exact)
    write_rejects(work, NEAR_REJECTS, number, near)
    splits = _send_groups(work, number, list(groups), buckets)
    if asked:
        _send_questions(work, number, questions)
    return {"kept": kept, "duplicate": len(exact), "near_duplicate": len(near), "splits": splits}


def _records(work: Work, number: int) -> Iterator[dict[str, Any]]:
    columns = ["id", "source", "group", "lang", "queries", "grades", "instruction", "dataset"]
    for table in read_rows(work.place, sorted_name(number), ROW_SCHEMA, columns):
        yield from table.to_pylist()


def _reject(row: dict[str, Any], reason: str, detail: str) -> dict[str, object]:
    return {"id": row["id"], "reason": reason, "detail": detail}


def write_rejects(work: Work, folder: str, number: int, rejects: Sequence[dict[str, object]]) -> None:
    """Keep rejects of a range, in their order."""
    schema = SCHEMAS["rejects"].arrow()
    write_rows(work.place, f"{folder}/{number:06d}.arrow", schema, [table_from_rows("rejects", rejects)])


def _asked(row: dict[str, Any], here: int, stay: int) -> Iterator[tuple[Any, ...]]:
    own = (row["instruction"], row["lang"], row["dataset"], row["source"], row["id"])
    grades = row["grades"] or [1.0] * len(row["queries"])
    for place, (text, grade) in enumerate(zip(row["queries"], grades, strict=True)):
        yield (stay, here, place, text, grade, *own)


def _send_questions(work: Work, number: int, questions: Sequence[tuple[Any, ...]]) -> None:
    if questions:
        table = pa.table([list(column) for column in zip(*questions, strict=True)], schema=_ASKED_SCHEMA)
        receivers = range_of(table.column("stay").to_numpy())
        send(work.place, f"{_ASKED_FOLDER}/{number:06d}.arrow", table, receivers)


def _send_groups(work: Work, number: int, groups: Sequence[str], buckets: int) -> list[str]:
    """Count groups by split elsewhere; returns the splits that they fall to."""
    splits = [SPLITS.index(split_of(group, work.config.split, work.seed)) for group in groups]
    # 64 bits: two of a hundred million groups would be counted as one with a chance of 3 in 10,000.
    hashes = hashes64(groups)
    table = pa.table([pa.array(hashes), pa.array(splits, pa.int8())], schema=_GROUP_SCHEMA)
    send(work.place, f"{GROUPS_FOLDER}/{number:06d}.arrow", table, hashes % np.uint64(buckets))
    return [SPLITS[split] for split in sorted(set(splits))]


def count_groups(item: None, number: int, work: Work) -> Counts:
    """How many groups of a bucket fall to each split."""
    table = received(work.place, GROUPS_FOLDER, number, _GROUP_SCHEMA)
    _, first = np.unique(table.column("group").to_numpy(), return_index=True)
    counts = np.bincount(table.column("split").to_numpy()[first], minlength=len(SPLITS))
    return dict(zip(SPLITS, counts.tolist(), strict=True))


# Questions: gathered where their documents lie, then asked in one split alone.


QUESTION_SCHEMA = pa.schema(
    [
        ("document", pa.int64()), ("number", pa.int32()), ("text", pa.string()), ("grade", pa.float64()),
        ("instruction", pa.string()), ("lang", pa.string()), ("dataset", pa.string()), ("source", pa.string()),
        ("moved", pa.bool_()),
    ]
)  # fmt: skip
QUESTIONS_FOLDER = "questions"
_KEY_SCHEMA = pa.schema(
    [("key", pa.uint64()), ("key2", pa.uint64()), ("grade", pa.float64()), ("document", pa.int64()), ("number", pa.int32()), ("split", pa.int8())]
)  # fmt: skip
_KEYS_FOLDER = "question-keys"
ELSEWHERE_SCHEMA = pa.schema([("document", pa.int64()), ("number", pa.int32()), ("split", pa.int8())])
ELSEWHERE_FOLDER = "elsewhere"


def gather_questions(item: None, number: int, work: Work, buckets: int) -> Counts:
    """Write the questions of a range's documents, those of the rows they stand for included.

    A question that a document has twice is a reject, ``duplicate_query``; its higher grade counts.
    """
    table = received(work.place, _ASKED_FOLDER, number, _ASKED_SCHEMA)
    table = table.sort_by([(name, "ascending") for name in ("stay", "row", "number")])
    found: dict[tuple[int, str], dict[str, Any]] = {}
    of_document: dict[int, int] = {}
    repeated = []
    for one in table.to_pylist():
        key = (one["stay"], one["text"])
        if key in found:
            found[key]["grade"] = max(found[key]["grade"], one["grade"])
            detail = f"{one['text']!r} of {one['source']} stands twice for one document"
            repeated.append({"at": one["row"], **_reject(one, "duplicate_query", detail)})
            continue
        place = of_document[one["stay"]] = of_document.get(one["stay"], -1) + 1
        found[key] = {**one, "document": one["stay"], "number": place, "moved": one["row"] != one["stay"]}
    questions = pa.Table.from_pylist(list(found.values()), schema=QUESTION_SCHEMA)
    write_rows(work.place, f"{QUESTIONS_FOLDER}/{number:06d}.arrow", QUESTION_SCHEMA, [questions])
    rejects = pa.Table.from_pylist(repeated, schema=REJECT_SCHEMA)
    send(
        work.place, f"{QUERY_REJECTS}/{number:06d}.arrow", rejects, range_of(rejects.column("at").to_numpy())
    )
    _send_keys(work, number, questions, buckets)
    return {"questions": questions.num_rows, "duplicate_query": rejects.num_rows}


def _send_keys(work: Work, number: int, questions: pa.Table, buckets: int) -> None:
    documents = questions.column("document").to_numpy()
    wanted, slots = np.unique(documents, return_inverse=True)
    groups = (
        pa.concat_tables(
            [*read_rows(work.place, sorted_name(number), ROW_SCHEMA, ["group"])]
            or [pa.schema([ROW_SCHEMA.field("group")]).empty_table()]
        )
        .column("group")
        .take(pa.array(place_of(wanted)))
    )
    splits = [SPLITS.index(split_of(group, work.config.split, work.seed)) for group in groups.to_pylist()]
    keys = np.array(
        [_question_key(text) for text in questions.column("text").to_pylist()], dtype=np.uint64
    ).reshape(-1, 2)
    columns = [
        pa.array(keys[:, 0].copy()), pa.array(keys[:, 1].copy()), questions.column("grade"), questions.column("document"),
        questions.column("number"), pa.array(np.array(splits, dtype=np.int8)[slots]),
    ]  # fmt: skip
    send(
        work.place,
        f"{_KEYS_FOLDER}/{number:06d}.arrow",
        pa.table(columns, schema=_KEY_SCHEMA),
        keys[:, 0] % np.uint64(buckets),
    )


def _question_key(text: str) -> tuple[int, int]:
    """Equal for questions that are one but for case and blanks."""
    digest = hashlib.sha256(folded(text).encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def keep_in_one_split(item: None, number: int, work: Work) -> Counts:
    """Name the questions that are asked in two splits, where the answer would leak, to the ranges of their documents.

    A question stays in the split of its best document (of equals the first by id) with all its documents there; the
    others lie in splits that are never searched for it.
    """
    table = received(work.place, _KEYS_FOLDER, number, _KEY_SCHEMA)
    if not table.num_rows:
        return {}
    keys, keys2, grades, documents, numbers, splits = (
        table.column(name).to_numpy() for name in _KEY_SCHEMA.names
    )
    order = np.lexsort((numbers, documents, -grades, keys2, keys))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (keys[order][1:] != keys[order][:-1]) | (keys2[order][1:] != keys2[order][:-1])
    best = splits[order][new][np.cumsum(new) - 1]
    moved = best != splits[order]
    out = order[moved]
    columns = [documents[out], numbers[out], best[moved]]
    found = pa.table([pa.array(column) for column in columns], schema=ELSEWHERE_SCHEMA)
    send(work.place, f"{ELSEWHERE_FOLDER}/{number:06d}.arrow", found, range_of(documents[out]))
    return {}


def own_questions(work: Work, number: int) -> dict[int, list[tuple[dict[str, Any], str | None]]]:
    """Questions by the place of their document in the range, in order, and the other split that each is asked in."""
    elsewhere = received(work.place, ELSEWHERE_FOLDER, number, ELSEWHERE_SCHEMA)
    other = {(one["document"], one["number"]): SPLITS[one["split"]] for one in elsewhere.to_pylist()}
    found: dict[int, list[tuple[dict[str, Any], str | None]]] = {}
    for table in read_rows(work.place, f"{QUESTIONS_FOLDER}/{number:06d}.arrow", QUESTION_SCHEMA):
        for one in table.to_pylist():
            found.setdefault(one["document"] - position(number, 0), []).append(
                (one, other.get((one["document"], one["number"])))
            )
    return found
