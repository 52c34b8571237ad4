"""The files other programs read, derived from one profile: KubeRay's resources, the cluster launcher's file, Serve's config,
the jobs' runtime_env. Plain dictionaries, no Ray.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from embedloom.cluster.session import init_arguments, node_environment, required_image, serve_environment
from embedloom.config.cluster import HEAD_POOL, ClusterConfig, NodePool, Profile
from embedloom.config.embedding import computed_dtype
from embedloom.errors import ConfigError

# What a job takes with it: the project folder without results, environments and caches.
#
# ``cluster/runtime_env.yaml`` is this dictionary for people who type ``ray job submit`` themselves.


# Uploads are limited to 512 MiB, and a corpus or checkpoint in the package would be copied to every node.
EXCLUDES = (
    ".git/", ".venv/", ".bench/", ".hypothesis/", ".mypy_cache/", ".pytest_cache/", ".ruff_cache/",
    "runs/", "build/", "dist/", "cluster/rendered/", "**/__pycache__/", "*.egg-info/",
)  # fmt: skip


def job_runtime_env(working_dir: Path | None = None) -> dict[str, Any]:
    """The runtime_env of a job.

    ``PYTHONPATH`` and not ``py_modules``: a relative entry is found by driver and workers alike, because both
    start in the unpacked working directory.

    Args:
        working_dir: the project root; None leaves it to ``ray job submit --working-dir``.
    """
    content: dict[str, Any] = {"env_vars": {"PYTHONPATH": "platform"}, "excludes": list(EXCLUDES)}
    return content if working_dir is None else {"working_dir": str(working_dir), **content}


# The cluster launcher's file (``ray up``) of a profile, on AWS. Plain dictionaries.


IDLE_MINUTES = 10
GCS_PORT = 6379


def launcher_config(cluster: ClusterConfig, profile: Profile, name: str) -> dict[str, Any]:
    """The cluster launcher's file.

    Raises:
        ConfigError: a pool without an instance type.
    """
    for pool, machines in profile.pools.items():
        if machines.instance is None:
            raise ConfigError(
                f"pools.{pool}.instance: required for the launcher (region is set), but missing"
            )
    mount = profile.storage.mount_command
    head = profile.pools[HEAD_POOL]
    # These machines are the cluster's own, so stopping every Ray on them is right, unlike on a shared one.
    return {
        "cluster_name": name,
        "max_workers": sum(m.max_nodes for pool, m in profile.pools.items() if pool != HEAD_POOL),
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {"type": "aws", "region": profile.region},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": required_image(cluster),
            "container_name": "embedloom",
            "run_options": _run_options(profile),
        },
        "file_mounts": {"~/.ray/auth_token": cluster.auth.token_path} if cluster.auth.mode == "token" else {},
        "cluster_synced_files": [],
        "initialization_commands": [] if mount is None else [mount],
        "head_node_type": HEAD_POOL,
        "available_node_types": {pool: _node_type(pool, m) for pool, m in profile.pools.items()},
        "head_start_ray_commands": [
            "ray stop",
            f"{_ray_start_command(cluster, profile, head, small_store(head, profile))} --head --port={GCS_PORT} "
            "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{_ray_start_command(cluster, profile, None, profile.object_store_mib * 2**20)} --address=$RAY_HEAD_IP:{GCS_PORT}",
        ],
    }


def small_store(pool: NodePool, profile: Profile) -> int:
    """Object store of the head in bytes: the profile's, but at most 30 % of its memory (Ray's own share)."""
    return min(profile.object_store_mib * 2**20, int(pool.memory_gib * 2**30 * 0.3))


def _ray_start_command(
    cluster: ClusterConfig, profile: Profile, pool: NodePool | None, store_bytes: int
) -> str:
    environment: dict[str, str] = {"RAY_AUTH_MODE": cluster.auth.mode}
    if pool is not None:
        environment |= node_environment(profile, pool)
    else:  # worker commands are the same for all pools
        environment |= serve_environment(profile)
    options = [f"--object-store-memory={store_bytes}"]
    if profile.spill_folder is not None:
        options.append(f"--object-spilling-directory={profile.spill_folder}")
    stated = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
    return f"{stated} ray start {' '.join(options)}"


def _run_options(profile: Profile) -> list[str]:
    """Shared memory for the object store, and the node's folders that the container shares."""
    options = [f"--shm-size={profile.object_store_mib}m"]
    root = profile.storage.root
    folders = [profile.spill_folder, root if root is not None and "://" not in root else None]
    return options + [f"--volume={folder}:{folder}" for folder in folders if folder is not None]


