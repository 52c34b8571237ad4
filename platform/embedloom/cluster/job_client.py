"""One job through the Ray Jobs API, from upload to exit code. Import it after ``set_ray_environment``."""

import asyncio
import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from embedloom.cluster.manifests import job_runtime_env
from embedloom.core.command_output import REPORTS_VARIABLE
from embedloom.core.progress import hear, note, shown_on
from embedloom.core.terminal import screen_for
from embedloom.errors import ConfigError, EmbedloomError, StageError, first_line

CONNECT_SECONDS = 60.0
STOP_SECONDS = 15.0
# Each sets its own level; what they tell (uploads, defaults, closed sockets) is of no use to who submits.
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
_KEY = "embedloom.key"  # in a job's metadata
OnInterrupt = Literal["stop", "detach"]
_EXIT_CODE = re.compile(r"failed with exit code (\d+)")


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What is submitted, and what Ctrl-C does to it.

    Attributes:
        entrypoint: one shell command.
        working_dir: project root, uploaded.
        key: what the job works on. A job of the same key that still runs is joined, for two drivers would write the
            same artefacts; None submits in any case.
        on_interrupt: stop ends the job; detach leaves it running.
        verbose: whether the job's own lines are streamed as they are, instead of shown as this command's.
    """

    entrypoint: str
    working_dir: Path
    key: str | None = None
    on_interrupt: OnInterrupt = "stop"
    verbose: bool = False


def run_job(order: JobOrder, dashboard: str) -> int:
    """Submit a job or join it, stream its log to stdout and return its exit code; see ``submit``."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    client = _connect(dashboard)
    job = _running(client, order.key)
    if job is None:
        job = _submit(client, order)
        note("submit", f"job {job} on {dashboard}")
    else:
        note("submit", f"joining job {job} on {dashboard}, which is at this already")
    try:
        if order.verbose:
            asyncio.run(_stream_log(client, job, lambda: None))
        else:
            screen = screen_for(sys.stderr)
            with shown_on(screen), screen.running():
                asyncio.run(_stream_log(client, job, screen.clear))
        return _exit_code(client, job)
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        raise StageError(f"lost the connection to job {job}: {first_line(error)}") from error
    except KeyboardInterrupt:
        _interrupted(client, job, order.on_interrupt)
        raise


def _interrupted(client: JobSubmissionClient, job: str, on_interrupt: OnInterrupt) -> None:
    if on_interrupt == "detach":
        note("submit", f"job {job} goes on; the same command joins it again")
        return
    note("submit", f"stopping job {job}")
    with contextlib.suppress(RuntimeError, OSError):
        client.stop_job(job)
        _wait_until_over(client, job, STOP_SECONDS)
    note("submit", "what is finished is kept; the same command goes on from there")


def _running(client: JobSubmissionClient, key: str | None) -> str | None:
    """Id of a job of this key that has not ended."""
    if key is None:
        return None
    for info in client.list_jobs():
        if (info.metadata or {}).get(_KEY) == key and not info.status.is_terminal() and info.submission_id:
            return str(info.submission_id)
    return None


def _connect(dashboard: str) -> JobSubmissionClient:
    """A client, as soon as the dashboard answers.

    Raises:
        ConfigError: nothing answers there, or it refuses the token.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return JobSubmissionClient(dashboard)
        except (OSError, RuntimeError, AuthenticationError) as error:
            if isinstance(error, AuthenticationError) or time.monotonic() > deadline:
                raise ConfigError(
                    f"--address: no usable Ray dashboard at {dashboard}: {first_line(error)}"
                ) from error
        time.sleep(0.5)


def _submit(client: JobSubmissionClient, order: JobOrder) -> str:
    runtime_env = job_runtime_env(order.working_dir)
    if not order.verbose:
        runtime_env["env_vars"] |= {REPORTS_VARIABLE: "1"}
    metadata = {} if order.key is None else {_KEY: order.key}
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return str(
                client.submit_job(entrypoint=order.entrypoint, runtime_env=runtime_env, metadata=metadata)
            )
        except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
            # The dashboard answers before its agent on the head does.
            waiting = isinstance(error, RuntimeError) and "agent" in str(error)
            if not waiting or time.monotonic() > deadline:
                raise StageError(f"the job could not be submitted: {first_line(error)}") from error
        time.sleep(0.5)


async def _stream_log(client: JobSubmissionClient, job: str, make_room: Callable[[], None]) -> None:
    """Show the job's reports; its other lines go to stdout as they are."""
    rest = ""
    async for text in client.tail_job_logs(job):
        *lines, rest = (rest + text).split("\n")
        _print_others(lines, make_room)
    _print_others([rest] if rest else [], make_room)


def _print_others(lines: Sequence[str], make_room: Callable[[], None]) -> None:
    if others := [line for line in lines if not hear(line)]:
        make_room()
        sys.stdout.write("\n".join(others) + "\n")
        sys.stdout.flush()


def _exit_code(client: JobSubmissionClient, job: str) -> int:
    """The driver's own code; Ray's status knows only success and failure."""
    _wait_until_over(client, job, None)
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        raise StageError(f"job {job} was stopped by somebody else")
    code = info.driver_exit_code
    if code is None and (found := _EXIT_CODE.search(info.message or "")):
        code = int(found.group(1))
    if code is None or code < 0:
        note("submit", f"job {job} failed: {first_line(info.message or 'no message')}")
        return EmbedloomError.exit_code
    return int(code)


def _wait_until_over(client: JobSubmissionClient, job: str, seconds: float | None) -> None:
    deadline = None if seconds is None else time.monotonic() + seconds
    while not client.get_job_status(job).is_terminal():
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(0.2)
