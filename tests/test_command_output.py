"""What a command lets through: its reports and its result; what libraries print is in the log files."""

import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from embedloom.core.command_output import (
    CommandLogs,
    command_output,
    failure_lines,
    relevant_lines,
    worker_printed,
)
from embedloom.core.progress import NumberedLines, Report
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, StageError

PACKAGE = str(Path(__file__).parents[1] / "platform")

COMMAND = """
import atexit, ctypes, os, sys
from embedloom.core.command_output import command_output, end_quietly
from embedloom.core.progress import begun, ended, note
from embedloom.core.storage import Place

def libraries(text):
    print("python", text)
    print("stderr", text, file=sys.stderr)
    os.write(1, f"descriptor 1 {text}\\n".encode())
    os.write(2, f"descriptor 2 {text}\\n".encode())
    os.system(f"echo child {text}")
    ctypes.CDLL(None).printf(f"buffered in C {text}\\n".encode())

atexit.register(lambda: os.write(1, b"at the end\\n"))
with command_output(Place("run"), verbose=len(sys.argv) > 1):
    begun("corpus")
    libraries("noise")
    note("corpus", "3 rows rejected: not_json")
    ended("corpus", 1.0, {"rows": 7})
print("the result")
end_quietly()
"""
NOISE = ["python noise", "stderr noise", "descriptor 1 noise", "descriptor 2 noise", "child noise", "buffered in C noise"]  # fmt: skip


