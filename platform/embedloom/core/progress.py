"""Progress: what a stage says while it works, with rate and time left, and the same numbers as JSON lines.

Everything goes to one ``Screen``: by default lines on stderr, so that the last line on stdout is the artefact's path;
a command shows it its own way (``terminal``). In a process that Ray started, a line carries its numbers behind it, and
the driver, to which Ray brings it, shows it as its own (``hear``). While a stage is built its lines also go to its log
file in the run's folder, with the time and what libraries warn of.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from embedloom.core.storage import Place

LOG_FOLDER = "logs"
# Between a worker's line and its numbers: ASCII's unit separator, which no text of ours has and no terminal shows.
_SEPARATOR = "\x1f"
_SHOWN_EVERY = 0.1  # seconds; to draw a count more often than that costs more than counting
_LINES = logging.getLogger("embedloom.progress")
_LINES.propagate = False  # stderr has the line already
_LINES.addHandler(logging.NullHandler())


def duration(seconds: float) -> str:
    """``75`` → ``1m15s``; hours appear from one hour on."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@dataclass(frozen=True, slots=True)
class Report:
    """One thing that a stage says.

    Attributes:
        kind: a stage was begun or ended, it counted, or it has something to tell.
        stage: whose.
        text: for people, without the stage.
        due: whether a count is worth a line of its own; the ones between only move a bar.
        done: units so far.
        total: units in all; None where that is not known.
        unit: what is counted, in the plural.
        rate: units a second.
        seconds: since it began.
        values: further numbers, such as the loss, or what an ended stage has made.
    """

    kind: Literal["begun", "count", "note", "ended"]
    stage: str
    text: str
    due: bool = True
    done: int = 0
    total: int | None = None
    unit: str = ""
    rate: float = 0.0
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """As one line."""
        return f"[{self.stage}] {self.text}"

    @property
    def left(self) -> float | None:
        """Seconds until the total, at this rate; None where that cannot be known."""
        if self.total is None or self.rate <= 0 or self.done >= self.total:
            return None
        return (self.total - self.done) / self.rate


class Screen(Protocol):
    """Where reports are shown."""

    def show(self, report: Report) -> None:
        """Show one; called from several threads."""
        ...


