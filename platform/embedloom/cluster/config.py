"""``cluster/cluster.yaml``: the one description of the machines and of what each stage may take of them.

Light: pydantic only, so ``plan`` and ``--dry-run`` answer without Ray.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig, read_yaml, validate
from embedloom.config.resources import PoolConfig, ServeScaling, StageResources
from embedloom.errors import ConfigError

DEFAULT_CLUSTER_FILE = Path("cluster/cluster.yaml")


class RayVersion(FrozenConfig):
    """What every node runs."""

    version: str
    python: str
    image: str | None = None


class AuthConfig(FrozenConfig):
    """Ray's own token authentication for dashboard, jobs and GCS."""

    mode: Literal["token", "disabled"] = "token"
    token_path: str = "~/.ray/auth_token"


class NodePool(FrozenConfig):
    """Machines of one kind."""

    instance: str | None = None
    cpus: int = Field(ge=1)
    gpus: int = Field(default=0, ge=0)
    accelerator: str | None = None
    memory_gib: float = Field(gt=0)
    min_nodes: int = Field(default=0, ge=0)
    max_nodes: int = Field(default=1, ge=1)

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
    logical_cpus: int | None = Field(default=None, ge=2)  # local only: CPUs Ray schedules with
    object_store_mib: int = Field(default=512, ge=100)
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    pools: dict[str, NodePool] = Field(default_factory=dict)
    stages: StageResources = StageResources()
    serve: ServeScaling = ServeScaling()

    @model_validator(mode="after")
    def _stages_fit_the_machines(self) -> "Profile":
        cpus = self.total_cpus
        gpus = self.total_gpus
        for name in ("synthesis", "mining", "embedding", "evaluation"):
            pool: PoolConfig = getattr(self.stages, name)
            # One CPU stays free: a pool that holds every CPU starves the tasks that read for it, silently.
            if cpus is not None and pool.min_actors * pool.cpus + 1 > cpus:
                raise ValueError(
                    f"stages.{name}: {pool.min_actors} actors x {pool.cpus:g} CPUs + 1 for reading exceed {cpus} CPUs"
                )
            if pool.min_actors * pool.gpus > gpus:
                raise ValueError(
                    f"stages.{name}: {pool.min_actors} actors x {pool.gpus:g} GPUs exceed {gpus} GPUs"
                )
        group = self.stages.training
        size = f"stages.training: {group.groups} groups x {group.workers} workers"
        if group.groups * group.workers * group.gpus > gpus:
            raise ValueError(f"{size} x {group.gpus:g} GPUs exceed {gpus} GPUs")
        if cpus is not None and group.groups * group.workers * group.cpus > cpus:
            raise ValueError(f"{size} x {group.cpus:g} CPUs exceed {cpus} CPUs")
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
        return sum(pool.gpus * pool.max_nodes for pool in self.pools.values())


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
