"""Screens: what stays on a terminal, what a file gets, and that neither depends on how fast anything is."""

import io

import pytest
from rich.console import Console

from embedloom.core.progress import Report, begun, ended, note, shown_on
from embedloom.core.terminal import LINE_SECONDS, LiveScreen, PlainScreen, screen_for


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def count(done: int, total: int | None = 400, stage: str = "train a/b", **values: object) -> Report:
    return Report("count", stage, f"{done} steps", True, done, total, "steps", 0.5, done * 2.0, values)


def test_without_a_terminal_lines_are_bounded_by_stages_notes_and_a_line_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    screen = PlainScreen(stream, clock)
    stages, steps, started = ["corpus", "mining", "training/a/b"], 400, clock.now
    with shown_on(screen):
        for name in stages:
            begun(name)
            for step in range(1, steps + 1):  # four reports a second
                clock.now += 0.25
                screen.show(count(step, steps))
            note(name, "3 rows rejected: not_json")
            ended(name, 100.0, {"rows": 3603})
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 2 * len(stages) + (clock.now - started) / LINE_SECONDS
    assert (
        sum("400 steps" in line for line in lines) == 0
    )  # a count that is complete is the next line's matter
    assert lines.count("[mining] 3 rows rejected: not_json") == 1
    assert lines[-1] == "[training/a/b] done in 1m40s: rows 3603"


def test_a_stage_that_says_nothing_has_a_line_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    screen = PlainScreen(stream, clock)
    screen.tick()
    with shown_on(screen):
        begun("evaluation")
        for _ in range(35):
            clock.now += 1.0
            screen.tick()
        ended("evaluation", 35.0, {})
        clock.now += 100.0
        screen.tick()  # nothing is under way
    assert stream.getvalue().splitlines() == [
        "[evaluation] building · 10s",
        "[evaluation] building · 20s",
        "[evaluation] building · 30s",
        "[evaluation] done in 35s",
    ]


def live(
    width: int, encoding: str = "utf-8", **settings: object
) -> tuple[LiveScreen, Console, io.TextIOWrapper]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    console = Console(
        file=stream, force_terminal=True, width=width, height=20, legacy_windows=False, highlight=False, **settings
    )  # fmt: skip
    return LiveScreen(stream, console), console, stream


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_no_line_of_the_block_is_wider_than_the_terminal(width):
    screen, console, _ = live(width)
    screen.show(count(14, loss=0.7151, lr=6e-5, grad_norm=10.48, memory="3,571 MiB"))
    screen.show(count(20, None, "documents of a corpus with a long name"))
    screen.clear()
    with console.capture() as capture:
        console.print(screen.block())
    lines = Console(width=1000, color_system=None).render_str(capture.get()).plain.splitlines()
    plain = [Console(color_system=None).render_str(line).plain for line in lines]
    from rich.text import Text

    assert 3 <= len(plain) <= 4 and all(Text.from_ansi(line).cell_len <= width for line in lines)
    shown = Text.from_ansi(capture.get()).plain
    if width >= 60:
        assert "14/400 steps" in shown and "12m52s left" in shown and "loss 0.7151" in shown


def test_finished_stages_and_notes_stay_and_the_cursor_comes_back_after_an_error():
    screen, _, stream = live(100, color_system=None)
    with pytest.raises(RuntimeError), shown_on(screen), screen.running():
        begun("corpus")
        note("corpus", "12 documents rejected: too_short")
        ended("corpus", 8.0, {"rows": 3603})
        begun("mining")
        raise RuntimeError
    text = written(stream)
    assert "✓ corpus" in text and "rows 3,603" in text and "corpus: 12 documents rejected: too_short" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_nothing_is_drawn_in_colour_where_none_is_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen, console, _ = live(80)
    screen.show(count(14, loss=0.5))
    screen.clear()
    with console.capture() as capture:
        console.print(screen.block())
    assert "14/400" in capture.get() and not any(f"\x1b[{code}" in capture.get() for code in ("3", "9"))


def test_an_ascii_terminal_gets_ascii_bars():
    screen, console, _ = live(80, encoding="ascii")
    screen.show(count(14))
    screen.clear()
    with console.capture() as capture:
        console.print(screen.block())
    assert "--------" in capture.get() and "━" not in capture.get()


def test_a_file_and_a_dumb_terminal_get_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(screen_for(io.StringIO()), PlainScreen)
    assert isinstance(screen_for(Terminal()), LiveScreen)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(screen_for(Terminal()), PlainScreen)
