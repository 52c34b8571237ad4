"""The report's leaderboard and gate sections, and the intervals beside the scores."""

from embedloom.report.leaderboard import leaderboard_section, leaderboard_table
from embedloom.report.page import gate_section, write_report
from embedloom.report.summary import summary_table
from fakes_run import SCORES, begin, make_run

ROWS = [
    {"model": "org/<best>", "own": False, "rank": 1, "votes": 9.0, "mean_task": 0.8, "mean_type": 0.7, "types": {"STS": 0.9}},
    {"model": "merged", "own": True, "rank": 7, "votes": 2.5, "mean_task": None, "mean_type": None, "types": {"STS": None}},
]  # fmt: skip
RANKING = {
    "pool": "pool.parquet",
    "pool_fingerprint": "f00d",
    "pool_models": 9,
    "tasks": ["a", "b"],
    "shown": ROWS,
}
VERDICT = {
    "verdict": "refused",
    "candidate": "merged",
    "against": "base",
    "reasons": ["mean over tasks -0.1"],
    "checks": [{"name": "mean", "passed": False, "text": "mean over tasks -0.1"}],
    "tasks": {
        "heldout": {"current": 0.5, "candidate": 0.4, "difference": -0.1, "low": -0.2, "high": 0.0, "p_worse": 0.01, "result": "worse"},
        "odd": {"current": 0.5, "candidate": 0.5, "difference": 0.0, "low": None, "high": None, "p_worse": None, "result": "not tested"},
    },
}  # fmt: skip


def test_table_marks_our_models_and_the_gap_between_shown_ranks():
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in leaderboard_table(ROWS, "9 models").splitlines()
    ]
    assert lines[0] == ["9 models"]
    assert lines[1] == ["rank", "model", "Borda", "Mean(Task)", "Mean(Type)", "STS"]
    assert lines[3] == ["1", "org/<best>", "9", "80.00", "70.00", "90.00"]
    assert lines[4][0] == "..."
    assert lines[5] == ["7", "> merged", "2.5", "-", "-", "-"]


def test_section_names_the_pool_and_draws_every_shown_model():
    section = leaderboard_section(RANKING)
    assert "Borda votes among 9 models on 2 tasks; pool: pool.parquet (f00d)." in section
    assert section.count("<rect") == 2 and 'class="merged"' in section
    assert "org/&lt;best&gt;" in section and "<best>" not in section
    assert leaderboard_section({}) == ""


def test_gate_section_says_what_was_refused():
    section = gate_section(VERDICT)
    assert "merged against base: refused" in section
    assert "-0.2000 to +0.0000" in section and "not tested" in section
    assert gate_section({"verdict": "not_run"}) == ""


def test_run_with_intervals_ranking_and_gate(tmp_path):
    run = make_run(tmp_path / "quick", scores=False)
    out = begin(run, "evaluation", "evaluation")
    intervals = {
        "models": {"merged": {"heldout": [0.40123, 0.46]}},
        "baselines": {"teacher": {"heldout": [0.6, 0.8]}},
    }
    out.place.write_json("scores.json", {**SCORES, "intervals": intervals, "ranking": RANKING})
    out.commit({"rows": 1}, {}, seconds=1)
    gate = begin(run, "gate", "gate")
    gate.place.write_json("verdict.json", VERDICT)
    gate.commit({"rows": 2, "verdict": "refused"}, {}, seconds=1)
    write_report(run)
    summary = run.read_json("summary.json")
    assert summary["gate"] == VERDICT
    assert summary["scores"]["intervals"] == intervals
    assert summary["stages"]["gate"]["verdict"] == "refused"
    page = run.read_bytes("report.html").decode()
    assert "0.4012 to 0.4600" in page and "0.6000 to 0.8000" in page
    assert "<h2>Leaderboard</h2>" in page and "<h2>Gate</h2>" in page
    assert (
        summary_table(summary).splitlines()[-1] == "gate: merged against base: refused: mean over tasks -0.1"
    )
