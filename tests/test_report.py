"""summary.json, report.html and the terminal table of finished, running and odd runs."""

import html.parser
import json
import re
from pathlib import Path

import pytest

from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.report.charts import Bar, bar_chart, line_chart, ticks
from embedloom.report.page import _losses, write_report
from embedloom.report.summary import summary_table
from fakes_run import SCORES, begin, make_run, unfinished_training

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order, and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "

    def count(self, tag):
        return sum(1 for found, _ in self.elements if found == tag)


def report_of(run: Place) -> tuple[dict, Page]:
    path = write_report(run)
    assert path == f"{run.uri}/report.html"
    return run.read_json("summary.json"), Page(run.read_bytes("report.html").decode())


def test_summary_has_stages_scores_and_gate(tmp_path):
    summary, _ = report_of(make_run(tmp_path / "quick"))
    assert list(json.loads((tmp_path / "quick" / "summary.json").read_text()))
    assert summary["stages"]["synthesis"] == {
        "rows": 1, "tokens": 12345, "seconds": 75.0, "state": "finished", "rejects": {"not_json": 1},
    }  # fmt: skip
    assert summary["stages"]["merged"]["rows"] is None
    assert set(summary["stages"]) == {
        "corpus", "encoder", "synthesis", "mining", "examples", "training/a/pretrain", "training/a/finetune",
        "training/b/pretrain", "training/b/finetune", "merged", "evaluation",
    }  # fmt: skip
    assert summary["scores"] == {
        "base": SCORES["models"]["base"],
        "candidates": {name: SCORES["models"][name] for name in "ab"},
        "merged": SCORES["models"]["merged"],
        "baselines": SCORES["baselines"],
        "teacher": "minilm-l6",
        "order": SCORES["order"],
    }
    assert summary["gate"] == {"verdict": "not_run"}


def test_page_is_one_well_formed_file_without_scripts_or_outside_assets(tmp_path):
    run = make_run(tmp_path / "quick")
    _, page = report_of(run)
    text = run.read_bytes("report.html").decode()
    assert not re.search(r"<script|https?://|src=|@import|url\(", text)
    assert page.count("svg") == 6  # scores on two tasks, losses of two stages, times, lineage
    for shown in (
        "0.4322",
        "1m15s",
        "not_json",
        "12,345",
        "teacher minilm-l6",
        "heldout: nDCG@10, 1,200 queries, 1,500 documents",
        "not run",
        "11 of 11",
    ):
        assert shown in page.text, shown


def test_loss_curves_have_a_line_a_candidate_in_training_order(tmp_path):
    run = make_run(tmp_path / "quick")
    _, page = report_of(run)
    assert page.count("polyline") == 4
    assert page.text.index("pretrain") < page.text.index("finetune")
    points = [dict(attributes)["points"] for tag, attributes in page.elements if tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in points[0].split()]
    assert heights == sorted(heights)  # a falling loss goes down the page


def test_unfinished_stages_are_shown_as_such(tmp_path):
    run = make_run(tmp_path / "quick", scores=False)
    unfinished_training(run, "c", [3.0, float("nan"), 2.0])
    begin(run, "evaluation", "evaluation")
    summary, page = report_of(run)
    assert summary["stages"]["evaluation"] == {
        "state": "unfinished",
        "rows": None,
        "tokens": None,
        "seconds": None,
    }
    assert summary["scores"] == {"base": {}, "candidates": {}, "merged": {}, "baselines": {}}
    assert "The evaluation has not finished." in page.text
    assert page.count("polyline") == 5  # the running stage is drawn from its metrics file
    assert summary_table(summary) == "no scores yet: the evaluation has not finished"


def test_everything_from_the_run_is_escaped(tmp_path):
    run = make_run(tmp_path / "a & <b>")
    out = begin(run, "evaluation", "evaluation")
    wicked = {"<script>alert(1)</script>": 0.5}
    out.place.write_json(
        "scores.json", {"models": {"base": wicked, 'x"y<i>': wicked, "merged": wicked}, "baselines": {}}
    )
    out.commit({"rows": 1, "rejects": {"<u>": 2}}, seconds=1)
    _, page = report_of(run)
    assert not {"script", "i", "u", "b"} & {tag for tag, _ in page.elements}
    assert "<script>alert(1)</script>" in page.text
    assert "a & <b>" in page.text


