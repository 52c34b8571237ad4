"""KubeRay's RayCluster, RayJob and RayService of a profile. Plain dictionaries."""

import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from embedloom.cluster.checks import HEAD_POOL
from embedloom.cluster.config import ClusterConfig, NodePool, Profile
from embedloom.cluster.environment import node_environment, required_image
from embedloom.cluster.launcher import IDLE_MINUTES, small_store

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
            "rayStartParams": _start(profile, small_store(head, profile)),
            **_labels(head),
            "template": _pod(cluster, profile, head, "ray-head"),
        },
        "workerGroupSpecs": [
            {
                "groupName": pool,
                "replicas": machines.min_nodes,
                "minReplicas": machines.min_nodes,
                "maxReplicas": machines.max_nodes,
                "rayStartParams": _start(profile, profile.object_store_mib * 2**20),
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


def _start(profile: Profile, store_bytes: int) -> dict[str, str]:
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
