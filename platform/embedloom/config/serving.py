"""Section ``serving`` and the arguments of the endpoint's application; scaling per profile stands in ``cluster/cluster.yaml``."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.cluster import PoolConfig, ServeScaling
from embedloom.config.embedding import ComputeType, computed_dtype
from embedloom.core.prompting import Side

ServingEngine = Literal["torch", "vllm"]
Truncate = Literal["none", "start", "end"]


class ModelAlias(FrozenConfig):
    """Another name of the served model, for clients that can send nothing but a model's name.

    What it states is the default of requests to that name; what a request says itself holds.
    """

    side: Side | None = Field(
        default=None,
        description="query or document, for requests that do not state it. Null: document, as without the alias.",
    )
    task: str | None = Field(
        default=None,
        description="Task type or named task, for requests that state none. Null: the model's default task.",
    )
    instruction: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Instruction, for requests that state none. Null: that of the task.",
    )
    truncate: Truncate | None = Field(
        default=None,
        description=(
            "What happens to texts over the limit, for requests that do not state it: none refuses them, "
            "start and end cut that end off. Null: serving.truncate."
        ),
    )


class ServedName(ModelAlias):
    """A name beside the served one: another name of that model, or, with ``model``, that of a model of its own."""

    model: str | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description=(
            "A further model behind the endpoint, with replicas of its own: as serving.model. Null: another name of the served one."
        ),
    )
    aliases: dict[str, ModelAlias] = Field(
        default_factory=dict,
        exclude_if=lambda value: not value,
        description="With model: its other names, as serving.models has those of the served one.",
    )
    keys: tuple[str, ...] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="With model: names of the API keys that may use it; to others it is not there. Null: every key.",
    )
    require_gate: bool | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="With model: whether it must have passed the gate. Null: as serving.require_gate.",
    )
    scaling: ServeScaling | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="With model: its replicas and what each reserves. Null: as the profile's serve section.",
    )

    @model_validator(mode="after")
    def _a_model_has_no_defaults(self) -> "ServedName":
        alias = [name for name in ModelAlias.model_fields if getattr(self, name) is not None]
        own = [name for name in ("aliases", "keys", "scaling", "require_gate") if getattr(self, name)]
        if self.model is not None and alias:
            raise ValueError(
                f"{alias[0]} goes with another name of a model; with model, give that name in aliases"
            )
        if self.model is None and own:
            raise ValueError(f"{own[0]} goes with model, which is not given")
        return self

    @property
    def defaults(self) -> ModelAlias:
        """What holds for requests to this name."""
        return ModelAlias(
            side=self.side, task=self.task, instruction=self.instruction, truncate=self.truncate
        )


class BatchesConfig(FrozenConfig):
    """OpenAI's Batch API: files of requests that are answered within a day, by actors of their own."""

    folder: str = Field(
        description=(
            "Folder or object store of files, batches and their results; of one endpoint only, and seen by every node. Batches that "
            "were not done when the endpoint ended go on when it is started again."
        )
    )
    max_file_mib: float = Field(
        default=200.0, gt=0, description="Largest uploaded file, in MiB; 200 MB is OpenAI's own limit."
    )
    max_lines: int = Field(
        default=50_000, ge=1, description="Most requests of one batch; 50,000 is OpenAI's own limit."
    )
    max_key_gib: float = Field(
        default=10.0, gt=0, description="Most that the files of one key take, results included, in GiB."
    )
    max_open: int = Field(
        default=16, ge=1, description="Most batches of one key that wait or are computed at a time."
    )
    file_days: float = Field(
        default=30.0,
        gt=0,
        description="Days after which files are deleted that state no expires_after, and the longest that one may state.",
    )
    pool: PoolConfig | None = Field(
        default=None,
        description="Actors that compute a batch, beside the replicas. Null: one, which reserves what a replica does.",
    )


SearchMode = Literal["dense", "lexical", "hybrid"]
SEARCH_MODES: tuple[SearchMode, ...] = ("dense", "lexical", "hybrid")


