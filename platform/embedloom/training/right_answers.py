"""Which documents answer which query, over all rows and sources of a mix: none of them is a negative of it.

Texts are compared as the model sees them: their token ids, cut to the limit, read back, without case and blanks. A
text is a key of 63 bits; among 10 million texts two different ones share a key with a chance of about 10^-5.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.ngrams import folded, hash64, mix

Keys = np.ndarray[Any, np.dtype[np.int64]]
_LISTS = pa.list_(pa.int64())
# One row an example, part for part as the token ids: the query, its right answers with the positive first, its negatives.
KEY_SCHEMA = pa.schema([("query_key", pa.int64()), ("rights", _LISTS), ("negatives", _LISTS)])


def seen_keys(
    tokenizer: Any, token_ids: Sequence[Sequence[int]], marks: Sequence[str] | None = None
) -> list[int]:
    """Key of each text as the model sees it; texts with different ``marks`` never share one."""
    texts = tokenizer.backend_tokenizer.decode_batch(
        [list(ids) for ids in token_ids], skip_special_tokens=False
    )
    return [
        hash64(f"{mark}\0{folded(text)}") >> 1
        for text, mark in zip(texts, marks or [""] * len(texts), strict=True)
    ]


class RightAnswers:
    """Right answers of the queries that have several, found by query; those of a row alone it knows itself."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        """Gather.

        Args:
            tables: of ``KEY_SCHEMA``, of every source of the mix.
        """
        queries, rights = (np.concatenate(found) for found in zip(*map(_pairs, tables), strict=True))
        _, first = np.unique(_joined(queries, rights), return_index=True)
        queries, rights = queries[first], rights[first]
        names, counts = np.unique(queries, return_counts=True)
        several = np.flatnonzero(np.isin(queries, names[counts > 1]))
        order = several[np.lexsort((rights[several], queries[several]))]
        self._queries, self._rights = queries[order], rights[order]
        self._pairs = _joined(self._queries, self._rights)

    def of(self, query: int) -> list[int]:
        """All right answers of a query; nothing where no query of the mix has more than one."""
        first, last = np.searchsorted(self._queries, [query, query + 1])
        return [int(key) for key in self._rights[first:last]]

    def touches(self, table: pa.Table) -> bool:
        """Whether a row of a source has a negative that is a right answer by another row."""
        queries = _column(table, "query_key")
        counts, negatives = _flat(table, "negatives")
        owners = np.repeat(np.arange(len(queries)), counts)
        return bool(np.isin(_joined(queries[owners], negatives), self._pairs).any())

    @property
    def digest(self) -> str:
        """Sixteen hex digits over all of them."""
        return hashlib.blake2b(self._queries.tobytes() + self._rights.tobytes(), digest_size=8).hexdigest()


def _pairs(table: pa.Table) -> tuple[Keys, Keys]:
    counts, rights = _flat(table, "rights")
    return np.repeat(_column(table, "query_key"), counts), rights


def _column(table: pa.Table, name: str) -> Keys:
    return np.asarray(table.column(name).combine_chunks(), dtype=np.int64)


def _flat(table: pa.Table, name: str) -> tuple[Keys, Keys]:
    """Length of each list of a column, and all their values."""
    column = table.column(name).combine_chunks()
    return np.asarray(column.value_lengths(), dtype=np.int64), np.asarray(column.flatten(), dtype=np.int64)


def _joined(queries: Keys, documents: Keys) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """One key of a query and a document."""
    return mix(mix(queries.astype(np.uint64)) ^ documents.astype(np.uint64))
