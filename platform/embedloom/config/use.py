"""Sections about using the model: evaluation, embedding, serving."""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig


class EvaluationTask(FrozenConfig):
    """One task: the run's own held-out pairs, a local task folder, or an mteb task by name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["heldout", "beir", "mteb"] = "heldout"
    path: str | None = None
    split: Literal["dev", "test"] = "test"
    limit: int | None = Field(default=None, ge=1)  # at most this many queries, chosen by hash

    @model_validator(mode="after")
    def _path_fits_kind(self) -> "EvaluationTask":
        if (self.kind == "beir") != (self.path is not None):
            raise ValueError(f"kind {self.kind} {'needs' if self.kind == 'beir' else 'takes no'} path")
        return self


class EvaluationConfig(FrozenConfig):
    """What the base, the candidates and the merged model are scored on, and beside which baselines."""

    tasks: tuple[EvaluationTask, ...] = (EvaluationTask(name="heldout"),)
    baselines: tuple[Literal["bm25", "teacher"], ...] = ("bm25", "teacher")

    @model_validator(mode="after")
    def _names_are_unique(self) -> "EvaluationConfig":
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must be a non-empty list of different names, found {names}")
        return self


class EmbeddingConfig(FrozenConfig):
    """Batch embedding of a corpus to Parquet vectors."""

    model: str = "merged"  # "merged", "base", a candidate's name, or a model folder
    corpus: str | None = (
        None  # a corpus artefact, Parquet, JSONL or text folder; null: the run's own documents
    )
    dtype: Literal["float32", "float16"] = "float32"  # of the stored vectors
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # bfloat16 moves a cosine by up to 1e-3
    shard_rows: int = Field(default=2048, ge=1)


class ServingConfig(FrozenConfig):
    """The endpoint; scaling per profile stands in cluster/cluster.yaml."""

    model: str = "merged"
    served_name: str | None = None  # what clients put into ``model``; null: the run's name
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    route_prefix: str = Field(default="/", pattern=r"^/.*$")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = (
        "float32"  # as embedding.compute_dtype, so vectors agree
    )
    max_items: int = Field(default=2048, ge=1)  # OpenAI's limit per request
    max_batch_tokens: int = Field(default=4096, ge=64)
    batch_wait_seconds: float = Field(default=0.005, ge=0)
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=256, ge=1)
    request_timeout_seconds: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _queue_is_deep_enough(self) -> "ServingConfig":
        # Ray counts a request as queued until a replica accepts it, so a shorter queue rejects in a burst.
        if self.max_queued_requests < self.max_ongoing_requests:
            raise ValueError(
                f"max_queued_requests is {self.max_queued_requests}, below max_ongoing_requests {self.max_ongoing_requests}"
            )
        return self
