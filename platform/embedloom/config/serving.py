"""The section about the endpoint; scaling per profile stands in cluster/cluster.yaml."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.instructions import Side

ServingEngine = Literal["torch", "vllm"]
Truncate = Literal["none", "start", "end"]


class ModelAlias(FrozenConfig):
    """Another name of the served model, for clients that can send nothing but a model's name.

    What it states is the default of requests to that name; what a request says itself holds.
    """

    side: Side | None = None  # null: as without the alias, a document
    task: str | None = None  # as a request's ``task``
    instruction: str | None = Field(default=None, min_length=1, max_length=4096)
    truncate: Truncate | None = None


class ServingConfig(FrozenConfig):
    """What is served where, how requests are batched, and what one request may ask for."""

    model: str = "merged"
    require_gate: bool = True  # serve only a model whose gate.json says that these very weights passed
    # The gate's verdict on a model that embedloom did not make; null: the gate.json beside the weights.
    verdict: str | None = Field(default=None, exclude_if=lambda value: value is None)
    served_name: str | None = None  # what clients put into ``model``; null: the run's name
    # Other names of it, each with defaults of its own; listed in /v1/models.
    models: dict[str, ModelAlias] = Field(default_factory=dict)
    # What happens to too long a text where a request does not say; null: as each dialect has it (embeddings are refused,
    # documents to rerank cut at their end). Whatever is cut is told in a header and in the usage.
    truncate: Truncate | None = None
    # Token ids that this model's tokenizer cannot have made: refuse says so, accept takes them for this model's own.
    token_ids: Literal["accept", "refuse"] = "refuse"
    # The task type, or name of a trained task, that texts without a task are taken for; the merged model is exported,
    # evaluated and judged with it. null: what most of the trained queries were.
    default_task: str | None = Field(default=None, min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    route_prefix: str = Field(default="/", pattern=r"^/.*$")
    # float32, as embedding.compute_dtype, so that vectors agree. int8: linear layers in 8 bits on VNNI, for CPU; with
    # require_gate only where the run's held-out queries lose at most 0.005 nDCG@10 by it.
    compute_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "float32"
    # torch: our encoder. vllm: its pooling runner, for GPUs; a replica whose golden vectors differ does not start.
    engine: ServingEngine = "torch"
    # A vectors artefact to search, and the texts it was embedded from (null: those the artefact or its run holds).
    corpus: str | None = None
    documents: str | None = None

    # Limits of one request: OpenAI's own are 2,048 items and 300,000 tokens.
    max_body_mib: float = Field(default=16.0, gt=0)
    max_items: int = Field(default=2048, ge=1)
    max_item_characters: int = Field(
        default=262_144, ge=1
    )  # tokenising a text costs time before it can be refused
    max_request_tokens: int = Field(default=300_000, ge=64)
    request_timeout_seconds: float = Field(default=60.0, gt=0)

    # Batches and the queue of one replica. A request of at most ``query_lane_tokens`` waits in the query lane, any
    # other in the bulk lane; while both wait, the query lane gets ``query_lane_share`` of the tokens computed.
    max_batch_tokens: int = Field(default=4096, ge=64)
    batch_wait_seconds: float = Field(default=0.005, ge=0)
    query_lane_tokens: int = Field(default=512, ge=1)
    query_lane_share: float = Field(default=0.5, gt=0, lt=1)
    max_queued_tokens: int = Field(
        default=600_000, ge=64
    )  # of each lane; beyond it a request is answered 429
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=256, ge=1)

    # API keys as YAML, ``name: {sha256: ..., requests_per_minute: ..., tokens_per_minute: ...}``, in a file or an
    # environment variable; with neither, every client is served.
    keys_file: str | None = None
    keys_variable: str | None = None
    allowed_origins: tuple[str, ...] = ()  # web pages elsewhere that a browser may call from; none by default
    # On loopback without keys, the endpoint answers only to names of this machine, and to these (a local proxy's).
    allowed_hosts: tuple[str, ...] = ()
    request_log: Literal["none", "facts", "texts"] = "facts"  # facts: one line a request, without its texts

    @model_validator(mode="after")
    def _queue_is_deep_enough(self) -> "ServingConfig":
        # Ray counts a request as queued until a replica accepts it, so a shorter queue rejects in a burst.
        if self.max_queued_requests < self.max_ongoing_requests:
            raise ValueError(
                f"max_queued_requests is {self.max_queued_requests}, below max_ongoing_requests {self.max_ongoing_requests}"
            )
        if self.max_queued_tokens < self.max_request_tokens:
            raise ValueError(
                f"max_queued_tokens is {self.max_queued_tokens}, below max_request_tokens "
                f"{self.max_request_tokens}, so the largest request would never be admitted"
            )
        return self

    @field_validator("models")
    @classmethod
    def _aliases_are_names(cls, value: dict[str, ModelAlias]) -> dict[str, ModelAlias]:
        for name in value:
            if (
                not name.strip()
                or name != name.strip()
                or not name.isprintable()
                or "//" in name
                or name.endswith("/")
            ):
                raise ValueError(
                    f"{name!r} is not a name; allowed: printable text without white space around it"
                )
        return value

    @model_validator(mode="after")
    def _keys_come_from_one_place(self) -> "ServingConfig":
        if self.keys_file is not None and self.keys_variable is not None:
            raise ValueError("keys_file and keys_variable are both set; API keys come from one of them")
        if self.documents is not None and self.corpus is None:
            raise ValueError("documents is set without corpus, the vectors that are searched")
        return self

    @model_validator(mode="after")
    def _engine_has_the_dtype(self) -> "ServingConfig":
        if self.compute_dtype == "int8" and self.engine != "torch":
            raise ValueError(
                f"compute_dtype is 'int8', which engine {self.engine!r} has not; allowed: engine 'torch'"
            )
        return self

    @field_validator("allowed_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            scheme, separator, rest = origin.partition("://")
            if scheme not in ("http", "https") or not separator or not rest or "/" in rest or "*" in rest:
                raise ValueError(
                    f"{origin!r} is not an origin; allowed: scheme and host, such as https://search.example.org"
                )
        return value
