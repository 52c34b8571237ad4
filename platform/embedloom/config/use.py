"""Sections about using the model: evaluation and embedding."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.records import TASK_TYPES


class EvaluationTask(FrozenConfig):
    """What to score on: the run's own held-out pairs, local task files, an mteb task or a whole mteb benchmark.

    ``path`` is a BEIR folder (``beir``) or, for ``local``, one task or a folder of tasks: ``retrieval/<name>/`` and
    ``reranking/<name>/`` with corpus, queries and qrels, ``<type>/<name>.parquet`` for the other types.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,.()_+-]*$")  # mteb's own name for mteb and benchmark
    kind: Literal["heldout", "beir", "local", "mteb", "benchmark"] = "heldout"
    path: str | None = None
    split: Literal["dev", "test"] = "test"  # mteb's tasks have their own
    limit: int | None = Field(
        default=None, ge=1
    )  # at most this many queries or rows a subset, chosen by hash
    languages: tuple[str, ...] | None = None  # ISO 639-3; only subsets of these
    # beir, local: whether a document of the query's own id is left out of its ranking; null: as BEIR does, unless it is
    # judged relevant to that query. Tasks of mteb say it themselves.
    ignore_identical_ids: bool | None = Field(default=None, exclude_if=lambda value: value is None)
    # Which prompts texts get. default: what the endpoint sends to whoever names at most the task type. own: each held-out
    # query's own instruction. published: the benchmark's instruction for the task, by which others' scores are made. null:
    # published for mteb and benchmark, else default. A gate takes published ones only where they are stated.
    prompts: Literal["default", "own", "published"] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )

    @model_validator(mode="after")
    def _prompts_fit_kind(self) -> "EvaluationTask":
        if self.prompts == "own" and self.kind != "heldout":
            raise ValueError(f"prompts is own, kind {self.kind} has none; allowed: default, published")
        if self.prompts == "published" and self.kind in ("heldout", "beir"):
            raise ValueError(f"prompts is published, kind {self.kind} has none; allowed: default")
        return self

    @model_validator(mode="after")
    def _path_fits_kind(self) -> "EvaluationTask":
        needs_path = self.kind in ("beir", "local")
        if needs_path != (self.path is not None):
            raise ValueError(f"kind {self.kind} {'needs' if needs_path else 'takes no'} path")
        if self.ignore_identical_ids is not None and not needs_path:
            raise ValueError(f"kind {self.kind} takes no ignore_identical_ids; allowed: beir, local")
        if self.languages is not None and self.kind in ("heldout", "beir"):
            raise ValueError(f"kind {self.kind} has no language subsets, so it takes no languages")
        return self


class EvaluationConfig(FrozenConfig):
    """What the base, the candidates and the merged model are scored on, and beside which baselines."""

    tasks: tuple[EvaluationTask, ...] = (EvaluationTask(name="heldout"),)
    baselines: tuple[Literal["bm25", "teacher"], ...] = ("bm25", "teacher")
    shard_texts: int = Field(default=4096, ge=1)  # texts that one actor embeds at a time; part of the recipe
    # Parquet file of leaderboard scores or an mteb results folder: models that candidates are ranked among.
    pool: str | None = None
    resamples: int = Field(default=1000, ge=100)  # of the bootstrap behind the confidence intervals
    # Of mteb tasks and benchmarks that do not state their prompts themselves.
    prompts: Literal["default", "published"] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )

    @property
    def stated_tasks(self) -> tuple[EvaluationTask, ...]:
        """The tasks, each with the prompts that are stated for it."""
        if self.prompts is None:
            return self.tasks
        return tuple(
            task.model_copy(update={"prompts": self.prompts})
            if task.prompts is None and task.kind in ("mteb", "benchmark")
            else task
            for task in self.tasks
        )

    @model_validator(mode="after")
    def _names_are_unique(self) -> "EvaluationConfig":
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must be a non-empty list of different names, found {names}")
        return self


