"""What one stage may take of the machines; ``cluster/cluster.yaml`` holds one set per profile."""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig


class PoolConfig(FrozenConfig):
    """An actor pool of one stage: how many actors, and what each reserves."""

    min_actors: int = Field(default=1, ge=1, description="Actors that the stage needs at least.")
    max_actors: int = Field(
        default=1, ge=1, description="Actors that the stage starts at most, as resources allow."
    )
    cpus: float = Field(
        default=1.0, ge=0, description="Logical CPUs that one actor reserves; Ray only counts them."
    )
    gpus: float = Field(
        default=0.0, ge=0, description="GPUs that one actor reserves; below 1, several share one."
    )
    memory_gib: float = Field(
        default=0.0, ge=0, description="Memory that one actor reserves, in GiB; 0: none is reserved."
    )
    threads: int | None = Field(
        default=None, ge=1, description="Compute threads per actor. Null: one per reserved CPU."
    )
    tensor_parallel: int = Field(
        default=1, ge=1, description="GPUs that one LLM engine spans; gpus must be the same number."
    )

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

    groups: int = Field(
        default=1, ge=1, description="Training runs that are trained side by side, a worker group each."
    )
    workers: int = Field(
        default=1, ge=1, description="Workers of one group; the global batch is split over them."
    )
    cpus: float = Field(default=1.0, ge=0, description="Logical CPUs that one worker reserves.")
    gpus: int = Field(
        default=0,
        ge=0,
        le=1,
        description="GPUs that one worker reserves, 0 or 1: NCCL refuses two workers that share a GPU.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="Compute threads per worker. Null: one per reserved CPU."
    )
    bf16_weights: bool | None = Field(
        default=None,
        description=(
            "Whether weights and activations are bfloat16, with a float32 copy of the weights in the optimizer. Null: on "
            "GPUs, where the compute type is bfloat16; on CPU weights stay float32 and products are cast."
        ),
    )
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description=(
            "Type that gradients of bfloat16 weights are summed and reduced over workers in. bfloat16 halves the traffic "
            "(15 GB a reduction for 7.5 billion weights) and the buffers, and loses small gradients where many are summed."
        ),
    )

    @property
    def compute_threads(self) -> int:
        """Threads one worker computes with."""
        return self.threads or max(1, int(self.cpus))


LISTENER_VARIABLE = "EMBEDLOOM_LISTENER"  # holds a node's ListenerConfig as JSON


class ListenerConfig(FrozenConfig):
    """What a connection may cost before it is a request; of every process of a node that listens for HTTP."""

    max_header_kib: int = Field(
        default=32,
        ge=1,
        description="Largest request line and headers together, in KiB; beyond it the answer is 431.",
    )
    max_headers: int = Field(
        default=100, ge=1, description="Most headers of a request; beyond it the answer is 431."
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        description=(
            "Seconds from the first byte of a request to the end of its headers; beyond it the answer is 408."
        ),
    )
    max_client_connections: int | None = Field(
        default=512,
        ge=1,
        description=(
            "Most open connections by address; beyond it the answer is 429. A load balancer in front is "
            "one address. Null: not bounded."
        ),
    )

    @property
    def max_header_bytes(self) -> int:
        """The size in bytes."""
        return self.max_header_kib * 1024


# That Serve and Ray may take to end behind a drained endpoint: 4.3 on two free cores, up to 10 on busy ones.
_SHUTDOWN_SECONDS = 12


