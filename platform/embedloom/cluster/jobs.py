"""``embedloom submit``: a command as a Ray job, its log streamed, its exit code kept."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from embedloom.cluster.config import ClusterConfig, Profile
from embedloom.cluster.head import local_head
from embedloom.cluster.session import ensure_token, set_ray_environment
from embedloom.errors import ConfigError
from embedloom.progress import note


def submit(
    entrypoint_args: list[str],
    *,
    profile_name: str,
    cluster: ClusterConfig,
    address: str | None,
    start_head: bool,
    working_dir: Path,
) -> int:
    """Run ``embedloom`` with these arguments as a job and wait for it.

    Args:
        entrypoint_args: arguments of the command, e.g. ``["evaluate", "jobs/configs/quickstart.yaml"]``.
        profile_name: profile of the cluster config that the job runs on.
        cluster: the cluster config. address: dashboard of a running cluster (``http://host:8265``); None: the
        profile's, or a head of our own. start_head: start a head on this machine for the duration of the job.
        working_dir: project root, uploaded without results and environments.

    Returns:
        The driver's exit code: 0 done, 2 bad config or data, 1 failed, 137 killed.

    Raises:
        ConfigError: address and head together, or no cluster at the address.
        StageError: the head or the job did not start.
        KeyboardInterrupt: Ctrl-C; the job has been stopped.
    """
    profile = cluster.profile(profile_name)
    if address is not None and start_head:
        raise ConfigError(
            f"--address: {address!r} names a running cluster, so no head can be started; give one of the two"
        )
    local = start_head or (address is None and profile.backend == "local")
    # On this machine "python" would be whatever the raylet finds first on its PATH; an image has just one.
    python = sys.executable if local else "python"
    entrypoint = shlex.join([python, "-m", "embedloom.cli", *entrypoint_args])
    set_ray_environment(cluster.auth)
    ensure_token(cluster.auth)
    # Ray reads how to authenticate when it is first imported, so not before the environment says it.
    from embedloom.cluster.job_client import run_job

    with _termination_as_interrupt():
        if not local:
            return run_job(entrypoint, _dashboard(profile, address), working_dir)
        note("submit", "starting a Ray head on this machine")
        with local_head(profile) as dashboard:
            return run_job(entrypoint, dashboard, working_dir)


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
