"""Connecting this process to Ray as the cluster config says, and what every node has in its environment."""

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedloom.cluster.worker_output import listen, settle
from embedloom.config.cluster import LISTENER_VARIABLE, AuthConfig, ClusterConfig, NodePool, Profile
from embedloom.core.command_output import current_logs
from embedloom.core.progress import note
from embedloom.errors import ConfigError, MissingDependency, StageError, UserError, first_line

# What Serve calls in every process that listens: serving/listener.py.
PROXY_CALLBACK = "embedloom.serving.listener.proxy_middlewares"


# What Ray reads where it starts and ends a node's processes.
PROCESS_ENVIRONMENT = {
    # An actor or task that reserved no GPU sees none: by default Ray leaves it all of the node's.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # With a worker that is killed its whole process group ends: an engine's own processes would keep the GPU's memory.
    "RAY_process_group_cleanup_enabled": "1",
    # Threads of a product that wait for one without a core sleep soon, as libgomp has it where there are more threads than
    # cores; its other default, 300,000 turns, burns the very core that the late one waits for. Two threads on two cores at a
    # load of 7 to 9 then did 1.3 to 1.5 times the steps, for 0.6 of the CPU time of each. A person's own words win.
    "GOMP_SPINCOUNT": "1000",
}


def node_environment(profile: Profile, pool: NodePool) -> dict[str, str]:
    """Variables of a node's Ray process, by name, the pool's own words last; secrets are not among them."""
    found = PROCESS_ENVIRONMENT | serve_environment(profile)
    if pool.spot:
        found["RAY_NODE_MARKET_TYPE"] = "spot"  # Ray's own label ray.io/market-type
    if profile.cache_folder is not None:
        found |= {"EMBEDLOOM_CACHE": profile.cache_folder, "HF_HOME": f"{profile.cache_folder}/huggingface"}
    return found | _fabric_environment(pool) | pool.env


