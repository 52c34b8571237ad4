"""How trustworthy the mined negatives are: gaps, rules and near-duplicates in numbers, and a second teacher on a sample."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest

from embedloom.compute.shards import run_sharded
from embedloom.config.cluster import PoolConfig
from embedloom.core.prompting import Side
from embedloom.core.storage import Place
from embedloom.core.text import words_of
from embedloom.errors import DataError
from embedloom.mining.select import score_limit
from embedloom.retrieval.embedder import EmbedderSource, unit_vectors
from embedloom.retrieval.search import Matrix, pair_scores

# How trustworthy the mined negatives are: score gaps, what each rule removed, near-duplicates. Pure functions.


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
    return summed_audit((audit_facts(table, negatives) for table in tables), negatives)


def audit_facts(table: pa.Table, negatives: int) -> dict[str, Any]:
    """What ``summed_audit`` needs of one part of ``audit/``: ``{"total": sums, "datasets": {name: sums}}``, JSON-like.

    Raises:
        DataError: a column is missing, or a gap is not finite.
    """
    missing = [column for column in _COLUMNS if column not in table.column_names]
    if missing:
        raise DataError(f"audit: column {missing[0]!r} is missing; found: {table.column_names}")
    names = pc.unique(table.column("dataset")).to_pylist()
    parts = {name: table.filter(pc.equal(table.column("dataset"), name)) for name in names}
    return {
        "total": _Figures.of(table, negatives).as_json(),
        "datasets": {name: _Figures.of(part, negatives).as_json() for name, part in parts.items()},
    }


def summed_audit(facts: Iterable[Mapping[str, Any]], negatives: int) -> dict[str, Any]:
    """``audit_summary`` out of ``audit_facts`` of all parts, in order."""
    total = _Figures()
    datasets: dict[str, _Figures] = {}
    for one in facts:
        total.add(one["total"])
        for name, sums in one["datasets"].items():
            datasets.setdefault(name, _Figures()).add(sums)
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

    def add(self, other: Mapping[str, Any]) -> None:
        """Take the sums of further rows in, ``as_json``."""
        for name in ("rows", "given", "short", "empty", "gap_sum"):
            setattr(self, name, getattr(self, name) + other[name])
        for column, count in other["sums"].items():
            self.sums[column] += count
        self.gap_counts += np.asarray(other["gap_counts"], dtype=np.int64)

    def as_json(self) -> dict[str, Any]:
        """The sums."""
        return {**asdict(self), "gap_counts": self.gap_counts.tolist()}

    @classmethod
    def of(cls, table: pa.Table, negatives: int) -> "_Figures":
        """The sums of one table's rows."""
        found = cls()
        found._count(table, negatives)
        return found

    def _count(self, table: pa.Table, negatives: int) -> None:
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


# A second teacher's opinion on a sample of negatives: how many of them it holds to be positives.


KINDS = ("selected", "naive")  # kept by the rules; what a miner without rules would have taken
SAMPLE_FOLDER = "judge/sample"
SCORES_FOLDER = "judge/scores"
JUDGED_FILE = "judged.parquet"
CONFIDENCE = 0.95
_SHARD_ROWS = 256
SAMPLE_SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("query_instruction", pa.string()),  # null: the judge's own for the task type
        ("task_type", pa.string()),
        ("positive", pa.string()),
        ("negative", pa.string()),
        ("kind", pa.string()),
        ("rank", pa.int32()),  # place among the query's negatives of this kind, from 1
    ]
)
_SCORES_SCHEMA = pa.schema([("positive_score", pa.float32()), ("negative_score", pa.float32())])