class Lines:
    """A line for every report that is due, on a stream; None: on whatever stderr is then."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream

    def show(self, report: Report) -> None:
        """Write the line."""
        if report.due:
            _write(self._stream or sys.stderr, report.line)


class NumberedLines:
    """The same, with the numbers behind the line, for another process that shows it (``hear``)."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream

    def show(self, report: Report) -> None:
        """Write the line and its numbers."""
        if report.due:
            content = json.dumps(asdict(report), default=str)
            _write(self._stream or sys.stderr, f"{report.line}{_SEPARATOR}{content}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Nothing to watch."""
        yield


_screens: list[Screen] = [Lines()]  # the last one is in use; contexts of several threads may end in any order


@contextmanager
def shown_on(screen: Screen) -> Iterator[None]:
    """Have reports of this process and its workers shown on ``screen``."""
    _screens.append(screen)
    try:
        yield
    finally:
        _screens.remove(screen)


def hear(line: str) -> bool:
    """Show a line that a worker printed, if it is one of our reports; whether it was."""
    _, separator, content = line.partition(_SEPARATOR)
    if not separator:
        return False
    try:
        report = Report(**json.loads(content))
    except (TypeError, ValueError):  # cut off: a line that its process died over
        return False
    _say(report)
    return True


def note(stage: str, message: str) -> None:
    """Tell one thing about a stage."""
    _say(Report("note", stage, message))


def begun(stage: str, how: str = "building") -> None:
    """A stage is being built, until ``ended``."""
    _say(Report("begun", stage, how))


def ended(stage: str, seconds: float, counts: Mapping[str, Any], how: str = "done") -> None:
    """A stage is finished; ``counts`` is what it made."""
    shown = {key: value for key, value in counts.items() if not isinstance(value, dict)}
    made = ", ".join(f"{key} {value}" for key, value in shown.items())
    text = f"{how} in {duration(seconds)}" + (f": {made}" if made else "")
    _say(Report("ended", stage, text, seconds=seconds, values=shown))


class Progress:
    """Counts ``unit``s of one stage towards ``total``; a line is due at most every ``every_seconds``."""

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        every_seconds: float = 10.0,
        metrics_file: Path | None = None,
        stream: IO[str] | None = None,
    ) -> None:
        self.stage = stage
        self.total = total
        self.unit = unit
        self.done = done
        self._first = done
        self._every = every_seconds
        self._metrics_file = metrics_file
        self._own = None if stream is None else Lines(stream)
        self._started = time.monotonic()
        self._last_due = self._last_shown = self._started

    def advance(self, amount: int, **values: Any) -> None:
        """Add finished units; ``values`` (loss, rejects, ...) stand at the end of the line."""
        self.done += amount
        now = time.monotonic()
        finished = self.total is not None and self.done >= self.total
        if self._metrics_file is not None:
            record = {
                "stage": self.stage,
                "done": self.done,
                "seconds": round(now - self._started, 3),
                **values,
            }
            with self._metrics_file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        due = finished or now - self._last_due >= self._every
        if due or now - self._last_shown >= _SHOWN_EVERY:
            self._last_shown = now
            self._last_due = now if due else self._last_due
            _say(self.report(now, values, due), self._own)

    def report(self, now: float, values: Mapping[str, Any], due: bool = True) -> Report:
        """How far it is at monotonic time ``now``."""
        elapsed = now - self._started
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        report = Report(
            "count", self.stage, "", due, self.done, self.total, self.unit, rate, elapsed, dict(values)
        )
        return replace(report, text=_count_text(report))

    def line(self, now: float, values: Mapping[str, Any]) -> str:
        """The progress line at monotonic time ``now``."""
        return self.report(now, values).line


def _count_text(report: Report) -> str:
    total = "" if report.total is None else f"/{report.total:,}"
    parts = [f"{report.done:,}{total} {report.unit}", f"{report.rate:,.1f} {report.unit}/s"]
    parts += [f"{key} {value_text(value)}" for key, value in report.values.items()]
    parts.append(duration(report.seconds))
    if report.left is not None:
        parts.append(f"{duration(report.left)} left")
    return " · ".join(parts)


def value_text(value: Any) -> str:
    """A further number of a report: four digits of a float are enough to watch."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def stage_log(run: Place, stage: str) -> Iterator[None]:
    """Keep what is said while a stage is built in ``logs/<stage>.log`` of the run's folder; a rerun adds to it.

    Progress lines, warnings of libraries in this process, and the traceback if it ends with an error. What else this
    process and its workers print is in ``driver.log`` and ``workers.log`` beside it, where a command shows it quietly.
    """
    name = f"{LOG_FOLDER}/{stage.replace('/', '-')}.log"
    with tempfile.TemporaryDirectory(prefix="embedloom-log-") as temporary:
        path = run.local / name if run.is_local else Path(temporary) / "stage.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not run.is_local and run.exists(name):
            path.write_bytes(run.read_bytes(name))
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        loggers = (_LINES, logging.getLogger())
        level = _LINES.level
        _LINES.setLevel(logging.INFO)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        except BaseException:
            _LINES.exception("%s did not finish", stage)
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            _LINES.setLevel(level)
            handler.close()
            if not run.is_local:
                run.write_bytes(name, path.read_bytes())


def _say(report: Report, screen: Screen | None = None) -> None:
    if report.due:
        _LINES.info(report.line)
    (screen or (NumberedLines() if _is_worker() else _screens[-1])).show(report)


def _is_worker() -> bool:
    """Whether Ray started this process for tasks or actors; Ray is asked only where it is imported anyway."""
    ray = sys.modules.get("ray")
    if ray is None or not getattr(ray, "is_initialized", bool)():
        return False
    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def _write(stream: IO[str], line: str) -> None:
    stream.write(line + "\n")
    stream.flush()
