"""The files other programs read, derived from one profile of the cluster config. Plain dictionaries, no Ray."""

from typing import Any

from embedloom.cluster.checks import HEAD_POOL
from embedloom.cluster.config import ClusterConfig, Profile
from embedloom.cluster.kuberay import RAY_JOB_CONFIG, RayJobOrder, ray_cluster, ray_job, ray_service
from embedloom.cluster.launcher import launcher_config
from embedloom.cluster.runtime_env import job_runtime_env
from embedloom.cluster.session import init_arguments
from embedloom.errors import ConfigError

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
    arguments: dict[str, Any] = {"model_folder": _model_folder(profile), "served_name": "embedloom"}
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
