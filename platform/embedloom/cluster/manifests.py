"""The files other programs read, derived from one profile: KubeRay's resources, the cluster launcher's file, Serve's config,
the jobs' runtime_env. Plain dictionaries, no Ray.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from embedloom.cluster.session import init_arguments, node_environment, required_image
from embedloom.config.cluster import HEAD_POOL, ClusterConfig, NodePool, Profile, Toleration, Volume
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
NODE_SECRETS = "~/.embedloom/secrets.env"  # of a container: the profile's secrets, NAME=value a line
SHARED_MEMORY = "/dev/shm"


def launcher_config(cluster: ClusterConfig, profile: Profile, name: str) -> dict[str, Any]:
    """The cluster launcher's file.

    Raises:
        ConfigError: a pool without an instance type, or with what only Kubernetes has.
    """
    for pool, machines in profile.pools.items():
        _check_launcher_pool(profile, pool, machines)
    mount = profile.storage.mount_command
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
            "run_options": [_mount(folder) for folder in _host_folders(profile)],
            "head_run_options": _run_options(profile, HEAD_POOL),
        },
        "file_mounts": _file_mounts(cluster, profile),
        "cluster_synced_files": [],
        "initialization_commands": [] if mount is None else [mount],
        "head_node_type": HEAD_POOL,
        "available_node_types": {pool: _node_type(profile, pool) for pool in profile.pools},
        "head_start_ray_commands": [
            "ray stop",
            f"{_ray_start_command(cluster, profile, profile.store_bytes(HEAD_POOL))} --head --port={GCS_PORT} "
            "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{_ray_start_command(cluster, profile, profile.object_store_mib * 2**20)} --address=$RAY_HEAD_IP:{GCS_PORT}",
        ],
    }


def _check_launcher_pool(profile: Profile, name: str, pool: NodePool) -> None:
    if pool.instance is None:
        raise ConfigError(f"pools.{name}.instance: required for the launcher (region is set), but missing")
    for volume, mount in pool.volumes.items():
        if mount.host_path is None:
            raise ConfigError(
                f"pools.{name}.volumes.{volume}.host_path: required for the launcher (region is set), but missing"
            )
    settings = profile.launcher
    if pool.fabric == "efa" and (settings.subnet is None or not settings.security_groups):
        missing = "subnet" if settings.subnet is None else "security_groups"
        raise ConfigError(
            f"launcher.{missing}: required for the interfaces of pools.{name}.fabric efa (region is set), but missing"
        )


def _file_mounts(cluster: ClusterConfig, profile: Profile) -> dict[str, str]:
    found = {"~/.ray/auth_token": cluster.auth.token_path} if cluster.auth.mode == "token" else {}
    if profile.secrets:
        found[NODE_SECRETS] = profile.launcher.secrets_file
    return found


def _ray_start_command(cluster: ClusterConfig, profile: Profile, store_bytes: int) -> str:
    options = [f"--object-store-memory={store_bytes}"]
    if profile.spill_folder is not None:
        options.append(f"--object-spilling-directory={profile.spill_folder}")
    secrets = f"set -a && . {NODE_SECRETS} && set +a && " if profile.secrets else ""
    return f"{secrets}RAY_AUTH_MODE={cluster.auth.mode} ray start {' '.join(options)}"


def _host_folders(profile: Profile) -> list[str]:
    """Folders of a node that every container shares with it."""
    return [folder for folder in profile.node_folders() if folder != SHARED_MEMORY]


def _mount(folder: str, inside: str | None = None, read_only: bool = False) -> str:
    return f"--volume={folder}:{inside or folder}{':ro' if read_only else ''}"


def _run_options(profile: Profile, name: str) -> list[str]:
    """Options of ``docker run`` of a pool, quoted for the shell that Ray hands them to."""
    pool = profile.pools[name]
    options = [f"--shm-size={profile.shm_mib(name)}m"]
    if pool.fabric is not None:  # registers memory, which must stay where it is
        options += ["--device=/dev/infiniband", "--cap-add=IPC_LOCK", "--ulimit=memlock=-1:-1"]
    for mount in pool.volumes.values():
        if mount.host_path is not None:
            options.append(_mount(mount.host_path, mount.path, mount.read_only))
    options += [f"--env={key}={value}" for key, value in node_environment(profile, pool).items()]
    return [shlex.quote(option) for option in options]


def _node_type(profile: Profile, name: str) -> dict[str, Any]:
    pool = profile.pools[name]
    resources: dict[str, int] = {"CPU": pool.cpus}
    if pool.gpus:
        resources["GPU"] = pool.gpus
    if pool.accelerator is not None:
        resources[f"accelerator_type:{pool.accelerator}"] = 1
    head = name == HEAD_POOL
    workers = (0, 0) if head else (pool.min_nodes, pool.max_nodes)
    labels = dict(pool.labels) | ({"ray.io/market-type": "spot"} if pool.spot else {})
    return {
        "resources": resources,
        "min_workers": workers[0],
        "max_workers": workers[1],
        "node_config": _ec2_instance(profile, pool),
        **({} if head else {"docker": {"worker_run_options": _run_options(profile, name)}}),
        **({"labels": labels} if labels else {}),
    }


def _ec2_instance(profile: Profile, pool: NodePool) -> dict[str, Any]:
    """EC2's arguments of a node, as ``create_instances`` has them."""
    settings = profile.launcher
    found: dict[str, Any] = {"InstanceType": pool.instance}
    if pool.spot:
        found["InstanceMarketOptions"] = {"MarketType": "spot"}
    if pool.disk_gib is not None:
        root = {"VolumeSize": pool.disk_gib, "VolumeType": "gp3", "DeleteOnTermination": True}
        found["BlockDeviceMappings"] = [{"DeviceName": "/dev/sda1", "Ebs": root}]
    if pool.placement_group is not None:
        found["Placement"] = {"GroupName": pool.placement_group}
    if settings.iam_profile is not None:
        found["IamInstanceProfile"] = {"Name": settings.iam_profile}
    if pool.fabric == "efa":
        found["NetworkInterfaces"] = [
            {
                "NetworkCardIndex": card,
                "DeviceIndex": min(card, 1),  # 0 is the primary interface's alone
                "InterfaceType": "efa",
                "DeleteOnTermination": True,
                "SubnetId": settings.subnet,
                "Groups": list(settings.security_groups),
            }
            for card in range(pool.fabric_devices)
        ]
        return found
    if settings.subnet is not None:
        found["SubnetIds"] = [settings.subnet]
    if settings.security_groups:
        found["SecurityGroupIds"] = list(settings.security_groups)
    return found


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
            "rayStartParams": _ray_start_params(profile, profile.store_bytes(HEAD_POOL)),
            **_labels(head),
            "template": _pod(cluster, profile, HEAD_POOL),
        },
        "workerGroupSpecs": [
            {
                "groupName": pool,
                "replicas": machines.min_nodes,
                "minReplicas": machines.min_nodes,
                "maxReplicas": machines.max_nodes,
                "rayStartParams": _ray_start_params(profile, profile.object_store_mib * 2**20),
                **_labels(machines),
                "template": _pod(cluster, profile, pool),
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
            **_submitter(cluster, profile.pools[HEAD_POOL]),
            "rayClusterSpec": spec,
        },
    }


