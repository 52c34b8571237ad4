"""Which documents or pairs the attempts read: decided by hash, streamed, eight bytes a row in memory.

The rows that may serve a label (a document language; for translation, a target language) are ordered by a hash.
Attempts take the next places of that order, from round to round, and start over when it is used up; so every
generator reads other documents, no row is drawn at random twice, and where an attempt reads follows from the plan.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedloom.errors import DataError
from embedloom.ngrams import hashes64
from embedloom.records import check_table
from embedloom.storage import Place
from embedloom.synthesis.attempts import DEFAULT_LANG

Numbers = np.ndarray[Any, np.dtype[np.int64]]
_ROWS = 4096  # read at a time


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where seed rows come from: files of one kind of table, and which of them may serve a label."""

    kind: str  # documents or pairs
    files: tuple[tuple[Place, str], ...]
    # Documents serve their own language; a pair is translated into every language but its own.
    same_language: bool

    def serves(self, lang: str | None, label: str) -> bool:
        """Whether a row of this language may be read for the label."""
        return ((lang or DEFAULT_LANG) == label) == self.same_language

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The rows, some thousand at a time.

        Raises:
            DataError: a file lacks a needed column.
        """
        for place, name in self.files:
            schema, _ = place.parquet_footer(name)
            wanted = columns or schema.names
            missing = [column for column in wanted if column not in schema.names]
            if missing and missing != ["lang"]:
                check_table(self.kind, place.read_table(name), f"{place.uri}/{name}")
            for table in place.iter_tables(name, [c for c in wanted if c in schema.names], _ROWS):
                yield table if columns else check_table(self.kind, table, f"{place.uri}/{name}")


def hash_ranks(seed: str, ids: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit number per id, ``uint64 [len(ids)]``, that depends on nothing but the seed and the id."""
    return hashes64(f"{seed}:{one}" for one in ids)


def ordered_ranks(source: RowSource, labels: Sequence[str], seed: str, where: str) -> dict[str, Any]:
    """Per label the sorted hashes of the rows that may serve it, ``uint64``.

    Args:
        source: the rows.
        labels: languages.
        seed: fixes the order.
        where: config key, named in errors.

    Raises:
        DataError: no row at all, or none for a label.
    """
    found: dict[str, list[Any]] = {label: [] for label in labels}
    seen: set[str] = set()
    for table in source.tables(["id", "lang"]):
        langs = table.column("lang").to_pylist() if "lang" in table.column_names else [None] * table.num_rows
        seen.update(lang or DEFAULT_LANG for lang in langs)
        ranks = hash_ranks(seed, table.column("id").to_pylist())
        for label in labels:
            fits = np.array([source.serves(lang, label) for lang in langs], dtype=bool)
            found[label].append(ranks[fits])
    for label, parts in found.items():
        if not any(len(part) for part in parts):
            need = f"in {label!r}" if source.same_language else f"in another language than {label!r}"
            raise DataError(
                f"{where}: the corpus has no {source.kind} {need}; its languages: {', '.join(sorted(seen)) or 'none'}"
            )
    return {label: np.sort(np.concatenate(parts)) for label, parts in found.items()}


def chosen_rows(
    source: RowSource, orders: dict[str, Any], wanted: dict[str, Numbers], seed: str
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every wanted row as (label, index into ``wanted[label]``, row), in the order of the files.

    Args:
        source: the rows.
        orders: of ``ordered_ranks``.
        wanted: per label, places in its order, each below the number of its rows; a place may stand several times.
        seed: as for ``ordered_ranks``.
    """
    by_place = {label: np.argsort(places, kind="stable") for label, places in wanted.items()}
    for table in source.tables():
        rows: list[dict[str, Any]] | None = None
        ranks = hash_ranks(seed, table.column("id").to_pylist())
        langs = table.column("lang").to_pylist()
        for label, order in orders.items():
            fits = np.array([source.serves(lang, label) for lang in langs], dtype=bool)
            places = np.searchsorted(order, ranks)
            sorted_places = wanted[label][by_place[label]]
            first = np.searchsorted(sorted_places, places, side="left")
            last = np.searchsorted(sorted_places, places, side="right")
            for number in np.flatnonzero(fits & (last > first)):
                rows = table.to_pylist() if rows is None else rows
                for index in by_place[label][first[number] : last[number]]:
                    yield label, int(index), rows[number]


def fill_positives(
    rows: Sequence[dict[str, Any]], documents: RowSource, text: Callable[[str | None, str], str]
) -> None:
    """Give pairs without a positive the text of their document, in place.

    Raises:
        DataError: a pair whose document the corpus lacks.
    """
    needed = {row["document_id"] for row in rows if row["positive"] is None}
    if not needed:
        return
    found: dict[str, str] = {}
    for table in documents.tables():
        for document in table.to_pylist():
            if document["id"] in needed:
                found[document["id"]] = text(document["title"], document["text"])
    for row in rows:
        if row["positive"] is None:
            if row["document_id"] not in found:
                raise DataError(
                    f"pair {row['id']!r}: its document {row['document_id']!r} is not in the train split, and it has no positive"
                )
            row["positive"] = found[row["document_id"]]
