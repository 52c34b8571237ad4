"""The section about documents."""

import codecs
from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig

NATURAL = "public"  # what training calls the pairs of a source without a dataset of its own
_PAIRED = ("python_docs", "beir")  # formats whose rows are pairs by themselves
DocumentKind = Literal[
    "text", "markdown", "mdx", "rst", "asciidoc", "html", "epub", "notebook", "pdf", "docx", "pptx", "sheets", "message",
    "mailbox",
]  # fmt: skip
SourceFormat = Literal["documents", "python_docs", "parquet", "jsonl", "csv", "text", "beir", "huggingface"]


class CorpusSource(FrozenConfig):
    """One place documents come from; with ``query_column`` its rows are pairs."""

    format: SourceFormat = Field(
        description=(
            "Form of the data: parquet, jsonl (.jsonl, .jsonl.gz), csv, text (.txt and Markdown files, "
            "one document each), documents (PDF, Office, HTML, Markdown and other files as they are; "
            "cut at their headings), beir (a folder with corpus.jsonl, queries and judgements), huggingface "
            "(a dataset by name, needs the network), or python_docs (docstrings of installed packages)."
        )
    )
    path: str | None = Field(
        default=None,
        description=(
            "A file, a folder or a glob; for huggingface a dataset as NAME, NAME:CONFIG or "
            "NAME:CONFIG:SPLIT. Relative paths start at the working directory. Null: only for "
            "python_docs, which takes packages."
        ),
    )
    packages: tuple[str, ...] = Field(
        default=(),
        description="python_docs only: names of installed Python packages whose docstrings are the documents.",
    )
    name: str | None = Field(
        default=None,
        description=(
            "What the documents' source column starts with, and so what search hits and reports call this "
            "source. Null: the path or the package."
        ),
    )
    text_column: str = Field(
        default="text",
        description="Column of the document's text. Its rows without text are counted rejects.",
    )
    title_column: str | None = Field(
        default=None,
        description=(
            "Column of a title, which is put before the text. Null: no title. Text files need none: "
            "theirs is the first heading or the file's name."
        ),
    )
    id_column: str | None = Field(
        default=None,
        description=(
            "Column of ids, which must be unique over all sources. Null: ids are hashes of the content, "
            "so equal documents are one."
        ),
    )
    source_column: str | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description=(
            "Column that says where a row comes from, such as its URL; search hits link to it. Null: the "
            "file and the row number."
        ),
    )
    query_column: str | None = Field(
        default=None,
        description=(
            "Column of queries; each row is then a training pair: the text answers the query. A text that "
            "answers several queries is one document. Null: rows are documents alone."
        ),
    )
    query_from: Literal["title", "first_sentence"] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "Makes pairs of plain documents: the title, or the first sentence, is taken out of each document and becomes "
            "a query that it answers (the inverse cloze task, arXiv 1906.00300). A document without one stays as it is. "
            "Null: none."
        ),
    )
    instruction: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Instruction of this source's queries, for example 'Given a question, retrieve the answer'; "
            "needs query_column. Null: the default of task type retrieval."
        ),
    )
    dataset: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Name of this source's pairs, by which a training source (format mined, dataset NAME) asks "
            "for them. Null: 'public'."
        ),
    )
    where: dict[str, str] = Field(
        default_factory=dict,
        description="Column -> value, as text: only rows in which every named column has this value are read.",
    )
    lang: str | None = Field(
        default=None,
        description=(
            "Language of the documents, as ISO 639-3 code such as eng or deu. Null: undetermined ('und'); "
            "for python_docs eng."
        ),
    )
    titles: bool = Field(
        default=True,
        exclude_if=lambda value: value is True,
        description=(
            "text, documents: whether a file has a title: that of its front matter, else its leading or only heading of level "
            "1, else its own property (HTML, Office, EPUB, PDF), else its first heading, else its name. False: none, and "
            "headings stay in the text."
        ),
    )
    read_as: dict[str, DocumentKind] = Field(
        default_factory=dict,
        exclude_if=lambda value: not value,
        description=(
            "documents: how files of further endings or names are read, such as {.log: text, README: markdown}. Files of "
            "endings that are unknown are passed over, and counted."
        ),
    )
    encoding: str = Field(
        default="utf-8",
        exclude_if=lambda value: value == "utf-8",
        description=(
            "csv, text, documents: encoding of text files without a byte-order mark, such as cp1252 or utf-16."
        ),
    )
    delimiter: str | None = Field(
        default=None,
        min_length=1,
        max_length=1,
        exclude_if=lambda value: value is None,
        description="csv: what parts the cells. Null: a tab in .tsv files, else a comma.",
    )
    column_names: tuple[str, ...] = Field(
        default=(),
        exclude_if=lambda value: not value,
        description="csv: names of the columns of files without a header line, from the first one on.",
    )
    max_unreadable: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        exclude_if=lambda value: value is None,
        description=(
            "Share (0-1) of a source's documents that may be unreadable files or rows; they are counted rejects. Null: the "
            "first one ends the command."
        ),
    )
    limit: int | None = Field(
        default=None, ge=1, description="Most rows that are read, from the first on. Null: all."
    )

    @property
    def may_hold_pairs(self) -> bool:
        """Whether its rows may be pairs: those of some formats are, those of tables with a column of queries."""
        return self.format in _PAIRED or self.query_column is not None or self.query_from is not None

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError as error:
            raise ValueError(
                "unknown; allowed: an encoding that Python knows, such as utf-8, cp1252, utf-16"
            ) from error
        return value

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
        for key, given, formats in (
            ("titles", not self.titles, ("text", "documents")),
            ("read_as", bool(self.read_as), ("documents",)),
            ("encoding", self.encoding != "utf-8", ("csv", "text", "documents")),
            ("delimiter", self.delimiter is not None, ("csv",)),
            ("column_names", bool(self.column_names), ("csv",)),
            (
                "max_unreadable",
                self.max_unreadable is not None,
                ("csv", "jsonl", "parquet", "text", "documents"),
            ),
        ):
            if given and self.format not in formats:
                raise ValueError(f"{key} does not fit format {self.format}; allowed: {', '.join(formats)}")
        if self.query_from is not None and (self.format in _PAIRED or self.query_column is not None):
            own = f"format {self.format}" if self.format in _PAIRED else "query_column"
            raise ValueError(
                f"query_from is {self.query_from!r} beside {own}, which gives queries; allowed: one of them"
            )
        if self.instruction is not None and self.query_column is None and self.query_from is None:
            raise ValueError(
                "instruction needs query_column or query_from: other rows have no queries, or an instruction of their own"
            )
        return self


