import io
import json
import logging

import pytest

from embedloom.core.progress import Progress, Report, duration, note, shown_on, stage_log
from embedloom.core.storage import Place


def test_duration_reads_like_a_clock():
    assert [duration(s) for s in (5, 75, 3600, 7384)] == ["5s", "1m15s", "1h00m", "2h03m"]


def test_line_shows_rate_values_and_time_left():
    progress = Progress("train", 100, "steps", done=20)
    progress.done = 50
    line = progress.line(progress._started + 10, {"loss": 0.123456})
    assert line == "[train] 50/100 steps · 3.0 steps/s · loss 0.1235 · 10s · 17s left"


def test_every_advance_is_in_the_metrics_file_and_the_last_is_printed(tmp_path):
    stream = io.StringIO()
    progress = Progress(
        "mine", 3, "rows", metrics_file=tmp_path / "metrics.jsonl", stream=stream, every_seconds=100
    )
    for _ in range(3):
        progress.advance(1, rejects=0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["done"] for line in lines] == [1, 2, 3]
    assert stream.getvalue().count("\n") == 1 and "3/3 rows" in stream.getvalue()


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    uri = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"
    yield Place(uri)
    Place(uri).remove()


def test_a_stage_keeps_its_lines_warnings_and_traceback(run, capsys):
    with stage_log(run, "training/alpha/pretrain"):
        note("train", "building")
        logging.getLogger("some.library").warning("slow disk")
    note("train", "between the stages")
    with pytest.raises(ValueError, match="bad row"), stage_log(run, "training/alpha/pretrain"):
        raise ValueError("bad row")
    assert run.names("logs") == ["logs/training-alpha-pretrain.log"]
    text = run.read_bytes("logs/training-alpha-pretrain.log").decode()
    assert "INFO [train] building" in text
    assert "WARNING slow disk" in text
    assert "training/alpha/pretrain did not finish" in text and "ValueError: bad row" in text
    assert "between the stages" not in text
    assert capsys.readouterr().err.splitlines() == ["[train] building", "[train] between the stages"]


def test_stages_do_not_write_into_each_others_logs(run):
    for stage in ("mining", "examples"):
        with stage_log(run, stage):
            note(stage, "building")
    assert run.read_bytes("logs/mining.log").decode().count("building") == 1
    assert run.read_bytes("logs/examples.log").decode().count("[examples] building") == 1


def test_screens_of_several_threads_may_end_in_any_order(capsys):
    """Jobs that are followed side by side: whichever ends first, the others' screens and then the plain lines are back."""

    class Kept:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def show(self, report: Report) -> None:
            self.lines.append(report.line)

    first, second = Kept(), Kept()
    outer, inner = shown_on(first), shown_on(second)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    note("submit", "for the second")
    inner.__exit__(None, None, None)
    note("submit", "for nobody's screen")
    assert (first.lines, second.lines) == ([], ["[submit] for the second"])
    assert capsys.readouterr().err == "[submit] for nobody's screen\n"
