"""The section about documents."""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig

SourceFormat = Literal["python_docs", "parquet", "jsonl", "csv", "text", "beir", "huggingface"]


class CorpusSource(FrozenConfig):
    """One place documents come from.

    ``path`` is a file, glob or folder (``text``, ``beir``, ``parquet``, ``jsonl``, ``csv``) or a dataset name
    (``huggingface``); ``packages`` are installed Python packages (``python_docs``).

    With ``query_column`` the rows are pairs: the text answers the query. A text that answers several is one document.
    """

    format: SourceFormat
    path: str | None = None
    packages: tuple[str, ...] = ()
    name: str | None = None  # what the documents' ``source`` column starts with; default: the path or package
    text_column: str = "text"
    title_column: str | None = None
    id_column: str | None = None
    # Where a row comes from, such as a column of URLs; null: the file and the row.
    source_column: str | None = Field(default=None, min_length=1, exclude_if=lambda value: value is None)
    query_column: str | None = None  # null: the rows are documents alone
    instruction: str | None = Field(default=None, min_length=1)  # of the queries; null: that of retrieval
    dataset: str | None = Field(default=None, min_length=1)  # what training calls the pairs; null: "public"
    where: dict[str, str] = Field(default_factory=dict)  # column → value: only these rows
    lang: str | None = None
    limit: int | None = Field(default=None, ge=1)  # rows read

    @model_validator(mode="after")
    def _has_its_place(self) -> "CorpusSource":
        if self.format == "python_docs":
            if not self.packages or self.path:
                raise ValueError("format python_docs takes packages: [..] and no path")
        elif not self.path or self.packages:
            raise ValueError(f"format {self.format} takes a path and no packages")
        return self

    @model_validator(mode="after")
    def _keys_fit_format(self) -> "CorpusSource":
        tables = ("parquet", "jsonl", "csv", "huggingface")
        for key, given in (
            ("query_column", self.query_column is not None),
            ("source_column", self.source_column is not None),
            ("where", bool(self.where)),
        ):
            if given and self.format not in tables:
                raise ValueError(f"{key} does not fit format {self.format}; allowed: {', '.join(tables)}")
        if self.query_column is None and self.instruction is not None:
            raise ValueError(
                "instruction needs query_column: other rows have no queries, or an instruction of their own"
            )
        return self


class SplitConfig(FrozenConfig):
    """Held-out shares, drawn by group (a module, a file) before anything is generated."""

    dev: float = Field(default=0.05, ge=0, lt=1)
    test: float = Field(default=0.15, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training_data(self) -> "SplitConfig":
        if self.dev + self.test >= 1:
            raise ValueError(f"split.dev + split.test is {self.dev + self.test:g}; it must stay below 1")
        return self


class CorpusConfig(FrozenConfig):
    """Reading, cleaning, deduplicating, chunking and splitting documents."""

    sources: tuple[CorpusSource, ...] = Field(min_length=1)
    min_characters: int = Field(default=50, ge=1)
    near_duplicate_threshold: float | None = Field(
        default=0.8, gt=0, le=1
    )  # Jaccard of word 5-grams; null: off
    chunk_tokens: int | None = Field(default=512, ge=16)  # null: documents stay whole
    chunk_overlap_tokens: int = Field(default=0, ge=0)
    split: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> "CorpusConfig":
        if self.chunk_tokens is not None and self.chunk_overlap_tokens >= self.chunk_tokens:
            raise ValueError(
                f"chunk_overlap_tokens is {self.chunk_overlap_tokens}, not below chunk_tokens {self.chunk_tokens}"
            )
        return self