class SplitConfig(FrozenConfig):
    """Held-out shares, drawn by group (a module, a file) before anything is generated."""

    dev: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description=(
            "Share of the groups (a module, a file; 0-1) that becomes the development split: "
            "training.dev, merge search."
        ),
    )
    test: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description=(
            "Share of the groups (0-1) that becomes the test split, on which the final scores are "
            "measured. The default leaves 80 % for training. Enlarging one share never moves documents "
            "between the others."
        ),
    )

    @model_validator(mode="after")
    def _leaves_training_data(self) -> "SplitConfig":
        if self.dev + self.test >= 1:
            raise ValueError(f"split.dev + split.test is {self.dev + self.test:g}; it must stay below 1")
        return self


class CorpusConfig(FrozenConfig):
    """Reading, cleaning, deduplicating, chunking and splitting documents."""

    sources: tuple[CorpusSource, ...] = Field(
        min_length=1,
        description=(
            "Where documents come from; one or more, of any mix of formats. Pairs (query_column) and "
            "plain documents may stand side by side."
        ),
    )
    min_characters: int = Field(
        default=50,
        ge=1,
        description=(
            "Documents with fewer characters after cleaning are counted rejects. The default keeps a "
            "sentence and drops headings; lower it for short texts such as commands or questions."
        ),
    )
    near_duplicate_threshold: float | None = Field(
        default=0.8,
        gt=0,
        le=1,
        description=(
            "Jaccard similarity of word 5-grams (0-1) from which a document is dropped as a "
            "near-duplicate of an earlier one. Null: only exact duplicates are dropped."
        ),
    )
    chunk_tokens: int | None = Field(
        default=512,
        ge=16,
        description=(
            "Longest chunk, in tokens of the encoder's tokenizer; longer documents are cut. Set it to "
            "what the encoder reads (encoder.max_document_tokens). Null: documents stay whole. Of a cut "
            "document only the first chunk counts as right in held-out scores."
        ),
    )
    chunk_overlap_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens that a chunk repeats of the one before it; must be below chunk_tokens.",
    )
    split: SplitConfig = Field(default=SplitConfig(), description="Held-out shares.")

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names by which training asks for the sources' pairs; empty where no source has any."""
        names = (source.dataset or NATURAL for source in self.sources if source.may_hold_pairs)
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> "CorpusConfig":
        if self.chunk_tokens is not None and self.chunk_overlap_tokens >= self.chunk_tokens:
            raise ValueError(
                f"chunk_overlap_tokens is {self.chunk_overlap_tokens}, not below chunk_tokens {self.chunk_tokens}"
            )
        return self
