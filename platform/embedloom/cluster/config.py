"""``cluster/cluster.yaml``: the one description of the machines and of what each stage may take of them.

Light: pydantic only, so ``plan`` and ``--dry-run`` answer without Ray.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from embedloom.cluster.checks import check_profile
from embedloom.config.base import FrozenConfig, read_yaml, validate
from embedloom.config.resources import ServeScaling, StageResources
from embedloom.errors import ConfigError

DEFAULT_CLUSTER_FILE = Path("cluster/cluster.yaml")


class RayVersion(FrozenConfig):
    """What every node runs."""

    version: str
    python: str
    image: str | None = None  # has embedloom installed, from cluster/requirements-cuda.lock


class AuthConfig(FrozenConfig):
    """Ray's own token authentication for dashboard, jobs and GCS."""

    mode: Literal["token", "disabled"] = "token"
    token_path: str = "~/.ray/auth_token"


class StorageConfig(FrozenConfig):
    """Where runs are kept when ``run.output_dir`` is a relative path."""

    root: str | None = None  # s3://..., gs://..., a folder all nodes see, or null: the working directory
    claim: str | None = None  # KubeRay: the PersistentVolumeClaim that is mounted at a root that is a folder
    # Launcher: shell command that mounts the root on a node, before its container starts; null: the image has it.
    mount_command: str | None = None

    @model_validator(mode="after")
    def _mounts_have_a_folder(self) -> "StorageConfig":
        if self.root is not None and "://" not in self.root and not self.root.startswith("/"):
            raise ValueError(f"root is {self.root!r}; allowed: an absolute folder, s3://... or gs://...")
        for key in ("claim", "mount_command"):
            if getattr(self, key) is not None and (self.root is None or "://" in self.root):
                raise ValueError(f"{key} is set, but root is {self.root!r}, no folder to mount it at")
        return self


class NodePool(FrozenConfig):
    """Machines of one kind."""

    instance: str | None = None
    cpus: int = Field(ge=1)
    gpus: int = Field(default=0, ge=0)
    accelerator: str | None = None
    memory_gib: float = Field(gt=0)
    min_nodes: int = Field(default=0, ge=0)
    max_nodes: int = Field(default=1, ge=1)
    spot: bool = False  # cheaper machines that may be taken away; every stage resumes
    labels: dict[str, str] = Field(default_factory=dict)  # Ray node labels

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "NodePool":
        if self.max_nodes < self.min_nodes:
            raise ValueError(f"max_nodes is {self.max_nodes}, below min_nodes {self.min_nodes}")
        return self


class Profile(FrozenConfig):
    """One place to run: this machine, or a cluster."""

    backend: Literal["local", "existing"] = "local"  # existing: join the cluster at `address`
    address: str | None = None
    region: str | None = None  # AWS region; makes `cluster render` write the launcher's file
    namespace: str = "default"  # KubeRay
    storage: StorageConfig = StorageConfig()
    logical_cpus: int | None = Field(default=None, ge=2)  # without pools: CPUs Ray schedules with
    gpus: int = Field(default=0, ge=0)  # without pools: GPUs of this machine
    object_store_mib: int = Field(default=512, ge=100)  # of every node
    spill_folder: str | None = None  # fast local disk of every node; null: Ray's session folder
    block_mib: float = Field(default=32.0, gt=0)  # Ray Data's target block size
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    pools: dict[str, NodePool] = Field(default_factory=dict)
    stages: StageResources = StageResources()
    streaming: bool = (
        False  # embed rows for mining while others are written; takes both stages' actors at once
    )
    serve: ServeScaling = ServeScaling()

    @model_validator(mode="after")
    def _stages_fit_the_machines(self) -> "Profile":
        if self.pools and (self.gpus or self.logical_cpus is not None):
            raise ValueError(
                "logical_cpus and gpus describe one machine; with pools, each pool states its own"
            )
        check_profile(self)
        return self

    @property
    def total_cpus(self) -> int | None:
        """CPUs at full size, or None where the profile does not say."""
        if self.pools:
            return sum(pool.cpus * pool.max_nodes for pool in self.pools.values())
        return self.logical_cpus

    @property
    def total_gpus(self) -> int:
        """GPUs at full size."""
        if not self.pools:
            return self.gpus
        return sum(pool.gpus * pool.max_nodes for pool in self.pools.values())

    def run_folder(self, folder: str) -> str:
        """Where a run's folder is: below the storage root, unless it has a place of its own."""
        if self.storage.root is None or "://" in folder or folder.startswith("/"):
            return folder
        return f"{self.storage.root.rstrip('/')}/{folder}"


class ClusterConfig(FrozenConfig):
    """The whole file."""

    version: Literal[1]
    ray: RayVersion
    auth: AuthConfig = AuthConfig()
    profiles: dict[str, Profile] = Field(min_length=1)

    def profile(self, name: str) -> Profile:
        """One profile by name.

        Raises:
            ConfigError: no such profile.
        """
        if name not in self.profiles:
            raise ConfigError(
                f"--profile: {name!r} is not in the cluster config; allowed: {', '.join(sorted(self.profiles))}"
            )
        return self.profiles[name]


def load_cluster(path: Path = DEFAULT_CLUSTER_FILE) -> ClusterConfig:
    """Read and check the cluster config.

    Raises:
        ConfigError: naming the file, the key, the value seen and what is allowed.
    """
    return validate(ClusterConfig, read_yaml(path), str(path))