def _fabric_environment(pool: NodePool) -> dict[str, str]:
    """What makes NCCL take the fabric, and end rather than go on over TCP where it can be told to."""
    if pool.fabric == "efa":
        # From AWS's guide to EFA and NCCL: the interface reads and writes the GPUs' memory itself (p4 must be told so), and
        # registered memory survives a fork.
        return {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
    if pool.fabric == "infiniband":
        # By NCCL's own name of it, without which it would go on over TCP in silence.
        return {"NCCL_NET": "IB", "NCCL_IB_HCA": "mlx5"}
    return {}


def serve_environment(profile: Profile) -> dict[str, str]:
    """What Serve's controller and replicas read when they are imported, on whichever machine that is."""
    # The endpoint's handlers hand what takes long to threads, so they need no event loop in a thread of its own, to and
    # from which every request is passed: single runs on two cores, 64 clients, 404 requests a second instead of 373.
    found = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
    found["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = PROXY_CALLBACK
    found[LISTENER_VARIABLE] = profile.serve.listener.model_dump_json()
    if profile.serve.haproxy:
        found["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        # HAProxy's own bounds: on the size of a request's headers, of which it keeps a kibibyte for itself, and on the
        # silence of a client that has not sent them all.
        found["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] = str(profile.serve.listener.max_header_bytes + 1024)
        found["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] = str(math.ceil(profile.serve.listener.header_seconds))
    return found


def required_image(cluster: ClusterConfig) -> str:
    """The image of every node.

    Raises:
        ConfigError: none is stated.
    """
    if cluster.ray.image is None:
        raise ConfigError("ray.image: required to render a cluster's files, but missing")
    return cluster.ray.image


_SESSION_PREFIX = "el-ray-"
_END_SECONDS = 5.0  # that a process may take to end when asked
_WORKERS_START_SECONDS = 1200  # of Ray Train, where a profile's own budget is shorter

# Ray's workers import embedloom from here when it is not pip-installed in their image.
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def set_ray_environment(auth: AuthConfig) -> None:
    """State the authentication mode for this process and its children before Ray is imported.

    Ray 2.60 turns token auth on by itself for a local ``ray.init`` but leaves its clients without a token;
    stating it for both sides is the only combination in which jobs and drivers agree.
    """
    os.environ.setdefault("RAY_AUTH_MODE", auth.mode)
    if auth.mode == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(Path(auth.token_path).expanduser()))
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    for name, value in PROCESS_ENVIRONMENT.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault(name, value)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # One progress line a stage is enough; the libraries' bars and reports drown it in every actor's log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def ray_session(profile: Profile, auth: AuthConfig) -> Iterator[bool]:
    """A connected Ray for the ``with`` block; whether it is a private one, which ends with the block.

    A job started by ``ray job submit`` finds ``RAY_ADDRESS`` set and joins that cluster; otherwise the local
    profile starts a private one ("local", so it never joins somebody else's cluster on this machine).
    """
    # A worker process needs a minute to import torch on a busy node, and longer where nodes scale from zero.
    patience = max(_WORKERS_START_SECONDS, profile.start_budget)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(patience))
    set_ray_environment(auth)
    os.environ.update(serve_environment(profile))
    try:
        import ray
    except ImportError as error:
        raise MissingDependency("ray", "cpu", "every stage") from error
    if ray.is_initialized():
        yield False
        return
    temporary = _start_or_join(init_arguments(profile, os.environ.get("RAY_ADDRESS")), auth)
    # Ray Data logs its plan and every start and end of a dataset; our progress lines say what users ask for.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    from ray.data import DataContext

    DataContext.get_current().target_max_block_size = int(profile.block_mib * 2**20)
    listen()
    try:
        yield temporary is not None
    except Exception as error:
        _keep_failure(error, temporary)
        raise
    except KeyboardInterrupt:
        note("ray", "interrupted: ending its processes")
        raise
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _start_or_join(arguments: dict[str, Any], auth: AuthConfig) -> str | None:
    """Connect to the Ray at the address, or start one of our own; returns the folder of the latter.

    Raises:
        StageError: it did not start, or did not answer.
    """
    import ray

    temporary: str | None = None
    settings: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if arguments["address"] == "local":
        ensure_token(auth)
        # Unix socket paths are limited to 107 bytes, so the session folder must have a short name.
        temporary = tempfile.mkdtemp(prefix=_SESSION_PREFIX, dir="/tmp")
        path = f"{PACKAGE_ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        settings |= {"runtime_env": {"env_vars": {"PYTHONPATH": path}}, "_temp_dir": temporary}
    try:
        ray.init(**arguments, **settings)
    except Exception as error:  # a bare Exception, on a machine too busy for Ray's own deadlines
        _keep_failure(error, temporary)
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise StageError(f"Ray did not start: {first_line(error)}") from error
    return temporary


def end_session(folder: Path) -> int:
    """End all processes of a private Ray whose command was killed, and delete its folder; returns how many there were.

    They are known by the folder, which options of Ray's own processes name; workers, which rename themselves, are children of
    its raylet.

    Raises:
        StageError: the folder is not one of a private Ray.
    """
    import psutil

    if folder.parent != Path("/tmp") or not folder.name.startswith(_SESSION_PREFIX):
        raise StageError(
            f"{folder} is not the folder of a Ray that embedloom started; allowed: /tmp/{_SESSION_PREFIX}…"
        )
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(argument.startswith("--") and f"={folder}/" in argument for argument in process.cmdline()):
                found |= {process, *process.children(recursive=True)}
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, late = psutil.wait_procs(found, timeout=_END_SECONDS)
    for process in late:
        with contextlib.suppress(psutil.Error):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    return len(found)


def _keep_failure(error: Exception, temporary: str | None) -> None:
    """Before Ray ends: what workers said last, and the files of a Ray of our own, which are deleted with it."""
    logs = current_logs()
    if logs is None or isinstance(error, UserError):
        return
    settle()
    if temporary is not None:
        logs.keep_ray(Path(temporary) / "session_latest" / "logs")


def init_arguments(profile: Profile, address: str | None = None) -> dict[str, Any]:
    """The arguments of ``ray.init`` that a profile decides; ``address`` replaces the profile's own."""
    address = address or profile.address
    if address:
        return {"address": address}
    optional = {"num_gpus": profile.gpus or None, "object_spilling_directory": profile.spill_folder}
    return {
        "address": "local",
        "num_cpus": profile.logical_cpus,
        "object_store_memory": profile.object_store_mib * 2**20,
        **{key: value for key, value in optional.items() if value is not None},
        # Ray Train's cleaner of dead runs asks the dashboard's state API and fills the log without it. No
        # port is named: Ray then takes the next free one, where a named one that is taken ends in a
        # traceback.
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
    }


def ensure_token(auth: AuthConfig) -> None:
    """Create the token file, readable by its owner only, if token mode has none yet."""
    if auth.mode != "token":
        return
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    if path.exists():
        return
    import secrets

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))
