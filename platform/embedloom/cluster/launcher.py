"""The cluster launcher's file (``ray up``) of a profile, on AWS. Plain dictionaries."""

import shlex
from typing import Any

from embedloom.cluster.checks import HEAD_POOL
from embedloom.cluster.config import ClusterConfig, NodePool, Profile
from embedloom.cluster.environment import node_environment, required_image, serve_environment
from embedloom.errors import ConfigError

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
            f"{_start(cluster, profile, head, small_store(head, profile))} --head --port={GCS_PORT} "
            "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{_start(cluster, profile, None, profile.object_store_mib * 2**20)} --address=$RAY_HEAD_IP:{GCS_PORT}",
        ],
    }


def small_store(pool: NodePool, profile: Profile) -> int:
    """Object store of the head in bytes: the profile's, but at most 30 % of its memory (Ray's own share)."""
    return min(profile.object_store_mib * 2**20, int(pool.memory_gib * 2**30 * 0.3))


def _start(cluster: ClusterConfig, profile: Profile, pool: NodePool | None, store_bytes: int) -> str:
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
