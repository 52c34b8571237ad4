"""``embedloom submit``: a command as a Ray job, on a cluster or on a Ray head of our own on this machine."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import psutil

from embedloom.cluster.session import ensure_token, set_ray_environment
from embedloom.config.cluster import ClusterConfig, Profile
from embedloom.core.progress import note
from embedloom.errors import ConfigError, StageError, last_line

# A Ray head of our own on this machine, for jobs submitted to the local profile.
#
# It has its own ports and temporary folder, so it neither disturbs nor joins another Ray here, and it is
# stopped by its process id: ``ray stop`` would stop every Ray on the machine.


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


# ``embedloom submit``: a command as a Ray job, its log streamed, its exit code kept.


@dataclass(frozen=True, slots=True)
class Submission:
    """An ``embedloom`` command as a job.

    Attributes:
        arguments: of the command, e.g. ``("evaluate", "jobs/configs/quickstart.yaml")``.
        profile_name: profile of the cluster config that the job runs on.
        working_dir: project root, uploaded without results and environments.
        address: dashboard of a running cluster (``http://host:8265``); None: the profile's, or a head of our own.
        start_head: start a head on this machine for the duration of the job.
        on_interrupt: whether Ctrl-C stops the job or leaves it running.
        key: what the job works on; a job of the same key that still runs is joined. None: never join one.
        verbose: show all that the job prints.
    """

    arguments: tuple[str, ...]
    profile_name: str
    working_dir: Path
    address: str | None = None
    start_head: bool = False
    on_interrupt: Literal["stop", "detach"] = "stop"
    key: str | None = None
    verbose: bool = False


def submit(order: Submission, cluster: ClusterConfig) -> int:
    """Run the command as a job and wait for it.

    Returns:
        The driver's exit code: 0 done, 2 bad config or data, 1 failed, 137 killed.

    Raises:
        ConfigError: address and head together, no cluster at the address, or a detached job whose head would stop.
        StageError: the head or the job did not start.
        KeyboardInterrupt: Ctrl-C; the job has been stopped, or left running.
    """
    profile = cluster.profile(order.profile_name)
    if order.address is not None and order.start_head:
        raise ConfigError(
            f"--address: {order.address!r} names a running cluster, so no head can be started; give one of the two"
        )
    local = order.start_head or (order.address is None and profile.backend == "local")
    if local and order.on_interrupt == "detach":
        raise ConfigError(
            "--on-interrupt: detach needs a cluster that outlives this command, but its head stops with it; give "
            "--address, or allowed: stop"
        )
    # On this machine "python" would be whatever the raylet finds first on its PATH; an image has just one.
    python = sys.executable if local else "python"
    entrypoint = shlex.join(
        [python, "-m", "embedloom.cli", *order.arguments, *(["--verbose"] if order.verbose else [])]
    )
    set_ray_environment(cluster.auth)
    ensure_token(cluster.auth)
    # Ray reads how to authenticate when it is first imported, so not before the environment says it.
    from embedloom.cluster.job_client import JobOrder, run_job

    job = JobOrder(entrypoint, order.working_dir, order.key, order.on_interrupt, order.verbose)
    with _termination_as_interrupt():
        if not local:
            return run_job(job, _dashboard(profile, order.address))
        note("submit", "starting a Ray head on this machine")
        with local_head(profile) as dashboard:
            return run_job(job, dashboard)


def _dashboard(profile: Profile, address: str | None) -> str:
    """Where the cluster's dashboard is: the option, the environment, or the profile's port on this machine."""
    if address is not None:
        return address
    return os.environ.get("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{profile.dashboard_port}")


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that a killed ``submit`` leaves neither job nor head behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