class SearchConfig(FrozenConfig):
    """How ``/v1/search`` finds documents where a request does not say it, and how hybrid searches fuse two rankings."""

    mode: SearchMode = Field(
        default="dense",
        description=(
            "dense: by vectors. lexical: by words (BM25), without the model. hybrid: both, fused. The last two need a corpus "
            "that was embedded with embedding.lexical; requests may ask for any that there is."
        ),
    )
    fusion: Literal["weighted_sum", "reciprocal_rank"] = Field(
        default="weighted_sum",
        description=(
            "hybrid: weighted_sum adds up scaled scores. reciprocal_rank adds up 1 / (rank_constant + rank), and asks for no "
            "weight."
        ),
    )
    weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description=(
            "weighted_sum: share of the dense scores. Null: the one that was tuned on the run's dev queries when the corpus was "
            "embedded, else 0.75."
        ),
    )
    rank_constant: float = Field(
        default=60.0, ge=0, description="reciprocal_rank: the larger, the less the first places tell."
    )
    depth: int = Field(
        default=100,
        ge=1,
        le=1000,
        description="hybrid: documents that each ranking contributes, or top_k if that is more.",
    )

    @model_validator(mode="after")
    def _keys_fit_fusion(self) -> "SearchConfig":
        if self.fusion == "reciprocal_rank" and self.weight is not None:
            raise ValueError(
                "weight is set with fusion reciprocal_rank, which has none; allowed: fusion weighted_sum"
            )
        if self.fusion == "weighted_sum" and "rank_constant" in self.model_fields_set:
            raise ValueError(
                "rank_constant is set with fusion weighted_sum, which does not read it; allowed: fusion reciprocal_rank"
            )
        return self


class TracesConfig(FrozenConfig):
    """OpenTelemetry traces of requests; needs the extra `traces`."""

    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://.+$",
        description=(
            "Where spans are sent by OTLP over HTTP, such as http://collector:4318/v1/traces. Null: as OpenTelemetry's own variables "
            "(OTEL_EXPORTER_OTLP_ENDPOINT) say, else this machine's port 4318."
        ),
    )
    share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of the requests that are traced, of those whose traceparent does not decide it.",
    )
    service_name: str = Field(
        default="embedloom", min_length=1, description="What the endpoint is called in traces."
    )


class ServingConfig(FrozenConfig):
    """What is served where, how requests are batched, and what one request may ask for."""

    model: str = Field(
        default="merged", description="'merged', 'base', the name of a training run, or a model folder."
    )
    require_gate: bool = Field(
        default=True, description="Serve only a model whose gate.json says that exactly these weights passed."
    )
    verdict: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "The gate's verdict on a model that embedloom did not make. Null: the gate.json beside the "
            "weights."
        ),
    )
    trust_remote_code: bool = Field(
        default=False,
        exclude_if=lambda value: value is False,
        description=(
            "Run code that lies beside the model's weights (auto_map, module classes). Only for models whose "
            "authors you trust."
        ),
    )
    served_name: str | None = Field(
        default=None, description="What clients put into `model`. Null: the run's name."
    )
    models: dict[str, ServedName] = Field(
        default_factory=dict,
        description=(
            "Other names of the model, each with defaults of its own, for clients that can send nothing "
            "but a model's name; and further models behind the same endpoint. Listed in /v1/models."
        ),
    )
    model_keys: tuple[str, ...] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Names of the API keys that may use serving.model. Null: every key.",
    )
    truncate: Truncate | None = Field(
        default=None,
        description=(
            "What happens to a text over the limit where a request does not state it: none, start or end "
            "(which end is cut off). Null: as each API dialect does it: embeddings are refused, documents "
            "to rerank are cut at their end. What is cut is told in a header and in the usage."
        ),
    )
    token_ids: Literal["accept", "refuse"] = Field(
        default="refuse",
        description=(
            "Token ids that this model's tokenizer cannot have made: refuse answers 400, accept takes "
            "them for this model's own."
        ),
    )
    default_task: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Task type, or name of a trained task, that texts without a task are taken for; the merged "
            "model is exported, evaluated and judged with it. Null: what most of the trained queries "
            "were."
        ),
    )
    host: str = Field(
        default="127.0.0.1",
        description=(
            "Address to listen on. The default is reachable from this machine only; 0.0.0.0 is every "
            "interface."
        ),
    )
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port to listen on.")
    route_prefix: str = Field(default="/", pattern=r"^/.*$", description="Path below which all routes lie.")
    compute_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description=(
            "Number type of the computation. auto: as embedding.compute_dtype, so that vectors agree: bfloat16 in replicas "
            "with GPUs, float32 on CPUs. "
            "int8: linear layers in 8 bits, for CPUs with AVX-512 VNNI; with require_gate only where the "
            "run's held-out queries lose at most 0.005 nDCG@10 by it."
        ),
    )
    engine: ServingEngine = Field(
        default="torch",
        description=(
            "torch: our encoder. vllm: its pooling runner, for GPUs; a replica whose golden vectors "
            "differ does not start."
        ),
    )
    corpus: str | None = Field(
        default=None, description="A vectors artefact that /v1/search searches. Null: no search."
    )
    documents: str | None = Field(
        default=None,
        description=(
            "The texts that the corpus was embedded from. Null: those that the vectors, or their run, hold."
        ),
    )
    search: SearchConfig = Field(
        default=SearchConfig(),
        exclude_if=lambda value: value == SearchConfig(),
        description="How the corpus is searched.",
    )
    reranker: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "A cross-encoder with one label that answers /v1/rerank, and searches that ask for it, in replicas of its own: a "
            "folder that every node sees, or a Hugging Face id. Null: the reranker of the run, where it has one that passed "
            "its gate; else the embedding model's similarity answers."
        ),
    )
    rerank_top: int = Field(
        default=50,
        ge=1,
        le=1000,
        exclude_if=lambda value: value == 50,
        description=(
            "How many of the best documents a search that asks for the reranker orders anew, at least; with top_k above it, "
            "as many as top_k."
        ),
    )

    max_body_mib: float = Field(
        default=16.0, gt=0, description="Largest request body, in MiB, also after decompression."
    )
    max_items: int = Field(
        default=2048, ge=1, description="Most texts of one request; 2,048 is OpenAI's own limit."
    )
    max_item_characters: int = Field(
        default=262_144,
        ge=1,
        description="Most characters of one text: tokenising costs time before a text can be refused by tokens.",
    )
    max_request_tokens: int = Field(
        default=300_000, ge=64, description="Most tokens of one request; 300,000 is OpenAI's own limit."
    )
    request_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        description=(
            "Seconds after which a request is answered 504. What the encoder could not answer in that "
            "time is answered 429 at once."
        ),
    )

    max_batch_tokens: int = Field(
        default=4096,
        ge=64,
        description="Most tokens computed in one batch. More is more throughput and longer waits.",
    )
    batch_wait_seconds: float = Field(
        default=0.005, ge=0, description="Seconds that a batch which is not full waits for more requests."
    )
    query_lane_tokens: int = Field(
        default=512,
        ge=1,
        description="Requests of at most this many tokens wait in the query lane, all others in the bulk lane.",
    )
    query_lane_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description=(
            "Share of the computed tokens that the query lane gets while both lanes have requests waiting."
        ),
    )
    max_queued_tokens: int = Field(
        default=600_000,
        ge=64,
        description="Most tokens waiting in each lane of a replica; beyond it a request is answered 429.",
    )
    gateways: int = Field(
        default=1,
        ge=1,
        le=64,
        exclude_if=lambda value: value == 1,
        description=(
            "Processes that answer HTTP, each with an event loop of its own. 1, with a profile of one replica: the encoder answers "
            "itself. Behind Serve's proxy more than one needs serve.haproxy in the profile."
        ),
    )
    max_ongoing_requests: int = Field(
        default=64,
        ge=1,
        description="Most requests in one replica at a time; see also the profile's serve section.",
    )
    max_queued_requests: int = Field(
        default=256,
        ge=1,
        description=(
            "Most requests that wait for a replica, over the whole endpoint; not below "
            "max_ongoing_requests, because Ray counts a request as queued until a replica accepts it."
        ),
    )

    keys_file: str | None = Field(
        default=None,
        description=(
            "File of API keys, YAML: NAME: {sha256: ..., requests_per_minute: ..., tokens_per_minute: "
            "...}. Null, with keys_variable null too: every client is served."
        ),
    )
    keys_variable: str | None = Field(
        default=None,
        description="Environment variable that holds API keys as keys_file does. Null: see keys_file.",
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(), description="Web pages elsewhere that a browser may call from, as scheme and host."
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description=(
            "On loopback without keys, the endpoint answers only to names of this machine and to these "
            "(for example a local proxy's)."
        ),
    )
    request_log: Literal["none", "facts", "texts"] = Field(
        default="facts", description="none, facts (one line per request, without its texts), or texts."
    )

    traces: TracesConfig | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Traces of requests, exported by OpenTelemetry. Null: none.",
    )
    batches: BatchesConfig | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="OpenAI's /v1/files and /v1/batches for embeddings. Null: no such routes.",
    )

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
    def _names_are_names(cls, value: dict[str, ServedName]) -> dict[str, ServedName]:
        all_names = [*value, *(alias for served in value.values() for alias in served.aliases)]
        for name in all_names:
            if all_names.count(name) > 1:
                raise ValueError(f"{name!r} names two models; allowed: each name once")
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
        if self.search != SearchConfig() and self.corpus is None:
            raise ValueError("search is set without corpus, the vectors that are searched")
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


