import io
import json

from embedloom.progress import Progress, duration


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
