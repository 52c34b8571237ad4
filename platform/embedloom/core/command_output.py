"""What a command lets through to the terminal: its own stages and warnings; all else is kept in log files.

Ray, vLLM, DeepSpeed, Serve and their C libraries write to file descriptors 1 and 2, so these are what is turned to
``driver.log`` while a command works; what workers print reaches this process through Ray (``cluster.worker_output``)
and is kept in ``workers.log``. Both lie in the ``logs`` folder of the run. When a command fails, its error says where
they are and shows the end of what the failed worker said.
"""

import codecs
import contextlib
import ctypes
import logging.handlers
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from embedloom.core.progress import LOG_FOLDER, NumberedLines, hear, shown_on
from embedloom.core.storage import Place
from embedloom.errors import UserError

# Set for a job whose log another embedloom reads: its reports carry their numbers.
REPORTS_VARIABLE = "EMBEDLOOM_REPORTS"
DRIVER_LOG = "driver.log"
WORKERS_LOG = "workers.log"
RAY_FOLDER = "ray"
_FILE_BYTES = 64 * 2**20  # of workers.log, then it is set aside: an endpoint logs every request for months
_FILES_KEPT = 3
_PROCESSES = 64  # whose last lines are remembered
_LINES_KEPT = 80  # of each
_LINES_SHOWN = 14
_TRACEBACK = "Traceback (most recent call last)"
_CRASHES = ("Fatal Python error", "*** SIG")
_CALLER = "The above exception was the direct cause"
_PID = re.compile(r"\bpid[=: ]+(\d+)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NO_SIGN = "embedloom.signs"
_SIGNS = {"·": "|", "✓": "*", "…": "~", "→": ">", "≥": ">", "≤": "<", "─": "-", "━": "-"}
_closing: int | None = None  # where what libraries print while Python ends goes to


class CommandLogs:
    """The log files of one command, and the last lines of the processes that printed most recently."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open the files.

        Args:
            folder: of the files.
            name: of the folder for people, also where it is an object store's.
        """
        self.folder = folder
        self.name = name
        self._new = [path for path in (folder, folder.parent) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        title = f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {command_line()}\n"
        self.driver = os.open(folder / DRIVER_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._before = os.fstat(self.driver).st_size
        self._begun = self._before + os.write(self.driver, title.encode())
        self._workers = logging.handlers.RotatingFileHandler(
            folder / WORKERS_LOG,
            maxBytes=_FILE_BYTES,
            backupCount=_FILES_KEPT,
            encoding="utf-8",
            errors="replace",
            delay=True,
        )
        self._workers.setFormatter(logging.Formatter("%(message)s"))
        self._recent: OrderedDict[str, deque[str]] = OrderedDict()

    def keep(self, process: str, lines: Sequence[str]) -> None:
        """Keep what a worker printed; ``process`` names it, as ``RayTrainWorker pid=123``."""
        if not lines:
            return
        recent = self._recent.setdefault(process, deque(maxlen=_LINES_KEPT))
        self._recent.move_to_end(process)
        while len(self._recent) > _PROCESSES:
            self._recent.popitem(last=False)
        recent.extend(lines)
        text = "\n".join(f"({process}) {line}" for line in lines)
        self._workers.emit(logging.LogRecord("workers", logging.INFO, "", 0, text, None, None))

    def said_by(self, pids: Sequence[str]) -> dict[str, list[str]]:
        """Last lines of the processes with these ids, by name."""
        wanted = {f"pid={pid}" for pid in pids}
        return {
            process: list(lines) for process, lines in self._recent.items() if wanted & set(process.split())
        }

    def crashed(self) -> dict[str, list[str]]:
        """Last lines of the process that last printed a traceback or died of a signal; none: nothing."""
        for process, lines in reversed(self._recent.items()):
            if any(mark in line for line in lines for mark in (_TRACEBACK, *_CRASHES)):
                return {process: list(lines)}
        return {}

    def keep_ray(self, session: Path) -> None:
        """Take over Ray's own files of a session that failed."""
        target = self.folder / RAY_FOLDER
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):  # the failure is what matters; shutil.Error is one
            shutil.copytree(session, target, ignore_dangling_symlinks=True)

    def close(self) -> None:
        """Close the files, and take away those that nobody wrote to.

        ``driver.log`` stays open for what libraries print at the very end.
        """
        self._workers.close()
        if os.fstat(self.driver).st_size > self._begun:
            return
        os.ftruncate(self.driver, self._before)
        if not self._before:
            (self.folder / DRIVER_LOG).unlink(missing_ok=True)
        for folder in self._new:
            with contextlib.suppress(OSError):  # the run's own files are in it
                folder.rmdir()


_logs: CommandLogs | None = None


def current_logs() -> CommandLogs | None:
    """The logs of the command that runs quietly in this process; None: everything is shown."""
    return _logs


@contextmanager
def command_output(place: Place, verbose: bool = False, *, resumes: bool = True) -> Iterator[None]:
    """Show the stages of what runs inside, and keep all that libraries print in ``logs`` of ``place``.

    A place in an object store gets its files at the end; a process that is killed by force leaves none there.

    Args:
        place: of the run; its ``logs`` folder is made.
        verbose: show everything instead, a line a report.
        resumes: whether the same command goes on with what an interrupted one has left.
    """
    global _logs, _closing
    if verbose or _logs is not None:
        yield
        return
    with ExitStack() as stack:
        logs = _opened(place, stack)
        stream = stack.enter_context(_turned_away(logs.driver))
        from embedloom.core.terminal import (  # rich takes a while to import
            LiveScreen,
            PlainScreen,
            screen_for,
        )

        screen: NumberedLines | LiveScreen | PlainScreen
        screen = NumberedLines(stream) if os.environ.get(REPORTS_VARIABLE) else screen_for(stream)
        _logs, _closing = logs, logs.driver
        try:
            with shown_on(screen), screen.running():
                yield
        except KeyboardInterrupt:
            again = "; the same command goes on where it stopped" if resumes else ""
            stream.write(f"interrupted{again}: {command_line()}\n" if resumes else "interrupted\n")
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                for line in failure_lines(error, logs):
                    error.add_note(line)
            raise
        finally:
            _logs = None
            logs.close()


def _opened(place: Place, stack: ExitStack) -> CommandLogs:
    """The logs of a place; where it cannot be written, or only at the end, in a temporary folder."""
    name = f"{place.uri.rstrip('/')}/{LOG_FOLDER}"
    if place.is_local:
        try:
            return CommandLogs(place.local / LOG_FOLDER, name)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="embedloom-logs-"))
            return CommandLogs(folder, str(folder))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedloom-logs-")))
    for file in (DRIVER_LOG, WORKERS_LOG):
        if place.exists(f"{LOG_FOLDER}/{file}"):
            (folder / file).write_bytes(place.read_bytes(f"{LOG_FOLDER}/{file}"))
    stack.callback(_upload, folder, place)
    return CommandLogs(folder, name)