def run_script(script: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": PACKAGE}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_libraries_print_goes_to_the_log_and_the_result_stays_the_last_line(tmp_path):
    done = run_script(COMMAND, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the result\n"
    assert done.stderr.splitlines() == [
        "[corpus] 3 rows rejected: not_json",
        "[corpus] done in 1s: rows 7",
    ]
    kept = (tmp_path / "run/logs/driver.log").read_text()
    assert all(line in kept.splitlines() for line in [*NOISE, "at the end"])


def test_verbose_shows_it_and_keeps_no_log(tmp_path):
    done = run_script(COMMAND, tmp_path, "--verbose")
    shown = done.stdout + done.stderr
    assert all(line in shown.splitlines() for line in [*NOISE, "at the end"])
    assert "[corpus] building" in done.stderr and not (tmp_path / "run").exists()


def test_file_descriptors_are_as_before(tmp_path, capfd):
    with command_output(Place(str(tmp_path / "run"))):
        os.write(1, b"library\n")
    os.write(1, b"mine\n")
    assert capfd.readouterr().out == "mine\n"


def test_bad_input_leaves_no_logs_behind(tmp_path):
    with pytest.raises(ConfigError), command_output(Place(str(tmp_path / "run"))):
        raise ConfigError("run.seed: 'x'; allowed: numbers")
    assert not (tmp_path / "run").exists()


def test_a_failure_says_where_the_logs_are(tmp_path):
    with pytest.raises(StageError) as caught, command_output(Place(str(tmp_path / "run"))):
        os.write(2, b"library\n")
        raise StageError("mining: it broke")
    assert caught.value.__notes__ == [f"logs: {tmp_path}/run/logs"]


def test_logs_of_a_run_in_an_object_store_are_there_afterwards(tmp_path):
    place = Place(f"memory://{tmp_path.name}/run")
    for word in (b"first\n", b"second\n"):
        with command_output(place):
            os.write(1, word)
    kept = place.read_bytes("logs/driver.log").decode().splitlines()
    assert [line for line in kept if not line.startswith("==")] == ["first", "second"]
    place.remove()


def test_a_place_that_cannot_be_written_does_not_stop_a_command(tmp_path):
    (tmp_path / "run").write_text("a file is in the way")
    with pytest.raises(StageError) as caught, command_output(Place(str(tmp_path / "run"))):
        raise StageError("it broke")
    assert Path(caught.value.__notes__[0].removeprefix("logs: ")).parent != tmp_path


def test_reports_among_a_workers_lines_are_shown_and_the_others_kept(tmp_path, capsys):
    import io

    report, stream = (
        Report("count", "train a/b", "3/9 steps", True, 3, 9, "steps", values={"loss": 0.5}),
        io.StringIO(),
    )
    NumberedLines(stream).show(report)
    logs = CommandLogs(tmp_path, "logs")
    worker_printed("RayTrainWorker pid=7", [stream.getvalue().rstrip("\n"), "Setting up process group"], logs)
    worker_printed("RayTrainWorker pid=7", ['a line that was cut\x1f{"kind": "no'], logs)
    assert capsys.readouterr().err == "[train a/b] 3/9 steps\n"
    kept = (tmp_path / "workers.log").read_text().splitlines()
    assert kept[0] == "(RayTrainWorker pid=7) Setting up process group" and len(kept) == 2


def test_the_end_of_the_last_traceback_is_what_matters():
    said = ["loading", "Traceback (most recent call last):", "old", "ValueError: old", "retrying",
            "Traceback (most recent call last):", *(f"  frame {n}" for n in range(30)), "ValueError: boom"]  # fmt: skip
    shown = relevant_lines(said, most=5)
    assert shown == [
        "Traceback (most recent call last):",
        "  ...",
        "  frame 28",
        "  frame 29",
        "ValueError: boom",
    ]


def test_a_crash_is_shown_from_its_innermost_frame():
    said = [
        "working",
        "Fatal Python error: Segmentation fault",
        "",
        "Current thread:",
        "  File kernel.py",
        "  File x.py",
    ]
    assert relevant_lines(said, most=3) == [
        "Fatal Python error: Segmentation fault",
        "Current thread:",
        "  File kernel.py",
    ]


def test_a_worker_without_a_traceback_is_quoted_with_its_last_lines():
    assert relevant_lines(["a", "", "b", "c  "], most=2) == ["b", "c"]


def test_the_process_that_the_error_names_is_quoted(tmp_path):
    logs = CommandLogs(tmp_path, "runs/x/logs")
    logs.keep("Scorer pid=11", ["all is well"])
    logs.keep("Scorer pid=12", ["Fatal Python error: Aborted", "  File scorer.py"])
    logs.keep("Scorer pid=13", ["all is well here"])
    died = StageError("evaluate: an actor died")
    died.__cause__ = RuntimeError("The actor died unexpectedly. pid: 12 ip: 10.0.0.1")
    assert failure_lines(died, logs) == [
        "Scorer pid=12 said last:", "  Fatal Python error: Aborted", "    File scorer.py", "logs: runs/x/logs",
    ]  # fmt: skip
    assert failure_lines(StageError("it died"), logs)[0] == "Scorer pid=12 said last:"  # the one that crashed


def test_a_task_that_raised_is_quoted_from_rays_error(tmp_path):
    logs = CommandLogs(tmp_path, "logs")
    error = StageError("mining: a worker failed: ValueError: boom")
    error.__cause__ = RuntimeError(
        "\x1b[36mray::Map(task)()\x1b[39m (pid=5, ip=10.0.0.1)\nTraceback (most recent call last):\n  File a.py\n"
        "ValueError: boom\n\nThe above exception was the direct cause of the following exception:\n\nRayTaskError"
    )
    assert failure_lines(error, logs) == [
        "worker pid=5 said last:", "  Traceback (most recent call last):", "    File a.py", "  ValueError: boom",
        "logs: logs",
    ]  # fmt: skip


ON_A_TERMINAL = """
import os, signal, sys, time
from embedloom.core.command_output import command_output
from embedloom.core.progress import Progress, begun, ended, note
from embedloom.core.storage import Place

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
with command_output(Place("run")):
    begun("corpus"); os.write(2, b"library noise\\n"); ended("corpus", 8.0, {"rows": 7})
    begun("training/a/b")
    progress = Progress("train a/b", 9, "steps", every_seconds=0.0)
    progress.advance(3, loss=0.5)
    while True:
        time.sleep(0.1)
"""


def read_until(descriptor: int, wanted: bytes, seen: bytes = b"") -> bytes:
    while wanted not in seen:
        assert select.select([descriptor], [], [], 300)[0], seen
        seen += os.read(descriptor, 65536)
    return seen


@pytest.mark.parametrize("locale", ["C.UTF-8", "en_US.ISO-8859-1"])
def test_ctrl_c_on_a_narrow_terminal_leaves_it_clean_and_says_how_to_go_on(tmp_path, locale):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": PACKAGE, "TERM": "xterm", "LC_ALL": locale, "COLUMNS": "60"}
    if locale != "C.UTF-8":
        environment["PYTHONIOENCODING"] = "ascii"
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL],
        cwd=tmp_path,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = read_until(ours, b"3/9 steps")
    process.send_signal(signal.SIGINT)
    seen = read_until(ours, b"goes on where it stopped", seen)
    process.wait()
    text = seen.decode()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible
    assert "library noise" not in text and "corpus" in text and "loss 0.5" in text
    assert ("✓" in text) == (locale == "C.UTF-8")
    os.close(ours)
