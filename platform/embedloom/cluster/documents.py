"""The files other programs read, derived from one profile of the cluster config. Plain dictionaries, no Ray."""

from typing import Any

from embedloom.cluster.config import ClusterConfig, NodePool, Profile
from embedloom.cluster.runtime_env import job_runtime_env
from embedloom.cluster.session import init_arguments
from embedloom.errors import ConfigError

HEAD_POOL = "head"
SERVED_MODEL_MOUNT = "/mnt/models/served"  # where a cluster mounts the folder of the model it serves
SERVE_PORT = 8000
IDLE_MINUTES = 10
GCS_PORT = 6379


def documents(cluster: ClusterConfig, profile_name: str) -> dict[str, dict[str, Any]]:
    """Content by file name: always Ray's arguments, runtime_env and Serve; launcher and KubeRay for node
    pools.

    Raises:
        ConfigError: no such profile, or pools without a head.
    """
    profile = cluster.profile(profile_name)
    files = {
        "ray_init.json": init_arguments(profile),
        "runtime_env.yaml": job_runtime_env(),
        "serve.yaml": serve_config(profile),
    }
    if not profile.pools:
        return files
    if HEAD_POOL not in profile.pools:
        raise ConfigError(
            f"profiles.{profile_name}.pools: no pool named {HEAD_POOL!r}, found {', '.join(sorted(profile.pools))}"
        )
    name = f"embedloom-{profile_name}"
    files["raycluster.yaml"] = ray_cluster(cluster, profile, name)
    if profile.region is not None:
        files["launcher.yaml"] = launcher_config(cluster, profile, name)
    return files


def serve_config(profile: Profile) -> dict[str, Any]:
    """Serve's config file (``serve deploy``): the endpoint with the profile's scaling."""
    on_machine = not profile.pools
    return {
        "proxy_location": "HeadOnly" if on_machine else "EveryNode",
        # On a cluster the address is inside its network, behind a load balancer; on one machine, loopback.
        "http_options": {"host": "127.0.0.1" if on_machine else "0.0.0.0", "port": SERVE_PORT},
        "applications": [
            {
                "name": "embedloom",
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": {
                    "model_folder": SERVED_MODEL_MOUNT,
                    "served_name": "embedloom",
                    "scaling": profile.serve.model_dump(mode="json"),
                },
            }
        ],
    }


def ray_cluster(cluster: ClusterConfig, profile: Profile, name: str) -> dict[str, Any]:
    """KubeRay's RayCluster."""
    head = profile.pools[HEAD_POOL]
    workers = {pool: machines for pool, machines in profile.pools.items() if pool != HEAD_POOL}
    start = {"object-store-memory": str(profile.object_store_mib * 2**20)}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "rayVersion": cluster.ray.version,
            "authOptions": {"mode": cluster.auth.mode},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": IDLE_MINUTES * 60},
            "headGroupSpec": {
                "rayStartParams": {"object-store-memory": _small_store(head, profile)},
                "template": _pod(cluster, profile, head, "ray-head"),
            },
            "workerGroupSpecs": [
                {
                    "groupName": pool,
                    "replicas": machines.min_nodes,
                    "minReplicas": machines.min_nodes,
                    "maxReplicas": machines.max_nodes,
                    "rayStartParams": dict(start),
                    "template": _pod(cluster, profile, machines, "ray-worker"),
                }
                for pool, machines in workers.items()
            ],
        },
    }


def _small_store(pool: NodePool, profile: Profile) -> str:
    """Object store of the head in bytes: the profile's, but at most 30 % of its memory (Ray's own share)."""
    return str(min(profile.object_store_mib * 2**20, int(pool.memory_gib * 2**30 * 0.3)))


def _pod(cluster: ClusterConfig, profile: Profile, pool: NodePool, container: str) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(pool.cpus), "memory": f"{pool.memory_gib:g}Gi"}
    if pool.gpus:
        resources["nvidia.com/gpu"] = str(pool.gpus)
    spec: dict[str, Any] = {
        "containers": [
            {
                "name": container,
                "image": _image(cluster),
                "resources": {"limits": resources, "requests": dict(resources)},
                # The object store lives in shared memory, of which containers get 64 MiB unless told
                # otherwise.
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{profile.object_store_mib}Mi"}}
        ],
    }
    if pool.instance is not None:
        spec["nodeSelector"] = {"node.kubernetes.io/instance-type": pool.instance}
    return {"spec": spec}


def _image(cluster: ClusterConfig) -> str:
    if cluster.ray.image is None:
        raise ConfigError("ray.image: required to render a cluster's files, but missing")
    return cluster.ray.image


def launcher_config(cluster: ClusterConfig, profile: Profile, name: str) -> dict[str, Any]:
    """The cluster launcher's file (``ray up``) on AWS.

    Raises:
        ConfigError: a pool without an instance type.
    """
    for pool, machines in profile.pools.items():
        if machines.instance is None:
            raise ConfigError(
                f"pools.{pool}.instance: required for the launcher (region is set), but missing"
            )
    # These machines are the cluster's own, so stopping every Ray on them is right, unlike on a shared one.
    start = f"RAY_AUTH_MODE={cluster.auth.mode} ray start --object-store-memory="
    store = str(profile.object_store_mib * 2**20)
    return {
        "cluster_name": name,
        "max_workers": sum(m.max_nodes for pool, m in profile.pools.items() if pool != HEAD_POOL),
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {"type": "aws", "region": profile.region},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {"image": _image(cluster), "container_name": "embedloom"},
        "file_mounts": {"~/.ray/auth_token": cluster.auth.token_path} if cluster.auth.mode == "token" else {},
        "cluster_synced_files": [],
        "head_node_type": HEAD_POOL,
        "available_node_types": {pool: _node_type(pool, m) for pool, m in profile.pools.items()},
        "head_start_ray_commands": [
            "ray stop",
            f"{start}{_small_store(profile.pools[HEAD_POOL], profile)} --head --port={GCS_PORT} "
            "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start}{store} --address=$RAY_HEAD_IP:{GCS_PORT}"],
    }


def _node_type(name: str, pool: NodePool) -> dict[str, Any]:
    resources: dict[str, int] = {"CPU": pool.cpus}
    if pool.gpus:
        resources["GPU"] = pool.gpus
    if pool.accelerator is not None:
        resources[f"accelerator_type:{pool.accelerator}"] = 1
    workers = (0, 0) if name == HEAD_POOL else (pool.min_nodes, pool.max_nodes)
    return {
        "resources": resources,
        "min_workers": workers[0],
        "max_workers": workers[1],
        "node_config": {"InstanceType": pool.instance},
    }
