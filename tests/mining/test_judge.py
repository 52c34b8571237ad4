"""The judged sample against vectors whose cosines are known."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.mining.audit import SAMPLE_SCHEMA, JudgeWorker, judge_sample


@dataclass(frozen=True)
class AngleSource:
    """A judge whose texts are angles in degrees: the score of two is the cosine of their difference."""

    name: str = "angles"

    def open(self):
        return AngleJudge()


class AngleJudge:
    contract_hash = "angles"

    def __init__(self) -> None:
        self.calls = []

    def embed(self, texts, side, task_types, instructions):
        self.calls.append((list(texts), side, list(task_types), list(instructions)))
        angles = np.radians([float(text) for text in texts])
        return 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32), [1] * len(texts)


def row(negative, kind="selected", positive="20", query="0", **changes):
    return {
        "query": query, "query_instruction": "Find it", "task_type": "retrieval", "positive": positive,
        "negative": negative, "kind": kind, "rank": 1,
    } | changes  # fmt: skip


def sample(rows):
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)


# cos 20° = 0.940, times 0.95 = 0.893 = cos 26.8°: nearer than that counts as false
ROWS = [
    *(row(negative) for negative in ("26", "27", "-26", "60", "180", "90")),
    *(row(negative, "naive", dataset="d") for negative in ("10", "20", "26", "30")),
]


@pytest.mark.ray
def test_shares_and_intervals_by_hand(ray_local, tmp_path):
    place = Place(str(tmp_path))
    table = sample(ROWS).append_column("dataset", pa.array(["d"] * len(ROWS)))
    found = judge_sample(table, AngleSource(), place, PoolConfig(), 0.95)
    assert (found["judge"], found["margin_ratio"], found["confidence"]) == ("angles", 0.95, 0.95)
    for kind, false, rows in (("selected", 2, 6), ("naive", 3, 4)):
        share, z = false / rows, 1.959964  # Wilson 1927
        centre = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
        reach = z / (1 + z**2 / rows) * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
        expected = {
            "rows": rows,
            "false": false,
            "share": false / rows,
            "low": centre - reach,
            "high": centre + reach,
        }
        assert found[kind] == pytest.approx(expected, abs=1e-4)
    judged = place.read_table("judged.parquet")
    assert judged.column_names == [
        *SAMPLE_SCHEMA.names, "dataset", "judge_positive_score", "judge_negative_score", "false_negative",
    ]  # fmt: skip
    cosines = [math.cos(math.radians(float(one["negative"]))) for one in ROWS]
    assert judged.column("judge_negative_score").to_pylist() == pytest.approx(cosines, abs=1e-6)
    assert judged.column("judge_positive_score").to_pylist() == pytest.approx(
        [math.cos(math.radians(20))] * 10
    )
    assert judged.column("false_negative").to_pylist() == [
        True, False, True, False, False, False, True, True, True, False,
    ]  # fmt: skip
    only = judge_sample(sample(ROWS[6:]), AngleSource(), place.child("other"), PoolConfig(), 0.95)
    assert only["selected"] == {"rows": 0, "false": 0, "share": None, "low": None, "high": None}


def test_each_text_is_embedded_once_on_its_side():
    worker = JudgeWorker(AngleSource())
    rows = [row("30"), row("40"), row("30", query="5", task_type="sts", query_instruction=None)]
    scores = worker(sample(rows))["judge/scores"]
    assert scores.column("negative_score").to_pylist() == pytest.approx(
        [math.cos(math.radians(angle)) for angle in (30, 40, 25)], abs=1e-6
    )
    queries, positives, negatives = worker.embedder.calls
    assert queries == (["0", "5"], "query", ["retrieval", "sts"], ["Find it", None])
    assert positives == (["20", "20"], "document", ["retrieval", "sts"], ["Find it", None])
    assert negatives[0] == ["30", "40", "30"]


def test_odd_samples_are_refused(tmp_path):
    place = Place(str(tmp_path))
    with pytest.raises(DataError, match="judge: the sample is empty"):
        judge_sample(sample([]), AngleSource(), place, PoolConfig(), 0.95)
    with pytest.raises(DataError, match="judge: the sample has no column 'kind'"):
        judge_sample(sample(ROWS).drop_columns(["kind"]), AngleSource(), place, PoolConfig(), 0.95)
    with pytest.raises(DataError, match=r"judge: kind 'best' is unknown; allowed: \['selected', 'naive'\]"):
        judge_sample(sample([row("1", "best")]), AngleSource(), place, PoolConfig(), 0.95)
