"""The section on hard negatives, from the summaries that mining itself makes."""

import re

import pyarrow as pa

from embedloom.mining.audit import GAP_EDGES, audit_summary
from embedloom.report.charts import histogram
from fakes_run import begin, make_run
from test_report import report_of

ROW = {
    "query_id": "q", "dataset": "public", "task_type": "retrieval", "teacher": "t", "positive_score": 0.8,
    "candidates": 1000, "removed_as_positive": 10, "removed_by_margin": 250, "removed_by_rank": 0, "removed_by_floor": 0,
    "selected": 4, "given": False, "naive": 4, "naive_removed": 3, "gaps": [0.11, 0.12, 0.31, 0.7], "near_duplicates": 1,
}  # fmt: skip
JUDGED = {
    "judge": "second & <best>", "margin_ratio": 0.95, "confidence": 0.95,
    "selected": {"rows": 200, "false": 8, "share": 0.04, "low": 0.0204, "high": 0.0769},
    "naive": {"rows": 0, "false": 0, "share": None, "low": None, "high": None},
}  # fmt: skip


def audited_run(folder, rows, judged=None):
    run = make_run(folder)
    audit = audit_summary([pa.Table.from_pylist(rows)], 4)
    details = {"audit": {**audit, "judged": judged} if judged else audit, "scored_by": ["cross & co"]}
    begin(run, "examples", "examples").commit({"rows": len(rows)}, details, seconds=1)
    return run


def test_a_run_without_an_audit_has_no_such_section(tmp_path):
    _, page = report_of(make_run(tmp_path / "run"))
    assert "Hard negatives" not in page.text


def test_shares_gaps_and_the_judges_interval_are_shown(tmp_path):
    rows = [ROW, {**ROW, "dataset": "x<y>", "candidates": 3000}]
    summary, page = report_of(audited_run(tmp_path / "run", rows, JUDGED))
    assert "examples" in summary["stages"]
    cells = [cell.strip() for cell in page.text.split("  ") if cell.strip()]
    text = " ".join(" ".join(cells).split())
    assert "Hard negatives" in text
    assert "Scores of cross & co." in text
    # all: 500 of 4,000 candidates by the margin, 6 of 8 naive ones, 2 near-duplicates of 8 selected
    assert "all 2 4,000 0.50% 12.50% 0.00% 0.00% 75.00% 8 25.00% 0.00%" in text
    assert "public 1 1,000 1.00% 25.00%" in text
    assert "x<y> 1 3,000" in text
    assert "8 selected negatives, mean 0.31; 0 below 0, 2 at or above 0.6" in text
    assert "False negatives according to second & <best>, margin ratio 0.95" in text
    assert "selected 200 8 4.00% 2.04% 7.69%" in text
    assert "naive top candidates 0 0 - - -" in text


def test_an_audit_without_negatives_or_judge_is_shown_too(tmp_path):
    empty = {**ROW, "selected": 0, "gaps": [], "naive": 0, "naive_removed": 0, "near_duplicates": 0}
    run = make_run(tmp_path / "run")
    schema = pa.Table.from_pylist([ROW]).schema
    audit = audit_summary([pa.Table.from_pylist([empty], schema=schema)], 4)
    begin(run, "examples", "examples").commit({"rows": 0}, {"audit": audit}, seconds=1)
    _, page = report_of(run)
    assert "Hard negatives" in page.text
    assert "Score gaps" not in page.text


def test_bars_of_a_histogram_are_as_high_as_their_counts_and_side_by_side():
    counts = [0.0] * (len(GAP_EDGES) - 1)
    counts[0], counts[1] = 10, 5
    chart = histogram("t", GAP_EDGES, counts, "gap", "negatives")
    heights = [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', chart)]
    assert len(heights) == len(counts)
    assert heights[0] == 2 * heights[1] > 0
    assert set(heights[2:]) == {0}
    lefts = [float(left) for left in re.findall(r'<rect[^>]* x="([\d.]+)"', chart)]
    assert lefts == sorted(lefts)
    assert "0 to 0.025: 10" in chart
