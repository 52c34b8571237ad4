"""`embedloom serve --stop NAME`: the command is interrupted, and what a killed one left is ended."""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.cluster.session import end_session
from embedloom.errors import ConfigError, ServeError, StageError
from embedloom.serving import address

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path))


@pytest.fixture
def process():
    """Starts Python processes, and ends those that are left."""
    started: list[subprocess.Popen] = []

    def start(code: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"up\n"
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def known(port: int, pid: int, name: str = "docs", ray: str = "127.0.0.1:1", session: str = "") -> None:
    path = address.remember(port, f"http://127.0.0.1:{port}", ray, name, session)
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": pid}))


def stop(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments])


def test_a_running_command_is_interrupted_and_its_endpoint_forgotten(process):
    running = process(SLEEP)
    known(8001, running.pid)
    assert "would interrupt process" in stop("--stop", "docs", "--dry-run").stdout
    assert running.poll() is None
    result = stop("--stop", "docs")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["stopped docs at http://127.0.0.1:8001", "http://127.0.0.1:8001"]
    assert running.wait(10) == -15
    assert not list((address._folder()).iterdir())


def test_one_of_two_endpoints_is_stopped_by_name_or_port_and_the_other_stays(process):
    one, other = process(SLEEP), process(SLEEP)
    known(8001, one.pid, "docs")
    known(8002, other.pid, "docs")
    with pytest.raises(ConfigError, match=r"several endpoints are called 'docs'; .*port 8001.*port 8002"):
        address.started("docs")
    assert stop("--stop", "8002").exit_code == 0
    assert other.wait(10) == -15 and one.poll() is None
    assert address.started("docs").port == 8001


def test_a_command_that_does_not_end_is_an_error_that_says_what_to_do(process):
    deaf = process(DEAF)
    known(8001, deaf.pid)
    with pytest.raises(ServeError, match=rf"process {deaf.pid}, .* did not stop within 0.2 s; kill it"):
        address.interrupt(address.started("docs"), 0.2)


def test_what_nobody_started_is_refused_by_name(process):
    running = process(SLEEP)
    known(8001, running.pid)
    for arguments, words in (
        (["--stop", "other"], "no endpoint 'other' was started on this machine; allowed: docs (port 8001)"),
        (["--stop", "docs", "minilm-l6"], "goes without CONFIG or MODEL, and 'minilm-l6' is given"),
        ([], "allowed: a run config, any model, or --stop NAME"),
    ):
        error = stop(*arguments).exception
        assert isinstance(error, ConfigError) and words in str(error)  # exit code 2
    assert running.poll() is None


def test_what_a_killed_command_left_of_its_own_ray_is_ended_and_nothing_else(process):
    session = tempfile.mkdtemp(prefix="el-ray-", dir="/tmp")
    try:
        raylet = process(PARENT, f"--session-dir={session}/session_1")
        worker = psutil.Process(raylet.pid).children()[0]
        reader = process(SLEEP, f"{session}/session_1/logs/raylet.out")  # somebody who looks at its log
        other = process(SLEEP, f"--session-dir={session}x/session_1")
        with socket.socket() as ray:  # its head still listens, so the endpoint is remembered
            ray.bind(("127.0.0.1", 0))
            ray.listen()
            known(8001, 2**22 + 1, ray=f"127.0.0.1:{ray.getsockname()[1]}", session=session)
            with pytest.raises(ConfigError, match="no endpoint runs"):
                address.find(None)  # nothing to deploy into
            result = stop("--stop", "docs")
        assert result.exit_code == 0, result.output
        assert "2 processes were left and ended" in result.stdout
        assert not psutil.pid_exists(raylet.pid) or raylet.poll() is not None
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert reader.poll() is None and other.poll() is None
        assert not Path(session).exists()
    finally:
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.parametrize("folder", ["/tmp", "/home/el-ray-x", "/tmp/el-ray-x/session_1", "/tmp/other"])
def test_only_folders_of_our_own_rays_are_ended(folder):
    with pytest.raises(StageError, match="not the folder of a Ray"):
        end_session(Path(folder))


def test_an_endpoint_is_forgotten_when_its_command_and_its_ray_are_gone():
    known(8001, 2**22 + 1)
    with pytest.raises(ConfigError, match="none runs"):
        address.started("docs")
    assert not list((address._folder()).iterdir())
