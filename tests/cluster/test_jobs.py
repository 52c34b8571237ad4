"""Real jobs on a head that starts for them."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from embedloom.cluster.job_client import JobOrder, run_job
from embedloom.cluster.jobs import Submission, free_ports, local_head, submit
from embedloom.cluster.session import ensure_token
from embedloom.config.cluster import AuthConfig, ClusterConfig, Profile, RayVersion
from embedloom.errors import ConfigError

CLUSTER = ClusterConfig(
    version=1,
    ray=RayVersion(version="2.60.0", python="3.11"),
    profiles={"local": Profile(logical_cpus=2, object_store_mib=100)},
    auth=AuthConfig(token_path=os.environ["RAY_AUTH_TOKEN_PATH"]),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose ``embedloom`` is a stand-in that prints and exits as its arguments say."""
    root = tmp_path_factory.mktemp("project")
    package = root / "platform" / "embedloom"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        textwrap.dedent(
            """
            import os, pathlib, sys, time
            print("arguments", sys.argv[1:], "address", bool(os.environ.get("RAY_ADDRESS")), flush=True)
            print("sees", sorted(path.name for path in pathlib.Path.cwd().iterdir()), flush=True)
            if sys.argv[1] == "sleep":
                pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
                time.sleep(300)
            if sys.argv[1] == "wait":
                go = pathlib.Path(sys.argv[2])
                go.with_suffix(".pid").write_text(str(os.getpid()))
                while not go.exists():
                    time.sleep(0.1)
                print("waited enough", flush=True)
                sys.exit(2)
            if sys.argv[1] == "die":
                os.kill(os.getpid(), 9)
            sys.exit(int(sys.argv[1]))
            """
        )
    )
    (root / "config.yaml").write_text("run: {}")
    (root / "runs").mkdir()
    (root / "runs" / "large.bin").write_bytes(b"x")
    return root


@pytest.fixture(autouse=True)
def token():
    """Clients and heads of these tests share the session's token file."""
    ensure_token(CLUSTER.auth)


def test_free_ports_differ():
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert not any(10002 <= port <= 19999 for port in ports)


def test_address_and_head_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="--address"):
        submit(Submission(("run",), "local", tmp_path, address="http://x:1", start_head=True), CLUSTER)


def test_a_job_cannot_outlive_the_head_that_stops_with_its_command(tmp_path):
    with pytest.raises(ConfigError, match=r"--on-interrupt: detach needs a cluster .*allowed: stop"):
        submit(Submission(("run",), "local", tmp_path, start_head=True, on_interrupt="detach"), CLUSTER)


def test_unreachable_cluster_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("embedloom.cluster.job_client.CONNECT_SECONDS", 0.1)
    (port,) = free_ports(1)
    with pytest.raises(ConfigError, match=rf"no usable Ray dashboard at http://127\.0\.0\.1:{port}"):
        run_job(JobOrder("true", tmp_path), f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def head():
    ensure_token(CLUSTER.auth)
    with local_head(CLUSTER.profile("local")) as dashboard:
        yield dashboard


@pytest.mark.slow
@pytest.mark.ray
def test_exit_codes_logs_and_working_folder(head, project, capfd):
    with ThreadPoolExecutor(4) as pool:

        def run(word: str) -> int:
            return run_job(JobOrder(f"{sys.executable} -m embedloom.cli {word} 'a b'", project), head)

        assert list(pool.map(run, ("0", "1", "2", "die"))) == [
            0,
            1,
            2,
            137,
        ]  # 128 + SIGKILL, as a shell says it
    out = capfd.readouterr().out
    assert "arguments ['2', 'a b'] address True" in out
    assert "sees ['config.yaml', 'platform']" in out  # results stay at home


def started(script: str, marker: Path) -> "subprocess.Popen[bytes]":
    """A script in a process of its own, once its job has written the marker."""
    package = str(Path(__file__).parents[2] / "platform")
    # As in a user's shell: the command itself has to say how Ray authenticates.
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**plain, "PYTHONPATH": package},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not marker.exists() or not marker.read_text():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process


@pytest.mark.slow
@pytest.mark.ray
def test_a_detached_job_goes_on_and_the_same_command_joins_it(head, project, tmp_path, capfd):
    go = tmp_path / "go"
    entrypoint = f"{sys.executable} -m embedloom.cli wait {go}"
    process = started(
        f"""
        from pathlib import Path
        from embedloom.config.cluster import AuthConfig
        from embedloom.cluster.session import set_ray_environment
        set_ray_environment(AuthConfig(token_path={CLUSTER.auth.token_path!r}))
        from embedloom.cluster.job_client import JobOrder, run_job
        run_job(JobOrder({entrypoint!r}, Path({str(project)!r}), "k", "detach"), {head!r})
        """,
        go.with_suffix(".pid"),
    )
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"goes on" in errors
    assert process.returncode != 0
    driver = int(go.with_suffix(".pid").read_text())
    assert psutil.pid_exists(driver)
    threading.Timer(1, go.touch).start()
    assert run_job(JobOrder(entrypoint, project, "k"), head) == 2  # the code of the job that was there
    captured = capfd.readouterr()
    assert "waited enough" in captured.out
    assert "joining job" in captured.err
    assert int(go.with_suffix(".pid").read_text()) == driver
    assert run_job(JobOrder(entrypoint, project, "k"), head) == 2  # it has ended, so this is a new one
    assert int(go.with_suffix(".pid").read_text()) != driver


@pytest.mark.slow
@pytest.mark.ray
def test_interrupted_submit_stops_job_and_head(project, tmp_path):
    marker = tmp_path / "pid"
    process = started(
        f"""
        from pathlib import Path
        from embedloom.config.cluster import ClusterConfig
        from embedloom.cluster.jobs import Submission, submit
        cluster = ClusterConfig.model_validate_json({CLUSTER.model_dump_json()!r})
        order = Submission(("sleep", {str(marker)!r}), "local", Path({str(project)!r}), start_head=True)
        submit(order, cluster)
        """,
        marker,
    )
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"stopping job" in errors
    assert process.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive
    assert not psutil.pid_exists(int(marker.read_text()))
