"""How trustworthy the mined negatives are: score gaps, what each rule removed, near-duplicates. Pure functions."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.errors import DataError
from embedloom.ngrams import words_of

GAP_EDGES = tuple(round(0.025 * step, 3) for step in range(25))  # 0 to 0.6: where cosines of near misses lie
NEAR_DUPLICATE = 0.8  # Jaccard similarity from which two texts count as one, as the corpus stage's default
_REMOVED_COLUMNS = {
    "positive": "removed_as_positive",
    "margin": "removed_by_margin",
    "rank": "removed_by_rank",
    "floor": "removed_by_floor",
}
_SUMMED = ("candidates", "selected", "near_duplicates", "naive", "naive_removed", *_REMOVED_COLUMNS.values())
_COLUMNS = ("dataset", "given", "gaps", *_SUMMED)
_SHINGLE = 5


def near_duplicate(positive: str, negative: str) -> float:
    """Jaccard similarity of the word 5-grams of two texts, case aside; 0 to 1.

    If either has fewer than five words, their sets of words are compared. Two texts without words are equal if
    they are the same string.
    """
    left, right = (words_of(text) for text in (positive, negative))
    if not left and not right:
        return float(positive == negative)
    size = _SHINGLE if min(len(left), len(right)) >= _SHINGLE else 1
    first, second = (
        {tuple(words[n : n + size]) for n in range(len(words) - size + 1)} for words in (left, right)
    )
    return len(first & second) / len(first | second)


def audit_summary(tables: Iterable[pa.Table], negatives: int) -> dict[str, Any]:
    """Figures of the audit tables, over all rows and by dataset; one table is held at a time.

    Rows whose negatives came with the pair (``given``) are counted and left out of everything else: no rule chose
    those negatives.

    Args:
        tables: parts of ``audit/``, a row a query, with the columns ``dataset``, ``given``, ``candidates``,
            ``removed_as_positive``, ``removed_by_margin``, ``removed_by_rank``, ``removed_by_floor``, ``selected``,
            ``naive``, ``naive_removed``, ``near_duplicates`` and ``gaps`` (positive's score less each selected
            negative's).
        negatives: how many were asked for per query.

    Returns:
        JSON-like: ``{"negatives", "gap_edges": [e0, ..., en], "total": figures, "datasets": {name: figures}}``, where
        figures are::

            {"queries": rows, "given": rows, "candidates": n,
             "removed": {"positive"|"margin"|"rank"|"floor": {"count": n, "share": of candidates}},
             "selected": n, "short": {"count": rows with fewer than asked, "share": of mined rows, "empty": rows with none},
             "naive": {"count": n, "removed": n, "share": removed / count},
             "near_duplicates": {"count": n, "share": of selected},
             "gaps": {"counts": [n per e(i) <= gap < e(i+1)], "below": n, "above": n, "mean": x}}

        Shares and means of nothing are None.

    Raises:
        DataError: a column is missing, or a gap is not finite.
    """
    total = _Figures()
    datasets: dict[str, _Figures] = {}
    for table in tables:
        missing = [column for column in _COLUMNS if column not in table.column_names]
        if missing:
            raise DataError(f"audit: column {missing[0]!r} is missing; found: {table.column_names}")
        total.add(table, negatives)
        for name in pc.unique(table.column("dataset")).to_pylist():
            part = table.filter(pc.equal(table.column("dataset"), name))
            datasets.setdefault(name, _Figures()).add(part, negatives)
    return {
        "negatives": negatives,
        "gap_edges": list(GAP_EDGES),
        "total": total.result(),
        "datasets": {name: datasets[name].result() for name in sorted(datasets)},
    }


@dataclass(slots=True)
class _Figures:
    """Running sums of one group of rows."""

    rows: int = 0
    given: int = 0
    short: int = 0
    empty: int = 0
    sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SUMMED, 0))
    gap_sum: float = 0.0
    gap_counts: Any = field(default_factory=lambda: np.zeros(len(GAP_EDGES) + 1, dtype=np.int64))

    def add(self, table: pa.Table, negatives: int) -> None:
        """Take the rows of one table in."""
        mined = table.filter(pc.invert(table.column("given")))
        self.rows += table.num_rows
        self.given += table.num_rows - mined.num_rows
        for column in _SUMMED:
            self.sums[column] += pc.sum(mined.column(column)).as_py() or 0
        selected = mined.column("selected")
        self.short += pc.sum(pc.less(selected, negatives)).as_py() or 0
        self.empty += pc.sum(pc.equal(selected, 0)).as_py() or 0
        gaps = np.asarray(
            pc.list_flatten(mined.column("gaps")).to_numpy(zero_copy_only=False), dtype=np.float64
        )
        if not np.isfinite(gaps).all():
            raise DataError(f"audit: {int((~np.isfinite(gaps)).sum())} of {len(gaps)} gaps are not finite")
        self.gap_sum += float(gaps.sum())
        places = np.searchsorted(GAP_EDGES, gaps, side="right")  # 0: below all edges, len: above
        self.gap_counts += np.bincount(places, minlength=len(GAP_EDGES) + 1)

    def result(self) -> dict[str, Any]:
        """The figures as ``audit_summary`` describes them."""
        sums, mined = self.sums, self.rows - self.given
        below, *counts, above = (int(count) for count in self.gap_counts)
        gaps = below + sum(counts) + above
        return {
            "queries": self.rows,
            "given": self.given,
            "candidates": sums["candidates"],
            "removed": {
                rule: {"count": sums[column], "share": _share(sums[column], sums["candidates"])}
                for rule, column in _REMOVED_COLUMNS.items()
            },
            "selected": sums["selected"],
            "short": {"count": self.short, "share": _share(self.short, mined), "empty": self.empty},
            "naive": {
                "count": sums["naive"],
                "removed": sums["naive_removed"],
                "share": _share(sums["naive_removed"], sums["naive"]),
            },
            "near_duplicates": {
                "count": sums["near_duplicates"],
                "share": _share(sums["near_duplicates"], sums["selected"]),
            },
            "gaps": {
                "counts": counts,
                "below": below,
                "above": above,
                "mean": round(self.gap_sum / gaps, 4) if gaps else None,
            },
        }


def _share(count: int, whole: int) -> float | None:
    return round(count / whole, 4) if whole else None