def judge_sample(
    sample: pa.Table, judge: EmbedderSource, place: Place, pool: PoolConfig, margin_ratio: float
) -> dict[str, Any]:
    """Score a sample of negatives with a second teacher and count those it would not have let through.

    A negative is false if the judge's cosine reaches ``score_limit`` of the judge's own cosine with the positive.
    Both kinds face the same judge, so their difference says what the rules are worth, even where the judge is wrong
    on both. The intervals hold for rows drawn independently: sample one negative of a kind per query.

    Args:
        sample: rows of ``SAMPLE_SCHEMA`` (further columns are kept); hundreds, since all texts are embedded.
        judge: a teacher that took no part in the mining.
        place: where ``judge/`` and ``judged.parquet`` (the sample with both scores and ``false_negative``) go; an
            interrupted run continues there.
        pool: actors and what each reserves.
        margin_ratio: see ``score_limit``.

    Returns:
        JSON-like: ``{"judge": name, "margin_ratio", "confidence": 0.95, "selected": figures, "naive": figures}`` with
        figures ``{"rows", "false", "share", "low", "high"}``; the last three are None for a kind without rows.

    Raises:
        DataError: an empty sample, a missing column, an unknown kind, or vectors that have no direction.
        StageError: a worker failed.
    """
    _check(sample)
    place.write_table(f"{SAMPLE_FOLDER}/part-000000.parquet", sample)
    parts = run_sharded(
        stage="judge negatives",
        source=place,
        source_folder=SAMPLE_FOLDER,
        output=place,
        done_folder=SCORES_FOLDER,
        shard_rows=_SHARD_ROWS,
        worker=JudgeWorker,
        worker_arguments={"judge": judge},
        pool=pool,
        unit="negatives",
    )
    scores = pa.concat_tables([place.read_table(part) for part in parts])
    positive, negative = (scores.column(name).to_numpy().astype(np.float64) for name in _SCORES_SCHEMA.names)
    limits = [score_limit(float(score), margin_ratio) for score in positive]
    false = negative >= np.asarray(limits)
    judged = sample
    for name in _SCORES_SCHEMA.names:
        judged = judged.append_column(f"judge_{name}", scores.column(name))
    place.write_table(JUDGED_FILE, judged.append_column("false_negative", pa.array(false)))
    kinds = np.asarray(sample.column("kind").to_pylist())
    return {
        "judge": judge.name,
        "margin_ratio": margin_ratio,
        "confidence": CONFIDENCE,
        **{kind: _figures(false[kinds == kind]) for kind in KINDS},
    }


class JudgeWorker:
    """Actor that scores a shard of the sample: cosine of the query with its positive and its negative."""

    def __init__(self, judge: EmbedderSource) -> None:
        self.embedder = judge.open()
        self.name = judge.name

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """One row of scores per row of the shard, in order."""
        columns = {name: rows.column(name).to_pylist() for name in SAMPLE_SCHEMA.names}
        types, instructions = columns["task_type"], columns["query_instruction"]
        queries = self._embed(columns["query"], "query", types, instructions)
        scores = {}
        for name in ("positive", "negative"):
            texts = self._embed(columns[name], "document", types, instructions)
            scores[f"{name}_score"] = pa.array(pair_scores(queries, texts), pa.float32())
        return {SCORES_FOLDER: pa.table(scores, schema=_SCORES_SCHEMA)}

    def _embed(
        self, texts: list[str], side: Side, task_types: list[str], instructions: list[str | None]
    ) -> Matrix:
        """Unit vectors of each row's text: [rows, d]; what stands in several rows is embedded once."""
        unique: dict[tuple[str, str, str | None], int] = {}
        keys = zip(texts, task_types, instructions, strict=True)
        places = [unique.setdefault(key, len(unique)) for key in keys]
        once, types, own = zip(*unique, strict=True)
        vectors, _ = self.embedder.embed(once, side, types, own)
        return unit_vectors(vectors, f"judge {self.name!r}, {side} texts")[places]


def _check(sample: pa.Table) -> None:
    missing = [name for name in SAMPLE_SCHEMA.names if name not in sample.column_names]
    if missing:
        raise DataError(f"judge: the sample has no column {missing[0]!r}; found: {sample.column_names}")
    if not sample.num_rows:
        raise DataError("judge: the sample is empty; allowed: 1 row or more")
    strange = sorted(set(sample.column("kind").to_pylist()) - set(KINDS))
    if strange:
        raise DataError(f"judge: kind {strange[0]!r} is unknown; allowed: {list(KINDS)}")


def _figures(false: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, Any]:
    rows, hits = len(false), int(false.sum())
    if not rows:
        return {"rows": 0, "false": 0, "share": None, "low": None, "high": None}
    # Wilson's score interval stays within 0 and 1 for few rows (Wilson 1927, "Probable inference", JASA 22).
    low, high = binomtest(hits, rows).proportion_ci(CONFIDENCE, method="wilson")
    return {
        "rows": rows,
        "false": hits,
        "share": round(hits / rows, 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }
