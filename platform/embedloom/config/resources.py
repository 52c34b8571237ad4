"""What one stage may take of the machines; ``cluster/cluster.yaml`` holds one set per profile."""

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig


class PoolConfig(FrozenConfig):
    """An actor pool of one stage: how many actors, and what each reserves."""

    min_actors: int = Field(default=1, ge=1)
    max_actors: int = Field(default=1, ge=1)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    memory_gib: float = Field(default=0.0, ge=0)  # 0: not reserved
    threads: int | None = Field(default=None, ge=1)  # compute threads per actor; null: one per reserved CPU
    tensor_parallel: int = Field(default=1, ge=1)  # GPUs one LLM engine spans

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "PoolConfig":
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors is {self.max_actors}, below min_actors {self.min_actors}")
        if self.tensor_parallel > 1 and self.gpus != self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} needs gpus: {self.tensor_parallel}, found {self.gpus:g}"
            )
        return self

    @property
    def compute_threads(self) -> int:
        """Threads an actor computes with."""
        return self.threads or max(1, int(self.cpus))


class TrainingGroup(FrozenConfig):
    """The Ray Train worker group."""

    groups: int = Field(default=1, ge=1)  # runs trained side by side, a group each
    workers: int = Field(default=1, ge=1)  # of one group
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0, le=1)
    threads: int | None = Field(default=None, ge=1)

    @property
    def compute_threads(self) -> int:
        """Threads one worker computes with."""
        return self.threads or max(1, int(self.cpus))


class ServeScaling(FrozenConfig):
    """Replicas of the endpoint."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=16, gt=0)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "ServeScaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below min_replicas {self.min_replicas}")
        return self

    @property
    def compute_threads(self) -> int:
        """Threads one replica computes with."""
        return self.threads or max(1, int(self.cpus))


class StageResources(FrozenConfig):
    """What each stage may take; stages run one after another, so each may take everything."""

    synthesis: PoolConfig = PoolConfig()
    mining: PoolConfig = PoolConfig()
    embedding: PoolConfig = PoolConfig()
    merging: PoolConfig = PoolConfig()  # an actor: one task, which writes one weight file at a time
    evaluation: PoolConfig = PoolConfig()
    training: TrainingGroup = TrainingGroup()
