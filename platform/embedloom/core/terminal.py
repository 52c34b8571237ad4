"""How a command shows its stages: a live block on a terminal, a line every ten seconds elsewhere.

Both are screens of ``progress``. What is finished, and what a stage has to tell, stays as a line; what is under way is
the block's, or one line's, which is overwritten or left out.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from embedloom.core.progress import Report, duration, value_text

LINE_SECONDS = 10.0
_NAME_WIDTHS = (12, 24)  # of finished stages, on narrow and wide terminals
_WIDE = 80  # columns from which on a bar's rate is shown beside its count


class _Running:
    """Stages under way and their counts. Dictionaries are replaced, never changed, so that readers need no lock."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[float, Report]] = {}  # since when
        self.counts: dict[str, Report] = {}

    def add(self, report: Report, now: float) -> None:
        if report.kind == "begun":
            self.stages = {**self.stages, report.stage: (now, report)}
        elif report.kind == "ended":
            self.stages = {name: entry for name, entry in self.stages.items() if name != report.stage}
            if not self.stages:  # a count that never came to its total
                self.counts = {}
        elif report.kind == "count":
            others = {stage: count for stage, count in self.counts.items() if stage != report.stage}
            finished = report.total is not None and report.done >= report.total
            self.counts = others if finished else {**others, report.stage: report}

    def __bool__(self) -> bool:
        return bool(self.stages or self.counts)


class PlainScreen:
    """Lines for what is finished or told, and every ten seconds one for what is under way."""

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._running = _Running()
        self._lock = threading.Lock()
        self._last_line = clock()

    def show(self, report: Report) -> None:
        """A line, unless it says only that something is under way."""
        with self._lock:
            self._running.add(report, self._clock())
            if report.kind in ("note", "ended"):
                self._write(report.line)
        self.tick()

    def tick(self) -> None:
        """A line on what is under way, if none was written for ten seconds."""
        with self._lock:
            if self._running and self._clock() - self._last_line >= LINE_SECONDS:
                self._write(self._state())

    def _state(self) -> str:
        if self._running.counts:
            return "; ".join(count.line for count in self._running.counts.values())
        now = self._clock()
        return "; ".join(
            f"[{name}] {report.text} · {duration(now - since)}"
            for name, (since, report) in self._running.stages.items()
        )

    def _write(self, line: str) -> None:
        self._last_line = self._clock()
        self._stream.write(line + "\n")
        self._stream.flush()

    def clear(self) -> None:
        """Nothing to take away."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the clock, so that a stage that says nothing for long still has its line."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(1.0):
                self.tick()

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


class LiveScreen:
    """A block at the terminal's foot with a bar for every count under way; above it a line for all that is finished."""

    def __init__(self, stream: IO[str], console: Console | None = None) -> None:
        self._stream = stream
        self._console = console or Console(file=stream, highlight=False, markup=False, emoji=False)
        self._fixed_size = console is not None
        self._running = _Running()
        # Drawing takes no lock of ours, so a block may be begun and ended under this one.
        self._lock = threading.Lock()
        self._live: Live | None = None

    def show(self, report: Report) -> None:
        """Move the block's bars, or write a line above it."""
        with self._lock:
            self._running.add(report, time.monotonic())
        self._fit()
        if report.kind == "ended":
            self._console.print(self._ended(report), overflow="ellipsis", no_wrap=True)
        elif report.kind == "note":
            self._console.print(self._note(report), soft_wrap=True)
        self._show_block(bool(self._running))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leave the terminal as it was: no block, the cursor visible."""
        try:
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        """Take the block away until the next report, for something else that writes to the terminal."""
        self._show_block(False)

    def _show_block(self, wanted: bool) -> None:
        with self._lock:
            if wanted and self._live is None:
                self._live = Live(
                    get_renderable=self.block, console=self._console, refresh_per_second=5, transient=True,
                    redirect_stdout=False, redirect_stderr=False,
                )  # fmt: skip
                self._live.start()
            elif not wanted and self._live is not None:
                self._live.stop()
                self._live = None

    def _fit(self) -> None:
        if not self._fixed_size:
            self._console.size = _size(self._stream)

    def block(self) -> RenderableType:
        """What is under way, as it is drawn now: no line is longer than the terminal is wide."""
        self._fit()
        now = time.monotonic()
        rows: list[RenderableType] = []
        for name, (since, report) in self._running.stages.items():
            rows.append(self._stage(name, report, now - since))
        for count in self._running.counts.values():
            rows += self._count(count)
        return Group(*rows)

    def _stage(self, name: str, report: Report, seconds: float) -> RenderableType:
        text = Text.assemble((name, "bold"), (f"  {report.text}  {duration(seconds)}", "dim"))
        return Spinner("line" if self._is_ascii else "dots", text, style="cyan")

    def _count(self, count: Report) -> list[RenderableType]:
        wide = self._is_wide
        total = "" if count.total is None else f"/{count.total:,}"
        cells: list[tuple[RenderableType, dict[str, Any]]] = [
            (Text(f"  {count.stage}"), {"ratio": 3, "overflow": "ellipsis"}),
            (ProgressBar(total=count.total, completed=count.done, width=None if wide else 12,
                         pulse=count.total is None), {"ratio": 4} if wide else {"width": 12}),
            (Text(f"{count.done:,}{total} {count.unit}", "cyan"), {"justify": "right", "overflow": "ellipsis"}),
        ]  # fmt: skip
        if wide:
            cells.append((Text(f"{count.rate:,.1f}/s", "dim"), {"justify": "right"}))
        left = "" if count.left is None else f"{duration(count.left)} left"
        cells.append((Text(left, "bold"), {"justify": "right"}))
        row = Table.grid(padding=(0, 1, 0, 0), expand=True)
        for _, options in cells:
            row.add_column(no_wrap=True, **options)
        row.add_row(*(cell for cell, _ in cells))
        return [row, self._values(count)] if count.values else [row]

    def _values(self, count: Report) -> Text:
        """Further numbers; the loss, which people look for, first and bright."""
        text = Text("    ", no_wrap=True, overflow="ellipsis", style="dim")
        for number, (key, value) in enumerate(count.values.items()):
            text.append(" · " if number else "")
            text.append(f"{key} {value_text(value)}", "not dim bold" if key == "loss" else "")
        return text

    def _ended(self, report: Report) -> Text:
        counts = " · ".join(
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value_text(value)}"
            for key, value in report.values.items()
        )
        text = Text.assemble(
            ("✓ ", "bold green"),
            (f"{report.stage.ljust(_NAME_WIDTHS[self._is_wide])} ", "bold"),
            (f"{duration(report.seconds):>6}  ", "cyan"),
            (counts, "dim"),
        )
        return text

    def _note(self, report: Report) -> Text:
        style = "yellow" if report.text.startswith(("warning", "refused")) or "died" in report.text else ""
        return Text.assemble((f"  {report.stage}: ", "cyan"), (report.text, style))

    @property
    def _is_wide(self) -> bool:
        return self._console.width >= _WIDE

    @property
    def _is_ascii(self) -> bool:
        return self._console.options.ascii_only


def _size(stream: IO[str]) -> ConsoleDimensions:
    """Of the terminal behind the stream, now; rich would ask this process's stdout, which goes to a log."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return ConsoleDimensions(80, 24)
    return ConsoleDimensions(size.columns or 80, size.lines or 24)


def screen_for(stream: IO[str]) -> "LiveScreen | PlainScreen":
    """The live block where the stream is a terminal that can move its cursor."""
    if stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return LiveScreen(stream)
    return PlainScreen(stream)
