"""Starting a command, killing it at a moment of its work, and finding what it started."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import psutil

LIMIT_SECONDS = 600


def start(arguments: list[str], log: Path | None = None) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that it can be killed with all it starts."""
    out = subprocess.DEVNULL if log is None else log.open("ab")
    return subprocess.Popen(arguments, start_new_session=True, stdout=out, stderr=out)


def written_at(folder: Path, paths: Iterable[Path]) -> dict[str, int]:
    """When each file was written, by its path in the folder; some may be tidied away while they are looked at."""
    times = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            times[path.relative_to(folder).as_posix()] = path.stat().st_mtime_ns
    return times


def run_until(
    arguments: list[str], finished: Callable[[], Collection[str]], target: int, delay: float
) -> tuple[bool, int]:
    """Start a run and kill its process group ``delay`` seconds after ``target`` files are finished.

    Returns whether the kill came before the end, and how many files were finished then.
    """
    process = start(arguments)
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and len(finished()) < target:
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)
    time.sleep(delay)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for session in Path("/tmp").glob(f"el-ray-*/session_*_{process.pid}"):
        shutil.rmtree(session.parent, ignore_errors=True)
    return alive, len(finished())


def stop(driver: subprocess.Popen[bytes]) -> None:
    """Kill the driver and all it started: Ray's own processes are in its session."""
    below = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGKILL)
    for process in below:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    driver.wait()


def started(driver: int, name: str) -> list[psutil.Process]:
    """What the driver started, by a part of its command line, oldest first."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append((process.create_time(), process.pid, process))
        except psutil.NoSuchProcess:
            continue
    return [process for _, _, process in sorted(found)]


def pause(process: psutil.Process, seconds: float) -> None:
    """A slow node: the process does nothing for a while, then goes on."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
