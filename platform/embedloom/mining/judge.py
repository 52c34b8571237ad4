"""A second teacher's opinion on a sample of negatives: how many of them it holds to be positives."""

from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import binomtest

from embedloom.config.resources import PoolConfig
from embedloom.engines.shards import run_sharded
from embedloom.errors import DataError
from embedloom.instructions import Side
from embedloom.mining.select import score_limit
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.retrieval.exact import Matrix, pair_scores
from embedloom.retrieval.unit import unit_vectors
from embedloom.storage import Place

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