def _upload(folder: Path, place: Place) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            place.write_bytes(f"{LOG_FOLDER}/{path.relative_to(folder)}", path.read_bytes())


@contextmanager
def _turned_away(target: int) -> Iterator[IO[str]]:
    """File descriptors 1 and 2 lead to ``target``; yields a stream to where stderr led."""
    out, err = sys.stdout, sys.stderr
    for stream in (out, err):
        stream.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    shown: IO[str] = err
    if _number(err) == 2:
        shown = os.fdopen(os.dup(saved[2]), "w", buffering=1, encoding=err.encoding, errors=_NO_SIGN)
    with os.fdopen(os.dup(target), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as quiet:
        for number in (1, 2):
            os.dup2(target, number)
        sys.stdout = sys.stderr = quiet
        try:
            yield shown
        finally:
            _flush_c()
            sys.stdout, sys.stderr = out, err
            for number, old in saved.items():
                os.dup2(old, number)
                os.close(old)
            shown.flush()
            if shown is not err:
                shown.close()


def _plain_sign(error: UnicodeError) -> tuple[str, int]:
    """An ASCII character for a sign that the terminal's encoding lacks, an escape for anything else."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    shown = [_SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking]
    return "".join(shown), error.end


codecs.register_error(_NO_SIGN, _plain_sign)


def _number(stream: IO[str]) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _flush_c() -> None:
    """Have C libraries write what they hold back, which would else follow the command's last line."""
    ctypes.CDLL(None).fflush(None)


def end_quietly() -> None:
    """Send what libraries print while Python ends to the log of the command that ran; its last line stays the last."""
    if _closing is None:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(_closing, number)


def worker_printed(process: str, lines: Sequence[str], logs: CommandLogs) -> None:
    """Show what of a worker's lines are our reports, keep the others."""
    logs.keep(process, [line for line in lines if not hear(line)])


def failure_lines(error: BaseException, logs: CommandLogs) -> list[str]:
    """What to say below an error: the end of what the failed worker said, and where all of it is."""
    chain = _chain(error)
    text = "\n".join(_COLOURS.sub("", str(one)) for one in chain)
    pids = _PID.findall(text)
    found: dict[str, list[str]] = {}
    if _TRACEBACK in text:
        inner = next(str(one) for one in reversed(chain) if _TRACEBACK in str(one))
        whose = f"worker pid={pids[-1]}" if pids else "worker"
        found = {whose: _COLOURS.sub("", inner).split(_CALLER)[0].splitlines()}
    else:
        found = logs.said_by(pids) or logs.crashed()
    lines: list[str] = []
    for process, said in found.items():
        lines += [f"{process} said last:", *(f"  {line}" for line in relevant_lines(said))]
    return [*lines, f"logs: {logs.name}"]


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found


def relevant_lines(lines: Sequence[str], most: int = _LINES_SHOWN) -> list[str]:
    """Of what a failed process said, the end of its last traceback, the beginning of its crash, or its last lines."""
    said = [line.rstrip() for line in lines if line.strip()]
    for number in reversed(range(len(said))):
        if any(mark in said[number] for mark in _CRASHES):
            return said[number : number + most]  # the innermost frame comes first
        if _TRACEBACK in said[number]:
            block = said[number:]
            return block if len(block) <= most else [block[0], "  ...", *block[2 - most :]]
    return said[-most:]


def command_line() -> str:
    """What the user typed."""
    return shlex.join(["embedloom", *sys.argv[1:]])