def _node_type(name: str, pool: NodePool) -> dict[str, Any]:
    resources: dict[str, int] = {"CPU": pool.cpus}
    if pool.gpus:
        resources["GPU"] = pool.gpus
    if pool.accelerator is not None:
        resources[f"accelerator_type:{pool.accelerator}"] = 1
    workers = (0, 0) if name == HEAD_POOL else (pool.min_nodes, pool.max_nodes)
    node_config: dict[str, Any] = {"InstanceType": pool.instance}
    labels = dict(pool.labels)
    if pool.spot:
        node_config["InstanceMarketOptions"] = {"MarketType": "spot"}
        labels["ray.io/market-type"] = "spot"
    return {
        "resources": resources,
        "min_workers": workers[0],
        "max_workers": workers[1],
        "node_config": node_config,
        **({"labels": labels} if labels else {}),
    }


# KubeRay's RayCluster, RayJob and RayService of a profile. Plain dictionaries.


RAY_JOB_CONFIG = "/etc/embedloom"  # where a RayJob's head finds run.yaml and cluster.yaml, from its ConfigMap
KEEP_FINISHED_SECONDS = 600  # long enough to read what a failed job left in its pods


@dataclass(frozen=True, slots=True)
class RayJobOrder:
    """A command as a RayJob: its name, its arguments, and the files it reads, by name."""

    name: str
    arguments: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)  # empty: the ConfigMap is made by hand

    @property
    def entrypoint(self) -> str:
        """The shell command the driver runs on the head."""
        cluster = ("--cluster", f"{RAY_JOB_CONFIG}/cluster.yaml")
        return shlex.join(["python", "-m", "embedloom.cli", *self.arguments, *cluster])


def ray_cluster(cluster: ClusterConfig, profile: Profile, name: str) -> dict[str, Any]:
    """KubeRay's RayCluster."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": profile.namespace},
        "spec": cluster_spec(cluster, profile),
    }


def cluster_spec(cluster: ClusterConfig, profile: Profile) -> dict[str, Any]:
    """What a RayCluster, RayJob and RayService have in common."""
    head = profile.pools[HEAD_POOL]
    return {
        "rayVersion": cluster.ray.version,
        "authOptions": {"mode": cluster.auth.mode},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": IDLE_MINUTES * 60},
        "headGroupSpec": {
            "rayStartParams": _ray_start_params(profile, small_store(head, profile)),
            **_labels(head),
            "template": _pod(cluster, profile, head, "ray-head"),
        },
        "workerGroupSpecs": [
            {
                "groupName": pool,
                "replicas": machines.min_nodes,
                "minReplicas": machines.min_nodes,
                "maxReplicas": machines.max_nodes,
                "rayStartParams": _ray_start_params(profile, profile.object_store_mib * 2**20),
                **_labels(machines),
                "template": _pod(cluster, profile, machines, "ray-worker"),
            }
            for pool, machines in profile.pools.items()
            if pool != HEAD_POOL
        ],
    }


def ray_job(cluster: ClusterConfig, profile: Profile, order: RayJobOrder) -> dict[str, Any]:
    """KubeRay's RayJob: a cluster for one command, taken down after it.

    A retry gets a new cluster, so what it resumes from is the run's storage; the stages see to that.
    """
    spec = cluster_spec(cluster, profile)
    pod = spec["headGroupSpec"]["template"][
        "spec"
    ]  # the driver runs on the head, so only the head reads the configs
    pod["volumes"].append({"name": "config", "configMap": {"name": order.name}})
    pod["containers"][0]["volumeMounts"].append(
        {"name": "config", "mountPath": RAY_JOB_CONFIG, "readOnly": True}
    )
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": order.name, "namespace": profile.namespace},
        "spec": {
            "entrypoint": order.entrypoint,
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_FINISHED_SECONDS,
            "backoffLimit": 2,
            "rayClusterSpec": spec,
        },
    }


def config_map(profile: Profile, order: RayJobOrder) -> dict[str, Any]:
    """The ConfigMap with a RayJob's files."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": order.name, "namespace": profile.namespace},
        "data": dict(order.files),
    }


