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


class RayVersion(FrozenConfig):
    """What every node runs."""

    version: str = Field(description="Ray's version on every node, exactly.")
    python: str = Field(description="Python's version on every node, such as '3.11'.")
    image: str | None = Field(
        default=None,
        description=(
            "Container image with embedloom installed, from cluster/requirements-cuda.lock. Null: none; "
            "KubeRay and the launcher need one."
        ),
    )


class AuthConfig(FrozenConfig):
    """Ray's own token authentication for dashboard, jobs and GCS."""

    mode: Literal["token", "disabled"] = Field(
        default="token",
        description=(
            "token: Ray's own token authentication for dashboard, jobs and GCS. disabled: whoever reaches "
            "the ports can run code."
        ),
    )
    token_path: str = Field(
        default="~/.ray/auth_token",
        description="File of the token; a local Ray makes it, readable by its owner only, if it is not there.",
    )


class StorageConfig(FrozenConfig):
    """Where runs are kept when ``run.output_dir`` is a relative path."""

    root: str | None = Field(
        default=None,
        description=(
            "Where runs are kept when run.output_dir is a relative path: s3://..., gs://..., or an "
            "absolute folder that all nodes see. Null: the working directory."
        ),
    )
    claim: str | None = Field(
        default=None,
        description=(
            "KubeRay: PersistentVolumeClaim that is mounted at a root that is a folder. Null: none is "
            "mounted."
        ),
    )
    mount_command: str | None = Field(
        default=None,
        description=(
            "Launcher: shell command that mounts the root on a node before its container starts. Null: "
            "the image has it."
        ),
    )

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

    instance: str | None = Field(
        default=None,
        description=(
            "Instance type of the cloud, such as p4de.24xlarge. Null: not stated; the launcher's file "
            "needs it."
        ),
    )
    cpus: int = Field(ge=1, description="CPUs of one node that Ray may use.")
    gpus: int = Field(default=0, ge=0, description="GPUs of one node.")
    accelerator: str | None = Field(
        default=None,
        description=(
            "Kind of GPU as Ray names it, such as A100; chooses the device in rates.yaml. Null: nodes "
            "without GPUs, or of any kind."
        ),
    )
    memory_gib: float = Field(gt=0, description="Memory of one node that Ray may use, in GiB.")
    min_nodes: int = Field(default=0, ge=0, description="Number of machines that are always there.")
    max_nodes: int = Field(default=1, ge=1, description="Largest number of machines that the pool grows to.")
    spot: bool = Field(
        default=False,
        description="Cheaper machines that may be taken away; every stage resumes. Not for the head.",
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels.")

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "NodePool":
        if self.max_nodes < self.min_nodes:
            raise ValueError(f"max_nodes is {self.max_nodes}, below min_nodes {self.min_nodes}")
        return self


class Profile(FrozenConfig):
    """One place to run: this machine, or a cluster."""

    backend: Literal["local", "existing"] = Field(
        default="local",
        description=(
            "local: a Ray that the command starts on this machine. existing: the running cluster at "
            "`address`."
        ),
    )
    address: str | None = Field(
        default=None, description="existing: address of the cluster, or auto. Null: this machine's own Ray."
    )
    region: str | None = Field(
        default=None,
        description="AWS region; makes `cluster render` write the launcher's file. Null: it does not.",
    )
    namespace: str = Field(default="default", description="Kubernetes namespace of the KubeRay files.")
    storage: StorageConfig = Field(default=StorageConfig(), description="Where runs are kept.")
    logical_cpus: int | None = Field(
        default=None,
        ge=2,
        description=(
            "Without pools: CPUs that Ray schedules with, which may be more than there are, since Ray "
            "only counts them. Null: those of the machine."
        ),
    )
    gpus: int = Field(default=0, ge=0, description="Without pools: GPUs of this machine.")
    object_store_mib: int = Field(
        default=512,
        ge=100,
        description="Shared memory of Ray's object store on every node, in MiB; must hold three blocks per actor.",
    )
    spill_folder: str | None = Field(
        default=None,
        description=(
            "Folder on a fast local disk of every node, to which the object store spills. Null: Ray's "
            "session folder."
        ),
    )
    block_mib: float = Field(default=32.0, gt=0, description="Target size of Ray Data's blocks, in MiB.")
    dashboard_port: int = Field(default=8265, ge=1, le=65535, description="Port of Ray's dashboard.")
    pools: dict[str, NodePool] = Field(
        default_factory=dict,
        description="Pool name -> machines of one kind; the pool named head holds the cluster's head.",
    )
    stages: StageResources = Field(
        default=StageResources(),
        description="What each stage may take. Stages run one after another, so each may take everything.",
    )
    streaming: bool = Field(
        default=False,
        description="Embed rows for mining while others are still written; takes both stages' actors at once.",
    )
    serve: ServeScaling = Field(
        default=ServeScaling(), description="How many replicas the endpoint has, and what each reserves."
    )

    @model_validator(mode="after")
    def _stages_fit_the_machines(self) -> "Profile":
        if self.pools and (self.gpus or self.logical_cpus is not None):
            raise ValueError(
                "logical_cpus and gpus describe one machine; with pools, each pool states its own"
            )
        check_profile(self)
        return self

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

    version: Literal[1] = Field(description="Version of the file's form.")
    ray: RayVersion = Field(
        description="Versions of Ray and Python, and the image, that all nodes have in common."
    )
    auth: AuthConfig = Field(default=AuthConfig(), description="Who may use the cluster.")
    profiles: dict[str, Profile] = Field(
        min_length=1,
        description="Profile name -> one place to run: this machine, or a cluster. `--profile` chooses one.",
    )

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


def load_cluster(path: Path) -> ClusterConfig:
    """Read and check the cluster config.

    Raises:
        ConfigError: naming the file, the key, the value seen and what is allowed.
    """
    return validate(ClusterConfig, read_yaml(path), str(path))
