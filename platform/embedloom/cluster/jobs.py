"""``embedloom submit``: a command as a Ray job, its log streamed, its exit code kept."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from embedloom.cluster.config import ClusterConfig, Profile
from embedloom.cluster.head import local_head
from embedloom.cluster.session import ensure_token, set_ray_environment
from embedloom.errors import ConfigError
from embedloom.progress import note


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