class IndexConfig(FrozenConfig):
    """A FAISS index beside the vectors; keys that the kind does not read are refused."""

    kind: Literal["flat", "ivf", "hnsw"]
    lists: int | None = Field(default=None, ge=1)  # ivf: cells; null: 4 sqrt(rows), at least 39 rows a cell
    probes: int = Field(default=16, ge=1)  # ivf: cells searched
    training_rows: int = Field(default=262_144, ge=1)  # ivf: sample that the cells are learnt from
    neighbours: int = Field(default=32, ge=2)  # hnsw: links of a node
    build_width: int = Field(default=200, ge=1)  # hnsw: candidates while building
    search_width: int = Field(default=128, ge=1)  # hnsw: candidates while searching
    # FAISS links HNSW nodes in whatever order its threads arrive: with one thread the file is reproducible.
    threads: int = Field(default=1, ge=1)
    sample: int = Field(default=1000, ge=1)  # queries that recall@10 is measured on
    seed: int = 0

    @model_validator(mode="after")
    def _keys_fit_kind(self) -> "IndexConfig":
        own = {
            "ivf": {"lists", "probes", "training_rows"},
            "hnsw": {"neighbours", "build_width", "search_width"},
        }
        for kind, keys in own.items():
            strange = sorted(keys & self.model_fields_set)
            if kind != self.kind and strange:
                raise ValueError(
                    f"kind {self.kind} does not read {strange[0]}, which is a key of kind {kind}"
                )
        return self


class EmbeddingConfig(FrozenConfig):
    """Batch embedding of a corpus to Parquet vectors."""

    model: str = "merged"  # "merged", "base", a candidate's name, or a model folder
    # A corpus artefact, a file, folder or glob of Parquet or JSON lines, or a folder of text or Markdown files;
    # null: the run's own documents.
    corpus: str | None = None
    side: Literal["query", "document"] = "document"
    task_type: str = "retrieval"  # where neither it nor task is stated, the model's own default
    # A task of the model by name (those of its contract), in place of the task type.
    task: str | None = Field(default=None, min_length=1, exclude_if=lambda value: value is None)
    instruction: str | None = Field(default=None, min_length=1)  # of queries; null: the contract's own
    text_column: str = "text"
    title_column: str | None = None  # joined before a document's text; null: "title", where there is one
    id_column: str | None = None  # null: "id" or "_id", where there is one, else ids are content hashes
    dtype: Literal["float32", "float16", "int8", "binary"] = "float32"  # of the stored vectors
    dimensions: int | None = Field(default=None, ge=1)  # cut to the first so many (Matryoshka); null: whole
    allow_truncation: bool = False  # cut vectors of a model that does not say it was trained for it
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # bfloat16 moves a cosine by up to 1e-3
    shard_rows: int = Field(default=2048, ge=1)
    previous: str | None = (
        None  # a vectors artefact of the same recipe: its vectors of unchanged texts are kept
    )
    index: IndexConfig | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides a text's stored vector, besides the model: vectors of equal recipes can be mixed."""
        return self.model_dump(
            mode="json",
            include={"side", "task_type", "instruction", "dtype", "dimensions", "compute_dtype"},
        )

    @property
    def columns(self) -> dict[str, str | None]:
        """Which columns of the input are read."""
        return self.model_dump(include={"text_column", "title_column", "id_column"})

    @field_validator("task_type")
    @classmethod
    def _task_type_is_known(cls, value: str) -> str:
        if value not in TASK_TYPES:
            raise ValueError(f"unknown; allowed: {', '.join(TASK_TYPES)}")
        return value

    @model_validator(mode="after")
    def _keys_fit_each_other(self) -> "EmbeddingConfig":
        if self.task is not None and "task_type" in self.model_fields_set:
            raise ValueError(f"task is {self.task!r} beside a task_type; allowed: one of them")
        if self.dtype == "binary" and self.dimensions is not None and self.dimensions % 8:
            raise ValueError(f"dimensions is {self.dimensions}; dtype binary packs eight into a byte")
        if self.dtype == "binary" and self.index is not None:
            raise ValueError(
                "index is not built from dtype binary: faiss.IndexBinaryFlat reads the packed bits as they are"
            )
        return self
