"""What would keep a profile's pods from starting, or a run in them from its models; pure, no Ray and no Kubernetes.

What only the cluster knows (whether a Secret or a claim is there, which taints its nodes have) is listed as a need, with the
command that makes it or shows it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from embedloom.cluster.manifests import check_pools
from embedloom.config.cluster import (
    EFA_HUGEPAGES_MIB,
    HEAD_POOL,
    ClusterConfig,
    NodePool,
    Profile,
    image_reference,
)
from embedloom.config.run import RunConfig
from embedloom.errors import ConfigError

HUB_TOKEN = "HF_TOKEN"
GPU_TAINT = ("nvidia.com/gpu", "NoSchedule")  # what EKS, GKE and the GPU operator put on nodes with GPUs
AUTOSCALER_CPUS = 0.5  # KubeRay's own container beside the head's
_KUBELET_CPUS = 1.0  # kubelet, network and device plugins
_USABLE_MEMORY = 0.95  # firmware takes 1.5 %; EKS keeps 255 MiB and 11 MiB for each of up to 737 pods

# Models and data sets that the Hugging Face hub gives to those who accepted a licence, as of August 2026. Others may be gated
# too: the hub alone knows.
GATED = (
    "meta-llama/*",
    "google/gemma-*",
    "google/embeddinggemma-*",
    "mistralai/Mixtral-8x22B-*",
    "mistralai/Mistral-Large-*",
    "nvidia/Nemotron-CC-*",
)


@dataclass(frozen=True, slots=True)
class Instance:
    """What a node of a type has, as EC2 states it."""

    cpus: int
    memory_gib: int
    gpus: int = 0
    efa: int = 0


# https://docs.aws.amazon.com/ec2/latest/instancetypes: vCPUs, memory, GPUs, and EFA interfaces (one a network card).
INSTANCES = {
    "m6i.8xlarge": Instance(32, 128),
    "m6i.16xlarge": Instance(64, 256),
    "m6i.32xlarge": Instance(128, 512, efa=1),
    "g5.xlarge": Instance(4, 16, gpus=1),
    "g5.48xlarge": Instance(192, 768, gpus=8, efa=1),
    "p4d.24xlarge": Instance(96, 1152, gpus=8, efa=4),
    "p4de.24xlarge": Instance(96, 1152, gpus=8, efa=4),
    "p5.48xlarge": Instance(192, 2048, gpus=8, efa=32),
    "p5e.48xlarge": Instance(192, 2048, gpus=8, efa=32),
    "p5en.48xlarge": Instance(192, 2048, gpus=8, efa=16),
}


@dataclass(frozen=True, slots=True)
class PodReport:
    """What was found.

    Attributes:
        problems: what would keep pods from starting, or the run from its models; a sentence each, the key first.
        needs: what must be there and cannot be seen from here.
    """

    problems: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """All of it, a line each."""
        return [*(f"problem: {one}" for one in self.problems), *(f"needed: {one}" for one in self.needs)]


def check_pods(cluster: ClusterConfig, profile_name: str, run: RunConfig | None = None) -> PodReport:
    """Look for what would keep a profile's pods from starting.

    Args:
        cluster: the cluster config.
        profile_name: one of its profiles, with pools.
        run: a run config whose models the pods must be able to fetch; None asks for none.

    Raises:
        ConfigError: no such profile, or one that makes no pods.
    """
    profile = cluster.profile(profile_name)
    if not profile.pools:
        raise ConfigError(f"--pods: profiles.{profile_name} has no pools, so it makes no pods")
    check_pools(profile, profile_name)
    problems = [*_image_problems(cluster.ray.image), *_storage_problems(profile)]
    for name, pool in profile.pools.items():
        problems += [*_memory_problems(profile, name)]
        problems += [f"pools.{name}.{one}" for one in _pool_problems(name, pool)]
    if run is not None:
        problems += _gated_problems(profile, run)
    return PodReport(tuple(problems), tuple(_needs(profile)))


def _image_problems(image: str | None) -> Iterator[str]:
    if image is None:
        yield "ray.image: missing; every pod needs one"
        return
    found = image_reference(image)
    if found.registry is None:
        yield f"ray.image: {image!r} names no registry, so nodes ask Docker Hub for it; allowed: registry/name:tag"
    if found.digest is None and found.tag in (None, "latest"):
        yield (
            f"ray.image: {image!r} has no tag but the moving one, so nodes may run different images; allowed: a tag of "
            "its own, or @sha256:..."
        )


def _storage_problems(profile: Profile) -> Iterator[str]:
    storage = profile.storage
    if storage.root is not None and "://" not in storage.root and storage.claim is None:
        yield (
            f"storage.claim: missing, so {storage.root!r} is a folder of each container's own; allowed: a claim that all "
            "nodes can mount, or a root of s3:// or gs://"
        )


def _memory_problems(profile: Profile, name: str) -> Iterator[str]:
    store, shared = profile.store_bytes(name) / 2**20, profile.shm_mib(name)
    if shared <= store:
        yield (
            f"shared_memory_mib: {shared}, not above the object store of {store:.0f} on pools.{name}, which takes it all, and "
            "NCCL and vLLM need some; allowed: null, or more"
        )


def _pool_problems(name: str, pool: NodePool) -> Iterator[str]:
    if pool.gpus and not any(one.covers(*GPU_TAINT) for one in pool.tolerations):
        yield (
            f"tolerations: none for {GPU_TAINT[0]}:{GPU_TAINT[1]}, which nodes with GPUs usually have; allowed: "
            f"[{{key: {GPU_TAINT[0]}}}]"
        )
    if pool.fabric == "efa" and not pool.hugepages:
        yield f"hugepages_mib: 0 with fabric efa, whose provider takes pages of 2 MiB; allowed: null ({EFA_HUGEPAGES_MIB}) or more"
    yield from _instance_problems(name, pool)


def _instance_problems(name: str, pool: NodePool) -> Iterator[str]:
    """Whether the pod fits a node of its type, beside what Kubernetes keeps."""
    node = INSTANCES.get(pool.instance or "")
    if node is None:
        return
    beside = _KUBELET_CPUS + (AUTOSCALER_CPUS if name == HEAD_POOL else 0.0)
    if pool.cpus + beside > node.cpus:
        yield (
            f"cpus: {pool.cpus}, but {pool.instance} has {node.cpus}, of which Kubernetes"
            f"{' and the autoscaler' if name == HEAD_POOL else ''} keep {beside:g}; the pod would wait for ever"
        )
    most = node.memory_gib * _USABLE_MEMORY - pool.hugepages / 1024
    if pool.memory_gib > most:
        kept = f" and {pool.hugepages} MiB of large pages" if pool.hugepages else ""
        yield (
            f"memory_gib: {pool.memory_gib:g}, but of {pool.instance}'s {node.memory_gib} pods get at most {most:.0f} "
            f"(95 % less what Kubernetes keeps{kept}); the pod would wait for ever"
        )
    if pool.gpus > node.gpus:
        yield f"gpus: {pool.gpus}, but {pool.instance} has {node.gpus}"
    if pool.fabric == "efa" and pool.fabric_devices > node.efa:
        yield f"fabric_devices: {pool.fabric_devices}, but {pool.instance} has {node.efa} EFA interfaces"


def _gated_problems(profile: Profile, run: RunConfig) -> Iterator[str]:
    without = [
        name
        for name, pool in profile.pools.items()
        if HUB_TOKEN not in pool.secrets and HUB_TOKEN not in pool.env
    ]
    if not without:
        return
    for path, name in gated(run.model_dump(mode="json")):
        yield (
            f"pools.{'/'.join(without)}.secrets: no {HUB_TOKEN}, but {path} is {name!r}, which the hub gives to those who "
            "accepted its licence"
        )


def gated(content: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Names of gated models and data sets in a run config, each with the key that it stands at."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from gated(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from gated(value, f"{path}.{number}")
    elif isinstance(content, str) and any(fnmatchcase(content, one) for one in GATED):
        yield path, content


def _needs(profile: Profile) -> Iterator[str]:
    """What must be in the cluster, with the command that makes it or shows it."""
    space = f"--namespace {profile.namespace}"
    used = {variable for pool in profile.pools.values() for variable in pool.secrets}
    for variable in sorted(used):
        one = profile.secrets[variable]
        yield (
            f"Secret {one.secret} with key {one.key}, for {variable}: kubectl create secret generic {one.secret} {space} "
            f"--from-literal={one.key}=..."
        )
    for name in sorted({name for pool in profile.pools.values() for name in pool.image_pull_secrets}):
        yield f"Secret {name}, to pull the image: kubectl create secret docker-registry {name} {space} --docker-server=..."
    for claim in _claims(profile):
        yield f"PersistentVolumeClaim {claim}, ReadWriteMany: kubectl get pvc {claim} {space}"
    yield from _node_needs(profile)


def _claims(profile: Profile) -> list[str]:
    volumes = [volume for pool in profile.pools.values() for volume in pool.volumes.values()]
    found = {profile.storage.claim, *(volume.claim for volume in volumes)}
    return sorted(claim for claim in found if claim is not None)


def _node_needs(profile: Profile) -> Iterator[str]:
    for name, pool in profile.pools.items():
        if pool.gpus:
            yield f"pools.{name}: {pool.gpus} nvidia.com/gpu a node, by NVIDIA's device plugin; driver 580 or newer (CUDA 13)"
        for device, count in pool.fabric_request.items():
            yield f"pools.{name}: {count} {device} a node, by its device plugin"
        if pool.hugepages:
            yield f"pools.{name}: {pool.hugepages} MiB of hugepages-2Mi a node, set aside when it boots"
        if pool.instance is not None and pool.instance not in INSTANCES:
            yield f"pools.{name}: room for the pod on {pool.instance}, a type that this check does not know"
    for key in ("spill_folder", "cache_folder"):
        folder = getattr(profile, key)
        if folder is not None and not profile.is_shared(folder):
            yield f"{key}: a disk mounted at or above {folder} on every node, or it lies on the root disk"