class ServeScaling(FrozenConfig):
    """Replicas of the endpoint."""

    min_replicas: int = Field(
        default=1,
        ge=0,
        description="Fewest replicas that stay up; 0 lets the endpoint sleep without traffic.",
    )
    max_replicas: int = Field(default=1, ge=1, description="Most replicas that the endpoint scales up to.")
    target_ongoing_requests: float = Field(
        default=16,
        gt=0,
        description="Requests per replica that Ray Serve scales towards; more than it add replicas.",
    )
    cpus: float = Field(default=1.0, ge=0, description="Logical CPUs that one replica reserves.")
    gpus: float = Field(
        default=0.0,
        ge=0,
        description=(
            "GPUs that one replica reserves; below 1, replicas share one and must fit its memory together."
        ),
    )
    threads: int | None = Field(
        default=None, ge=1, description="Compute threads per replica. Null: one per reserved CPU."
    )
    streams: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Batches computed at once, each by its share of the threads, in a replica without GPU whose "
            "engine is torch. Null: two, or one where there is but one thread."
        ),
    )
    max_ongoing_requests: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Most requests in one replica at a time. Null, with max_queued_requests: as the run config's "
            "`serving` has them, whose defaults suit up to four replicas."
        ),
    )
    max_queued_requests: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Most requests that wait for a replica, over the whole endpoint; at least max_replicas x "
            "max_ongoing_requests, because Ray counts a request as queued until a replica accepts it. "
            "Null, with max_ongoing_requests: as the run config's `serving` has them."
        ),
    )
    idle_to_zero_seconds: float | None = Field(
        default=None,
        gt=0,
        description=(
            "With min_replicas 0: seconds without traffic after which the last replica ends. Null: as any "
            "scaling down."
        ),
    )
    haproxy: bool = Field(
        default=False, description="HAProxy in place of Serve's Python proxy, on every node."
    )
    listener: ListenerConfig = Field(
        default=ListenerConfig(), description="Bounds of a connection before it is a request."
    )
    termination_grace_seconds: int = Field(
        default=30,
        ge=20,
        description=(
            "Seconds that Kubernetes, or whoever stops the endpoint, gives it to end (the pods' "
            "terminationGracePeriodSeconds); 12 of them are kept for shutting down, the rest lets "
            "requests end."
        ),
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "ServeScaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below min_replicas {self.min_replicas}")
        if self.idle_to_zero_seconds is not None and self.min_replicas > 0:
            raise ValueError(
                f"idle_to_zero_seconds is set, but min_replicas is {self.min_replicas}; only 0 can scale to zero"
            )
        if self.streams is not None and self.streams > self.compute_threads:
            raise ValueError(
                f"streams is {self.streams}, above {self.compute_threads} threads; each stream needs one"
            )
        if self.streams not in (None, 1) and self.gpus > 0:
            raise ValueError(
                f"streams is {self.streams}, but a replica with GPUs computes one batch at a time"
            )
        if (self.max_ongoing_requests is None) != (self.max_queued_requests is None):
            raise ValueError("max_ongoing_requests and max_queued_requests are set together, or neither is")
        ongoing, queued = self.max_ongoing_requests, self.max_queued_requests
        # Ray counts a request as queued until a replica accepts it, so a shorter queue rejects in a burst.
        if ongoing is not None and queued is not None and queued < self.max_replicas * ongoing:
            raise ValueError(
                f"max_queued_requests is {queued}, below {self.max_replicas} max_replicas x {ongoing} max_ongoing_requests"
            )
        if ongoing is not None and self.target_ongoing_requests > ongoing:
            raise ValueError(
                f"target_ongoing_requests is {self.target_ongoing_requests:g}, above max_ongoing_requests {ongoing}, "
                "so it would never scale up"
            )
        return self

    @property
    def drain_seconds(self) -> float:
        """How long requests in hand may go on when the endpoint is stopped; the rest of the grace is Serve's and Ray's."""
        return self.termination_grace_seconds - _SHUTDOWN_SECONDS

    def cut_off(self, request_seconds: float) -> str | None:
        """What a stop may do to a request that has so long; None where each can end."""
        if request_seconds <= self.drain_seconds:
            return None
        return (
            f"a stop waits {self.drain_seconds:g} s for requests (serve.termination_grace_seconds {self.termination_grace_seconds}"
            f" less {_SHUTDOWN_SECONDS} to shut down), and one may take {request_seconds:g} s: what is not done is answered 503"
        )

    @property
    def limits(self) -> dict[str, int]:
        """What this scaling states of the limits that ``serving`` has, by their names there."""
        values = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
        }
        return {key: value for key, value in values.items() if value is not None}

    @property
    def compute_threads(self) -> int:
        """Threads one replica computes with."""
        return self.threads or max(1, int(self.cpus))

    @property
    def compute_streams(self) -> int:
        """Batches one replica computes at once."""
        if self.gpus > 0:
            return 1
        return self.streams or min(2, self.compute_threads)


class StageResources(FrozenConfig):
    """What each stage may take; stages run one after another, so each may take everything."""

    synthesis: PoolConfig = Field(
        default=PoolConfig(),
        description="Actors of the LLM engines, for generators without a pool of their own.",
    )
    mining: PoolConfig = Field(default=PoolConfig(), description="Actors that embed and search for mining.")
    embedding: PoolConfig = Field(default=PoolConfig(), description="Actors that embed a corpus.")
    merging: PoolConfig = Field(
        default=PoolConfig(), description="Tasks that merge; each writes one weight file at a time."
    )
    evaluation: PoolConfig = Field(
        default=PoolConfig(), description="Actors that embed the texts of evaluation tasks."
    )
    training: TrainingGroup = Field(default=TrainingGroup(), description="The worker group of Ray Train.")