def ray_service(cluster: ClusterConfig, profile: Profile, name: str, serve: dict[str, Any]) -> dict[str, Any]:
    """KubeRay's RayService: the endpoint on a cluster that KubeRay keeps healthy and replaces without a gap."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "namespace": profile.namespace},
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
            "rayClusterConfig": cluster_spec(cluster, profile),
        },
    }


def _ray_start_params(profile: Profile, store_bytes: int) -> dict[str, str]:
    start = {"object-store-memory": str(store_bytes)}
    if profile.spill_folder is not None:
        start["object-spilling-directory"] = profile.spill_folder
    return start


def _labels(pool: NodePool) -> dict[str, Any]:
    return {"labels": dict(pool.labels)} if pool.labels else {}


def _pod(cluster: ClusterConfig, profile: Profile, pool: NodePool, container: str) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(pool.cpus), "memory": f"{pool.memory_gib:g}Gi"}
    if pool.gpus:
        resources["nvidia.com/gpu"] = str(pool.gpus)
    volumes = _volumes(profile)
    spec: dict[str, Any] = {
        "containers": [
            {
                "name": container,
                "image": required_image(cluster),
                "env": [
                    {"name": key, "value": value} for key, value in node_environment(profile, pool).items()
                ],
                "resources": {"limits": resources, "requests": dict(resources)},
                "volumeMounts": [{"name": name, "mountPath": path} for name, (path, _) in volumes.items()],
            }
        ],
        "volumes": [{"name": name, **source} for name, (_, source) in volumes.items()],
        "terminationGracePeriodSeconds": profile.serve.termination_grace_seconds,
    }
    selector = {}
    if pool.instance is not None:
        selector["node.kubernetes.io/instance-type"] = pool.instance
    if pool.spot:
        selector["karpenter.sh/capacity-type"] = "spot"
    if selector:
        spec["nodeSelector"] = selector
    return {"spec": spec}


def _volumes(profile: Profile) -> dict[str, tuple[str, dict[str, Any]]]:
    """Mount path and source by name."""
    # The object store lives in shared memory, of which containers get 64 MiB unless told otherwise.
    shared = {"emptyDir": {"medium": "Memory", "sizeLimit": f"{profile.object_store_mib}Mi"}}
    found: dict[str, tuple[str, dict[str, Any]]] = {"shm": ("/dev/shm", shared)}
    if profile.spill_folder is not None:
        found["spill"] = (
            profile.spill_folder,
            {"hostPath": {"path": profile.spill_folder, "type": "DirectoryOrCreate"}},
        )
    if profile.storage.claim is not None and profile.storage.root is not None:
        claim = {"persistentVolumeClaim": {"claimName": profile.storage.claim}}
        found["runs"] = (profile.storage.root, claim)
    return found


SERVED_MODEL_MOUNT = (
    "/mnt/models/served"  # where the model's folder is mounted, unless the storage root is one
)
SERVE_PORT = 8000


def documents(cluster: ClusterConfig, profile_name: str) -> dict[str, dict[str, Any]]:
    """Content by file name: always Ray's arguments, runtime_env and Serve; launcher and KubeRay for node
    pools.

    Raises:
        ConfigError: no such profile, or pools without a head.
    """
    profile = cluster.profile(profile_name)
    serve = serve_config(profile)
    files = {
        "ray_init.json": init_arguments(profile),
        "runtime_env.yaml": job_runtime_env(),
        "serve.yaml": serve,
    }
    if not profile.pools:
        return files
    check_pools(profile, profile_name)
    name = f"embedloom-{profile_name}"
    files["raycluster.yaml"] = ray_cluster(cluster, profile, name)
    order = RayJobOrder(name, ("run", f"{RAY_JOB_CONFIG}/run.yaml", "--profile", profile_name))
    files["rayjob.yaml"] = ray_job(cluster, profile, order)
    files["rayservice.yaml"] = ray_service(cluster, profile, name, serve)
    if profile.region is not None:
        files["launcher.yaml"] = launcher_config(cluster, profile, name)
    return files


def check_pools(profile: Profile, profile_name: str) -> None:
    """Raise ConfigError for a cluster that has no head."""
    if HEAD_POOL not in profile.pools:
        raise ConfigError(
            f"profiles.{profile_name}.pools: no pool named {HEAD_POOL!r}, found {', '.join(sorted(profile.pools)) or 'none'}"
        )


def serve_config(profile: Profile) -> dict[str, Any]:
    """Serve's config file (``serve deploy``): the endpoint with the profile's scaling."""
    on_machine = not profile.pools
    # Said, though it is the default: who reads the file sees what a replica computes in, and its memory follows from it.
    serving = {"compute_dtype": computed_dtype("auto", profile.serve.gpus)}
    arguments: dict[str, Any] = {
        "model_folder": _model_folder(profile),
        "served_name": "embedloom",
        "serving": serving,
    }
    scaling = profile.serve.model_dump(mode="json")
    return {
        "proxy_location": "HeadOnly" if on_machine else "EveryNode",
        # On a cluster the address is inside its network, behind a load balancer; on one machine, loopback.
        "http_options": {"host": "127.0.0.1" if on_machine else "0.0.0.0", "port": SERVE_PORT},
        "applications": [
            {
                "name": "embedloom",
                "route_prefix": "/",
                "import_path": "embedloom.serving.app:build",  # wherever the package is installed
                "args": {**arguments, "scaling": scaling},
            }
        ],
    }


def _model_folder(profile: Profile) -> str:
    root = profile.storage.root
    return SERVED_MODEL_MOUNT if root is None or "://" in root else f"{root.rstrip('/')}/served"
