"""Section ``embedding``: which corpus is embedded, how its vectors are stored and indexed."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.corpus import DocumentKind
from embedloom.core.schemas import TASK_TYPES


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


class LexicalConfig(FrozenConfig):
    """A BM25 index of the texts' words beside their vectors, for searches by words and for hybrid ones."""

    language: str | None = Field(
        default="auto",
        pattern=r"^(auto|[a-z]{3})$",
        description=(
            "Language of the texts, an ISO 639-3 code: its words are found in all their inflections (Snowball stems). auto: the "
            "one that two thirds of a sample are in. Null: words are found as they stand."
        ),
    )
    k1: float = Field(
        default=1.5, ge=0, description="BM25's k1: how much a word's repetitions in a text still count."
    )
    b: float = Field(default=0.75, ge=0, le=1, description="BM25's b: how much long texts are held back.")


ComputeType = Literal["auto", "float32", "bfloat16", "int8"]


def computed_dtype(name: ComputeType, gpus: float) -> ComputeType:
    """What a compute type means for a process that reserves so many GPUs; all but ``auto`` mean themselves."""
    if name != "auto":
        return name
    return "bfloat16" if gpus > 0 else "float32"


class EmbeddingConfig(FrozenConfig):
    """Batch embedding of a corpus to Parquet vectors."""

    model: str = Field(
        default="merged", description="'merged', 'base', the name of a training run, or a model folder."
    )
    corpus: str | None = Field(
        default=None,
        description=(
            "Texts to embed: a corpus artefact, a file, folder or glob of Parquet or JSON lines, or a "
            "folder of documents (PDF, Office, HTML, Markdown and others). Null: the run's own documents."
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
    chunks: bool = Field(
        default=True,
        exclude_if=lambda value: value is True,
        description=(
            "Documents (not rows of tables) that are longer than the model reads are cut into chunks, each a row of its own. "
            "False: their ends are cut off, and counted."
        ),
    )
    titles: bool = Field(
        default=True,
        exclude_if=lambda value: value is True,
        description="Whether documents have titles, found as those of corpora (corpus.sources.titles).",
    )
    read_as: dict[str, DocumentKind] = Field(
        default_factory=dict,
        exclude_if=lambda value: not value,
        description="How files of further endings or names are read, such as {.log: text}; the others are passed over.",
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
        default="auto",
        description=(
            "Number type of the computation. auto: bfloat16 in a pool with GPUs, where float32 is a sixteenth of the "
            "speed (A100) and has no kernel for texts of different lengths; float32 on CPUs. bfloat16 moves a cosine by "
            "up to 0.001, at 30 layers."
        ),
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

    lexical: LexicalConfig | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="A BM25 index beside the vectors, for lexical and hybrid searches. Null: none.",
    )

    def computed(self, gpus: float) -> "EmbeddingConfig":
        """The section with ``compute_dtype`` as actors of so many GPUs compute; fingerprints and recipes are made of it."""
        return self.model_copy(update={"compute_dtype": computed_dtype(self.compute_dtype, gpus)})

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
        if self.lexical is not None and self.side == "query":
            raise ValueError(
                "lexical is set with side query; allowed: side document, the texts that are searched"
            )
        if self.dtype == "binary" and self.index is not None:
            raise ValueError(
                "index is not built from dtype binary: faiss.IndexBinaryFlat reads the packed bits as they are"
            )
        return self