def test_folder_without_artefacts_and_corrupt_manifest_are_refused(tmp_path):
    with pytest.raises(DataError, match="no artefact of a run here"):
        write_report(Place(str(tmp_path)))
    run = make_run(tmp_path / "quick")
    (tmp_path / "quick" / "mining" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"mining/manifest\.json: not valid JSON"):
        write_report(run)


def test_table_has_a_row_a_model_in_order_and_a_column_a_task(tmp_path):
    run = make_run(tmp_path / "quick")
    write_report(run)
    summary = run.read_json("summary.json")
    lines = summary_table(summary).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "kind", "heldout", "folder"]
    assert cells[2:] == [
        ["base", "base", "0.14321", "0.20000"],
        ["b", "candidate", "0.42000", "0.45000"],
        ["a", "candidate", "0.41000", "0.50000"],
        ["merged", "merged", "0.43219", "0.51000"],
        ["teacher minilm-l6", "baseline", "0.70000", "0.80000"],
        ["bm25", "baseline", "0.61000", "-"],
    ]
    assert summary_table(summary).isascii()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 3, [1, 1.5, 2, 2.5, 3]),
        (0, 0, [0, 0.2]),
        (7, 7, [6, 8]),
        (0, 1234, [0, 250, 500, 750, 1000, 1250]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert len(found) >= 2
    if low != high:
        assert found == expected


def test_bars_are_as_long_as_their_values():
    chart = bar_chart("t", [Bar("a", 1.0, "1"), Bar("b", 0.25, "0.25"), Bar("none", 0.0, "0")], full=1.0)
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', chart)]
    assert widths[1] == pytest.approx(widths[0] / 4)
    assert widths[2] == 0


def test_a_single_point_is_a_chart_too():
    assert 'r="3"' in line_chart("t", {"a": [(1.0, 2.0)], "empty": []}, "step", "loss")


def test_lineage_graph_has_every_artefact_and_every_input(tmp_path):
    run = make_run(tmp_path / "quick")
    begin(run, "mining", "mining").commit({"rows": 3})  # rebuilt: what examples was made from is gone
    page = Page(Path(write_report(run)).read_text())
    boxes = [attrs for tag, attrs in page.elements if tag == "rect" and attrs.get("class") == "node"]
    edges = [attrs for tag, attrs in page.elements if tag == "path" and attrs.get("class") == "edge"]
    # corpus, encoder, synthesis, mining, examples, 2 x 2 trainings, merged, evaluation
    assert len(boxes) == 11
    # synthesis 1, mining 0 since, examples 2, trainings 4 x 2, merged 2, evaluation 5
    assert len(edges) == 1 + 0 + 2 + 8 + 2 + 5
    assert sum("stroke-dasharray" in attrs for attrs in edges) == 1
    places = {(attrs["x"], attrs["y"]) for attrs in boxes}
    assert len(places) == len(boxes)


def test_the_scorecard_shows_by_which_prompts_a_task_was_scored(tmp_path):
    run = make_run(tmp_path / "quick", scores=False)
    usual = {"sent": ["Find: {text}"], "default": "Find: {text}", "of": "default", "stated": False}
    other = {"sent": ["Cite: {text}"], "default": "Find: {text}", "of": "published", "stated": True}
    prompts = {"heldout": {"merged": usual, "base": usual}, "folder": {"merged": other}}
    out = begin(run, "evaluation", "evaluation")
    out.place.write_json("scores.json", {**SCORES, "prompts": prompts})
    out.commit({"rows": 1, "tokens": 1}, {})
    summary, page = report_of(run)
    assert "base, merged Find: {text} what the endpoint sends by default" in page.text
    assert "merged Cite: {text} published; the endpoint's default is Find: {text}" in page.text
    text = summary_table(summary)
    assert "prompts of folder: published, not what the endpoint sends by default" in text
    assert "prompts of heldout" not in text


def test_the_reranker_has_a_chart_of_its_own_beside_the_candidates():
    curves = {
        "training/alpha/pretrain": [(1.0, 0.7), (2.0, 0.6)], "training/beta/pretrain": [(1.0, 0.8), (2.0, 0.7)],
        "reranker/model": [(1.0, 1.7), (2.0, 1.6)],
    }  # fmt: skip
    page = _losses(curves)
    assert [f"<h3>{name}</h3>" in page for name in ("pretrain", "reranker")] == [True, True]
    assert page.count("<h3>") == 2
