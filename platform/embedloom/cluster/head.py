"""A Ray head of our own on this machine, for jobs submitted to the local profile.

It has its own ports and temporary folder, so it neither disturbs nor joins another Ray here, and it is
stopped by its process id: ``ray stop`` would stop every Ray on the machine.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from embedloom.cluster.config import Profile
from embedloom.errors import StageError, last_line

START_SECONDS = 120.0
STOP_SECONDS = 20.0
# Ends the head when its parent dies, also by kill -9: Linux then sends it the signal named here.
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.execv(sys.executable, [sys.executable, '-m', 'ray.scripts.scripts', *sys.argv[1:]])"
)
_PORT_OPTIONS = (
    "--port", "--dashboard-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port", "--node-manager-port", "--object-manager-port", "--ray-client-server-port",
    "--metrics-export-port",
)  # fmt: skip


@contextmanager
def local_head(profile: Profile) -> Iterator[str]:
    """Start a head and yield its dashboard's address; stop it, and all its processes, afterwards.

    The environment must already say how to authenticate (``session.set_ray_environment``): the head inherits
    it.

    Raises:
        StageError: it did not come up.
    """
    # Unix socket paths are limited to 107 bytes, so the session folder must have a short name.
    folder = Path(tempfile.mkdtemp(prefix="el-head-", dir="/tmp"))
    ports = dict(zip(_PORT_OPTIONS, free_ports(len(_PORT_OPTIONS)), strict=True))
    log = folder / "head.log"
    with log.open("wb") as stream:
        head = subprocess.Popen(
            [sys.executable, "-c", _DIE_WITH_PARENT, *_arguments(profile, folder, ports)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            start_new_session=True,  # Ctrl-C is for us: the job is stopped first, then the head
        )
    try:
        _wait_until_started(head, folder, log)
        yield f"http://127.0.0.1:{ports['--dashboard-port']}"
    except StageError as error:
        if head.poll() is None:
            raise
        raise StageError(f"the local Ray head died: {_reason(log)}") from error
    finally:
        _stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def _arguments(profile: Profile, folder: Path, ports: dict[str, int]) -> list[str]:
    arguments = [
        "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--temp-dir={folder}",
        f"--object-store-memory={profile.object_store_mib * 2**20}",
    ]  # fmt: skip
    if profile.logical_cpus is not None:
        arguments.append(f"--num-cpus={profile.logical_cpus}")
    if profile.gpus:
        arguments.append(f"--num-gpus={profile.gpus}")
    if profile.spill_folder is not None:
        arguments.append(f"--object-spilling-directory={profile.spill_folder}")
    return arguments + [f"{option}={port}" for option, port in ports.items()]


def free_ports(count: int) -> list[int]:
    """Different ports that are free now, outside the range Ray gives to its workers (10002 to 19999)."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if not 10002 <= port <= 19999:
                found.append(port)
        return found


def _wait_until_started(head: "subprocess.Popen[bytes]", folder: Path, log: Path) -> None:
    """Until ``ray start`` has written its address, which it does after every part of the head is up."""
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "ray_current_cluster").exists():
        if head.poll() is not None or time.monotonic() > deadline:
            raise StageError(f"the local Ray head did not start: {_reason(log)}")
        time.sleep(0.2)


def _reason(log: Path) -> str:
    return last_line(log.read_text(errors="replace").strip() or "its log is empty")


def _stop(head: "subprocess.Popen[bytes]") -> None:
    """Ask the head to stop, then end whatever of its processes is left."""
    try:
        family = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    with contextlib.suppress(ProcessLookupError):
        head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(STOP_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=2)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if head.poll() is None:
        head.kill()
        head.wait()