# What the endpoint's application is given; light, so that a Serve config can be checked without the engines.


class ApplicationArgs(FrozenConfig):
    """Arguments of ``build``; also the ``args`` of serve/config.yaml."""

    model_folder: str = Field(
        description=(
            "Model that is served: a folder that every node sees, or a name by which each node finds it: a Hugging Face id, "
            "a name of the registry, a .gguf file."
        )
    )
    model_release: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "With a model by name: commit of the Hugging Face id, or version of the package that ships it, which all "
            "replicas must have. Null: any."
        ),
    )
    served_name: str = Field(min_length=1, description="What clients put into `model`.")
    model_id: str | None = Field(
        default=None,
        description="What identifies the weights, such as their artefact's fingerprint. Null: the served name.",
    )
    on_loopback: bool = Field(
        default=False, description="Whether only this machine can connect, where that is known."
    )
    listener: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "Unix socket through which the command that started the endpoint lends its listening socket. "
            "Null: Serve listens."
        ),
    )
    serving: ServingConfig = Field(default=ServingConfig(), description="As the section of a run config.")
    scaling: ServeScaling = Field(default=ServeScaling(), description="As `serve` of a cluster profile.")
    reranker_scaling: ServeScaling | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="As `serve_reranker` of a cluster profile. Null: as scaling.",
    )
    search_scaling: ServeScaling | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="As `serve_search` of a cluster profile. Null: the corpus is searched by what answers HTTP.",
    )

    @property
    def further(self) -> dict[str, "ApplicationArgs"]:
        """The other models of the endpoint by name, each as if it were alone."""
        return {
            name: self._alone(name, served)
            for name, served in self.serving.models.items()
            if served.model is not None
        }

    @property
    def first(self) -> "ApplicationArgs":
        """The served model without the others."""
        aliases = {name: served for name, served in self.serving.models.items() if served.model is None}
        return self.model_copy(update={"serving": self.serving.model_copy(update={"models": aliases})})

    def _alone(self, name: str, served: ServedName) -> "ApplicationArgs":
        gate = self.serving.require_gate if served.require_gate is None else served.require_gate
        serving = {
            "model": served.model,
            "models": {alias: ServedName(**one.model_dump()) for alias, one in served.aliases.items()},
            "model_keys": served.keys,
            "require_gate": gate,
            # The served model's own: its verdict, its default task, what is searched with it.
            **dict.fromkeys(
                ("verdict", "default_task", "corpus", "documents", "batches", "traces", "reranker")
            ),
        }
        return self.model_copy(
            update={
                "model_folder": served.model,
                "model_release": None,
                "model_id": None,
                "served_name": name,
                "scaling": served.scaling or self.scaling,
                "serving": self.serving.model_copy(update=serving),
            }
        )

    @property
    def fingerprint(self) -> str:
        """What identifies the weights."""
        return self.model_id or self.served_name

    @property
    def compute_dtype(self) -> ComputeType:
        """What replicas of this scaling compute in."""
        return computed_dtype(self.serving.compute_dtype, self.scaling.gpus)

    @property
    def single(self) -> bool:
        """Whether one process is encoder and HTTP side at once."""
        alone = self.serving.gateways == 1 and not any(one.model for one in self.serving.models.values())
        return alone and self.scaling.min_replicas == self.scaling.max_replicas == 1

    @model_validator(mode="after")
    def _replicas_may_fill_up(self) -> "ApplicationArgs":
        scales = self.scaling.min_replicas < self.scaling.max_replicas
        ongoing = self.scaling.max_ongoing_requests or self.serving.max_ongoing_requests
        target = self.scaling.target_ongoing_requests
        if scales and target is not None and target > ongoing:
            raise ValueError(
                f"scaling.target_ongoing_requests is {target:g}, above serving."
                f"max_ongoing_requests {ongoing}, so it would never scale up"
            )
        return self