def _submitter(cluster: ClusterConfig, head: NodePool) -> dict[str, Any]:
    """The pod that submits a RayJob's command, where KubeRay's own could not pull the image: it has no pull secrets."""
    if not head.image_pull_secrets:
        return {}
    limits = {"cpu": "1", "memory": "1Gi"}
    container = {
        "name": "ray-job-submitter",
        "image": required_image(cluster),
        "resources": {"limits": limits, "requests": {"cpu": "500m", "memory": "200Mi"}},
    }
    pod = {"containers": [container], "restartPolicy": "Never", **_pull_secrets(head)}
    return {"submitterPodTemplate": {"spec": pod}}


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


def _pod(cluster: ClusterConfig, profile: Profile, name: str) -> dict[str, Any]:
    pool = profile.pools[name]
    volumes = _volumes(profile, name)
    container: dict[str, Any] = {
        "name": "ray-head" if name == HEAD_POOL else "ray-worker",
        "image": required_image(cluster),
        "env": _environment(profile, pool),
        "resources": _resources(pool),
        "volumeMounts": [mount for mount, _ in volumes],
    }
    if pool.fabric is not None:
        # Registered memory must stay where it is; a pod has no limits to state but may be let lock as much as it likes.
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    spec: dict[str, Any] = {
        "containers": [container],
        "volumes": [{"name": mount["name"], **source} for mount, source in volumes],
        "terminationGracePeriodSeconds": profile.serve.termination_grace_seconds,
    }
    selector = {}
    if pool.instance is not None:
        selector["node.kubernetes.io/instance-type"] = pool.instance
    if pool.spot:
        selector["karpenter.sh/capacity-type"] = "spot"
    if selector:
        spec["nodeSelector"] = selector
    if pool.tolerations:
        spec["tolerations"] = [_toleration(one) for one in pool.tolerations]
    return {"spec": spec | _pull_secrets(pool)}


