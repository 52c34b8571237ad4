"""One pass over an input: a digest of every text, a hash of every id, and a reject of every row without a text."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.engines.shards import PART_PATTERN
from embedloom.errors import DataError
from embedloom.instructions import document_text
from embedloom.ngrams import hashes64
from embedloom.records import content_id, table_from_rows
from embedloom.retrieval.inputs import TextSource
from embedloom.storage import Place

ROWS_FOLDER = "rows"
REJECTS_FOLDER = "rejects"
DRAFTS_FOLDER = "drafts"
_SCAN_ROWS = 8192
_DIGEST_BYTES = 16  # two different texts of one digest would share a vector: among 10^10, a chance of 10^-19

Digests = np.ndarray[Any, np.dtype[np.uint64]]  # [n, 2]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

DRAFT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("digest", pa.binary(_DIGEST_BYTES), False),
        pa.field("file", pa.int32(), False),
        pa.field("row", pa.int64(), False),
    ]
)


def text_digest(text: str) -> bytes:
    """What equal texts have in common: 128 bits."""
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()


def texts_of(table: pa.Table, source: TextSource) -> list[str]:
    """What a model is given of each row; empty where there is none.

    A document is its title and text, joined and without blanks at the ends; a query is given as it stands.
    """
    bodies = [body or "" for body in table.column(source.text).to_pylist()]
    if source.side == "query":
        return [body if body.strip() else "" for body in bodies]
    titles = table.column(source.title).to_pylist() if source.title else [None] * len(bodies)
    return [document_text(title, body) for title, body in zip(titles, bodies, strict=True)]


def first_of_equals(digests: Digests) -> Numbers:
    """For each digest [n, 2], the smallest position that holds the same one: [n]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so positions ascend among equals
    ordered = digests[order]
    starts = np.ones(len(digests), dtype=bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    leaders = np.maximum.accumulate(np.where(starts, np.arange(len(digests)), 0))
    first = np.empty(len(digests), dtype=np.int64)
    first[order] = order[leaders]
    return first


def scan(source: TextSource, out: Place) -> tuple[Digests, Numbers, dict[str, int]]:
    """Read all texts once: drafts of the rows, digests [n, 2] and 64-bit hashes of the ids [n] of what has a text."""
    digests, hashes, rejects, number = [b""], [hashes64([])], dict[str, int](), 0
    for file, (name, _) in enumerate(source.files):
        start = 0
        for table in source.place.iter_tables(name, source.columns, _SCAN_ROWS):
            texts = texts_of(table, source)
            found = [text_digest(text) for text in texts]
            ids = _ids(table, source, found, f"{source.place.uri}/{name}", start)
            full = [row for row, text in enumerate(texts) if text]
            if len(full) < len(texts):
                where = [
                    (ids[row], f"{name}: row {start + row}") for row, text in enumerate(texts) if not text
                ]
                _reject(out, number, "empty", where, rejects)
            draft = [
                pa.array([ids[row] for row in full], pa.string()),
                pa.array([found[row] for row in full], pa.binary(_DIGEST_BYTES)),
                pa.array([file] * len(full), pa.int32()),
                pa.array([start + row for row in full], pa.int64()),
            ]
            out.write_table(
                f"{DRAFTS_FOLDER}/{PART_PATTERN.format(number)}",
                pa.table(draft, schema=DRAFT_SCHEMA),
            )
            digests.append(b"".join(found[row] for row in full))
            hashes.append(hashes64(ids[row] for row in full))
            start, number = start + table.num_rows, number + 1
    pairs = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
    return pairs, np.concatenate(hashes), rejects


def _ids(table: pa.Table, source: TextSource, digests: list[bytes], where: str, start: int) -> list[str]:
    if source.id is None:
        return [content_id(digest.hex()) for digest in digests]
    ids = table.column(source.id).to_pylist()
    for row, value in enumerate(ids):
        if value is None or value == "":
            raise DataError(
                f"{where}: row {start + row}: column {source.id!r} holds {value!r}; every row needs an id"
            )
    return [str(value) for value in ids]


def _reject(
    out: Place, number: int, reason: str, rows: list[tuple[str, str]], counts: dict[str, int]
) -> None:
    table = table_from_rows("rejects", ({"id": i, "reason": reason, "detail": d} for i, d in rows))
    out.write_table(f"{REJECTS_FOLDER}/{reason}-{number:06d}.parquet", table)
    counts[reason] = counts.get(reason, 0) + len(rows)


def first_of_repeats(out: Place, hashes: Numbers, digests: Digests) -> np.ndarray[Any, Any]:
    """Which rows [n] say something new: not those whose id and text an earlier row has; hashes only nominate.

    Raises:
        DataError: an id that stands for two texts.
    """
    ordered = np.sort(hashes)
    suspect = np.isin(hashes, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
    new = np.ones(len(hashes), dtype=bool)
    seen: dict[str, bytes] = {}
    start = 0
    for name in out.names(DRAFTS_FOLDER, ".parquet") if suspect.any() else ():
        ids = out.read_table(name, ["id"]).column("id")
        rows = np.flatnonzero(suspect[start : start + len(ids)])
        for row, identifier in zip(rows + start, ids.take(pa.array(rows)).to_pylist(), strict=True):
            text = digests[row].tobytes()
            new[row] = identifier not in seen
            if seen.setdefault(identifier, text) != text:
                raise DataError(
                    f"embedding.corpus: id {identifier!r} stands for two texts; ids must be unique"
                )
        start += len(ids)
    return new


def reject_repeats(out: Place, kept: np.ndarray[Any, Any], counts: dict[str, int]) -> None:
    """Count the rows that repeat an earlier one: its id and text, or its text alone where rows have no ids."""
    start = 0
    for number, name in enumerate(out.names(DRAFTS_FOLDER, ".parquet")):
        table = out.read_table(name, ["id", "file", "row"])
        again = table.filter(pa.array(~kept[start : start + table.num_rows]))
        if again.num_rows:
            rows = [(row["id"], f"file {row['file']}, row {row['row']}") for row in again.to_pylist()]
            _reject(out, number, "repeated", rows, counts)
        start += table.num_rows


def digests_before(place: Place) -> tuple[Digests, Numbers]:
    """Digests [n, 2] and hashes of the ids [n] of an earlier artefact's rows, in order."""
    digests, hashes = [b""], [hashes64([])]
    for name in place.names(ROWS_FOLDER, ".parquet"):
        table = place.read_table(name, ["id", "digest"])
        digests.extend(table.column("digest").to_pylist())
        hashes.append(hashes64(table.column("id").to_pylist()))
    pairs = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
    return pairs, np.concatenate(hashes)
