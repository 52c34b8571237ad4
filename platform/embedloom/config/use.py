"""Sections about using the model: evaluation and embedding."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.records import TASK_TYPES


class EvaluationTask(FrozenConfig):
    """What to score on: the run's own held-out pairs, local task files, an mteb task or a whole mteb benchmark."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,.()_+-]*$",
        description="Name of the task in tables; for kind mteb and benchmark, mteb's own name.",
    )
    kind: Literal["heldout", "beir", "local", "mteb", "benchmark"] = Field(
        default="heldout",
        description=(
            "heldout: the run's own held-out pairs. beir: a BEIR folder. local: a task or a folder of "
            "tasks on disk. mteb: a task of mteb. benchmark: all tasks of an mteb benchmark."
        ),
    )
    path: str | None = Field(
        default=None,
        description=(
            "beir: the folder. local: one task or a folder of tasks (retrieval/NAME/ and reranking/NAME/ "
            "with corpus, queries and qrels, TYPE/NAME.parquet for the other types). Null: the other "
            "kinds have no path."
        ),
    )
    split: Literal["dev", "test"] = Field(
        default="test",
        description="Split that is scored, for heldout, beir and local; mteb's tasks have their own.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Most queries or rows per subset, chosen by hash, for a quicker estimate. Null: all.",
    )
    languages: tuple[str, ...] | None = Field(
        default=None, description="ISO 639-3 codes: only subsets in these languages. Null: all."
    )
    ignore_identical_ids: bool | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "beir, local: whether a document with the query's own id is left out of its ranking. Null: as "
            "BEIR does, unless it is judged relevant to that query. mteb's tasks state it themselves."
        ),
    )
    prompts: Literal["default", "own", "published"] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "Which prompts texts get. default: what the endpoint gives to clients that name at most a "
            "task type. own: each held-out query's own instruction. published: the benchmark's "
            "instruction for the task, with which published scores are made. Null: published for mteb and "
            "benchmark, else default. A gate uses published prompts only where they are stated."
        ),
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

    tasks: tuple[EvaluationTask, ...] = Field(
        default=(EvaluationTask(name="heldout"),),
        description=(
            "What the base, the candidates and the merged model are scored on. Default: the run's "
            "held-out test split."
        ),
    )
    baselines: tuple[Literal["bm25", "teacher"], ...] = Field(
        default=("bm25", "teacher"),
        description="What they are shown beside: bm25 (word matching), teacher (the first mining teacher).",
    )
    shard_texts: int = Field(
        default=4096,
        ge=1,
        description=(
            "Texts that one actor embeds at a time. Batches round differently, so it is part of what "
            "identifies an evaluation."
        ),
    )
    pool: str | None = Field(
        default=None,
        description=(
            "Models to rank the candidates among: a Parquet file of leaderboard scores, or an mteb "
            "results folder. Null: the run's own models."
        ),
    )
    resamples: int = Field(
        default=1000, ge=100, description="Bootstrap resamples behind the confidence intervals."
    )
    prompts: Literal["default", "published"] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "Which prompts mteb tasks and benchmarks get that state none themselves, as tasks[].prompts "
            "has them. Null: published."
        ),
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

    kind: Literal["flat", "ivf", "hnsw"] = Field(
        description="flat: exact. ivf: vectors in cells, of which some are searched. hnsw: a graph of neighbours."
    )
    lists: int | None = Field(
        default=None,
        ge=1,
        description="ivf: number of cells. Null: 4 x the square root of the rows, with at least 39 rows a cell.",
    )
    probes: int = Field(
        default=16, ge=1, description="ivf: cells searched per query; more finds more and costs more."
    )
    training_rows: int = Field(
        default=262_144, ge=1, description="ivf: rows of the sample that the cells are learnt from."
    )
    neighbours: int = Field(default=32, ge=2, description="hnsw: links per node.")
    build_width: int = Field(default=200, ge=1, description="hnsw: candidates looked at while building.")
    search_width: int = Field(default=128, ge=1, description="hnsw: candidates looked at while searching.")
    threads: int = Field(
        default=1,
        ge=1,
        description=(
            "Threads that build the index. FAISS links HNSW nodes in the order in which its threads "
            "arrive, so only one thread gives the same file again."
        ),
    )
    sample: int = Field(
        default=1000, ge=1, description="Queries on which recall@10 against exact search is measured."
    )
    seed: int = Field(default=0, description="Seed of that sample and of the cells.")

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

    model: str = Field(
        default="merged", description="'merged', 'base', the name of a training run, or a model folder."
    )
    corpus: str | None = Field(
        default=None,
        description=(
            "Texts to embed: a corpus artefact, a file, folder or glob of Parquet or JSON lines, or a "
            "folder of text or Markdown files. Null: the run's own documents."
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
    side: Literal["query", "document"] = Field(
        default="document",
        description="Whether the texts are queries or documents; decides their prompt and length limit.",
    )
    task_type: str = Field(
        default="retrieval",
        description=(
            "Task type whose prompt the texts get. Where neither it nor task is given, the model's own "
            "default."
        ),
    )
    task: str | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description=(
            "A task that the model knows by name (in its contract.json), instead of a task type. Null: by "
            "task_type."
        ),
    )
    instruction: str | None = Field(
        default=None, min_length=1, description="Instruction of queries. Null: that of the task or task type."
    )
    text_column: str = Field(default="text", description="Column that holds the text to embed.")
    title_column: str | None = Field(
        default=None,
        description="Column of a title, joined before a document's text. Null: 'title' where there is one.",
    )
    id_column: str | None = Field(
        default=None,
        description="Column of ids. Null: 'id' or '_id' where there is one, else hashes of the content.",
    )
    dtype: Literal["float32", "float16", "int8", "binary"] = Field(
        default="float32",
        description=(
            "Number type of the stored vectors. int8 and binary take a quarter and a thirty-second of the "
            "space and carry a scale."
        ),
    )
    dimensions: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Cut vectors to their first N dimensions, for models trained for it (Matryoshka). Null: whole "
            "vectors."
        ),
    )
    allow_truncation: bool = Field(
        default=False,
        description="Cut vectors of a model that does not state it was trained for that length.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32",
        description="Number type of the computation. bfloat16 moves a cosine by up to 0.001.",
    )
    shard_rows: int = Field(
        default=2048, ge=1, description="Texts per shard, the unit that is written exactly once and resumed."
    )
    previous: str | None = Field(
        default=None,
        description=(
            "A vectors artefact of the same model and settings: vectors of unchanged texts are taken from "
            "it. Null: none."
        ),
    )
    index: IndexConfig | None = Field(
        default=None, description="A FAISS index beside the vectors. Null: none; exact search needs none."
    )

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