def _environment(profile: Profile, pool: NodePool) -> list[dict[str, Any]]:
    stated = [{"name": key, "value": value} for key, value in node_environment(profile, pool).items()]
    kept = [(variable, profile.secrets[variable]) for variable in pool.secrets]
    return stated + [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": one.secret, "key": one.key}}}
        for variable, one in kept
    ]


def _resources(pool: NodePool) -> dict[str, Any]:
    amounts = {"cpu": str(pool.cpus), "memory": f"{pool.memory_gib:g}Gi"}
    if pool.gpus:
        amounts["nvidia.com/gpu"] = str(pool.gpus)
    amounts |= {device: str(count) for device, count in pool.fabric_request.items()}
    if pool.hugepages:
        amounts["hugepages-2Mi"] = f"{pool.hugepages}Mi"
    return {"limits": amounts, "requests": dict(amounts)}


def _toleration(one: Toleration) -> dict[str, str]:
    found = {"key": one.key, "operator": "Exists"}
    if one.value is not None:
        found |= {"operator": "Equal", "value": one.value}
    return found if one.effect is None else {**found, "effect": one.effect}


def _pull_secrets(pool: NodePool) -> dict[str, Any]:
    return (
        {"imagePullSecrets": [{"name": name} for name in pool.image_pull_secrets]}
        if pool.image_pull_secrets
        else {}
    )


def _volumes(profile: Profile, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each volume of a pool's pods: where the container mounts it, and its source."""
    # The object store lives in shared memory, of which containers get 64 MiB unless told otherwise.
    shared = {"emptyDir": {"medium": "Memory", "sizeLimit": f"{profile.shm_mib(name)}Mi"}}
    found = [({"name": "shm", "mountPath": SHARED_MEMORY}, shared)]
    if profile.spill_folder is not None:
        found.append(({"name": "spill", "mountPath": profile.spill_folder}, _host_path(profile.spill_folder)))
    if profile.storage.claim is not None and profile.storage.root is not None:
        claim = {"persistentVolumeClaim": {"claimName": profile.storage.claim}}
        found.append(({"name": "runs", "mountPath": profile.storage.root}, claim))
    if profile.cache_folder is not None and not profile.is_shared(profile.cache_folder):
        found.append(({"name": "cache", "mountPath": profile.cache_folder}, _host_path(profile.cache_folder)))
    for volume, one in profile.pools[name].volumes.items():
        mount: dict[str, Any] = {"name": volume, "mountPath": one.path}
        found.append((mount | ({"readOnly": True} if one.read_only else {}), _source(one)))
    return found


def _host_path(folder: str) -> dict[str, Any]:
    return {"hostPath": {"path": folder, "type": "DirectoryOrCreate"}}


def _source(volume: Volume) -> dict[str, Any]:
    if volume.claim is not None:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.secret is not None:
        return {"secret": {"secretName": volume.secret}}
    if volume.config_map is not None:
        return {"configMap": {"name": volume.config_map}}
    return _host_path(str(volume.host_path))


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
