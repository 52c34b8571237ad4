"""``embedloom.embed`` and ``embedloom.Embedder``: the vectors of ``embedloom embed`` as a column of any Ray Dataset."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import pyarrow as pa
import torch

from embedloom.config.base import validate
from embedloom.config.embedding import EmbeddingConfig
from embedloom.core.model_folder import ModelFolder
from embedloom.core.progress import note
from embedloom.core.prompting import Side
from embedloom.encoder.backbone import DTypeName, has_gpu
from embedloom.encoder.registry import NodeModel, check_model_name, open_model
from embedloom.encoder.tokenizer import CutsByText, CutTexts
from embedloom.errors import ConfigError, DataError
from embedloom.raydata.batches import Batch, columns_of, filtered, strings_of, with_columns
from embedloom.retrieval.corpora import checked_section, checked_vectors
from embedloom.retrieval.embedder import EncoderSource
from embedloom.retrieval.ledger import given_texts
from embedloom.retrieval.stored import SCALE_COLUMN, Matrix, StoredType, shorten, vector_columns

if TYPE_CHECKING:
    from ray.data import Dataset

TOKENS_COLUMN, LEFT_OUT_COLUMN = "tokens", "tokens_left_out"
_ID_COLUMNS = ("id", "_id")  # name a row in errors, where there is one


class Options(TypedDict, total=False):
    """What ``Embedder`` takes beside the model, and means the same in ``embed``."""

    text_column: str
    title_column: str | None
    vector_column: str
    side: Side
    task: str | None
    task_type: str | None
    instruction: str | None
    dtype: StoredType
    dimensions: int | None
    allow_truncation: bool
    compute_dtype: DTypeName
    trust_remote_code: bool
    keep_empty: bool
    count_tokens: bool
    threads: int | None


class Embedder:
    """A model as a callable class for ``Dataset.map_batches``: the vectors of ``embedloom embed`` beside every row.

    Prompts, limits, normalisation and stored types are the command's, by the same code, and rows without a text are dropped and
    counted on stderr, as it rejects them. The other columns stay as they are, and rows keep their order within a batch. Equal
    texts of a batch go through the model once. A batch of different texts has bit for bit the vectors that the command stores
    for a shard of the same rows; in batches of other sizes, or on another number of threads, sums are formed in another order,
    which moves a float32 vector by up to 1e-6 in a dimension.

    Batches come as ``pyarrow`` tables or ``numpy`` columns, and go as they came.
    """

    def __init__(
        self,
        model: str | NodeModel,
        *,
        text_column: str = "text",
        title_column: str | None = None,
        vector_column: str = "vector",
        side: Side = "document",
        task: str | None = None,
        task_type: str | None = None,
        instruction: str | None = None,
        dtype: StoredType = "float32",
        dimensions: int | None = None,
        allow_truncation: bool = False,
        compute_dtype: DTypeName = "auto",
        trust_remote_code: bool = False,
        keep_empty: bool = False,
        count_tokens: bool = False,
        threads: int | None = None,
    ) -> None:
        """Load the model; in an actor that reserves a GPU, onto that.

        Args:
            model: a model folder, ``.gguf`` file, Hugging Face id or shipped model.
            text_column: column of the texts.
            title_column: column of titles, joined before documents' texts; None: ``title`` where there is one.
            vector_column: the new column, a list of fixed size; ``int8`` and ``binary`` also get a column of scales, ``scale``
                beside ``vector``, else ``NAME_scale``.
            side: whether the texts are queries or documents.
            task: a task that the model knows by name; None: by ``task_type``.
            task_type: whose prompt the texts get; None: the model's default.
            instruction: of queries; None: the task's.
            dtype: stored type, ``float32``, ``float16``, ``int8`` or ``binary``.
            dimensions: keep the first so many (Matryoshka); None: all.
            allow_truncation: also of a model that does not say it was trained for so many.
            compute_dtype: ``float32``, ``bfloat16`` or ``auto``: bfloat16 on a GPU, float32 on a CPU.
            trust_remote_code: run code that lies beside the model's weights.
            keep_empty: keep rows without a text, with null as their vector.
            count_tokens: also add ``tokens``, which the model reads of a text and its prompt, and ``tokens_left_out``, which
                lie behind its limit; int32, and 0 where there is no text.
            threads: compute threads; None: as the process has them, in an actor one per CPU that it reserves.

        Raises:
            ConfigError: a value that is not allowed, or does not fit the model.
            DataError, MissingDependency: a model that cannot be found or loaded.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        section = {
            "text_column": text_column, "title_column": title_column, "side": side, "task": task, "task_type": task_type,
            "instruction": instruction, "dtype": dtype, "dimensions": dimensions, "allow_truncation": allow_truncation,
            "compute_dtype": compute_dtype, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        self._folder, self._config = checked_model(model, section, float(has_gpu()))
        source = EncoderSource(self._config.model, self._folder.travels, dtype=self._config.compute_dtype)
        self._embedder = source.open()
        self._cuts = self._embedder.encoder.cuts = CutsByText()
        self._vector_column = vector_column
        self._keep_empty, self._count_tokens = keep_empty, count_tokens
        self._told = _Told("kept without a vector" if keep_empty else "dropped")

    @property
    def model_id(self) -> str:
        """What ``embedloom embed`` stamps on vectors of this model."""
        return self._folder.id

    @property
    def contract_hash(self) -> str:
        """Of the prompts; vectors of different hashes are never compared."""
        return self._embedder.contract_hash

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its vectors: float32 [d], float16 [d], int8 [d] or packed bits [d / 8] a row.

        Raises:
            DataError: no such column, values that are no texts, a vector that is zero or not finite, or a batch of another format.
            ConfigError: a new column's name is taken.
        """
        columns = columns_of(batch)
        check_names(
            list(columns), self._config, new_names(self._vector_column, self._config, self._count_tokens)
        )
        texts = self._texts(columns)
        filled = np.array([bool(text) for text in texts], dtype=bool)
        rows: list[int] = np.flatnonzero(filled).tolist()
        new = self._new_columns([texts[row] for row in rows], _names(columns, rows))
        self._told.add(len(texts), len(texts) - len(rows), self._cuts)
        if len(rows) == len(texts):
            return with_columns(batch, new)
        if not self._keep_empty:
            return with_columns(filtered(batch, filled), new)
        return with_columns(batch, {name: _spread(column, filled) for name, column in new.items()})

    def _texts(self, columns: Mapping[str, Any]) -> list[str]:
        """What the model is given of each row; empty where there is nothing."""
        config = self._config
        title = (
            None
            if config.side == "query"
            else config.title_column or ("title" if "title" in columns else None)
        )
        titles = None if title is None else strings_of(columns, title)
        return given_texts(strings_of(columns, config.text_column), titles, config.side)

    def _new_columns(self, texts: Sequence[str], names: Sequence[str] | None) -> dict[str, pa.Array]:
        """The new columns of rows that have texts; equal ones share a vector."""
        unique: dict[str, int] = {}
        positions = [unique.setdefault(text, len(unique)) for text in texts]
        first = np.unique(positions, return_index=True)[1]
        vectors, tokens = self._vectors(list(unique), names and [names[row] for row in first])
        made = vector_columns(vectors[positions] if positions else vectors, self._config.dtype)
        found = {self._vector_column: made["vector"]}
        if SCALE_COLUMN in made:
            found[scale_column(self._vector_column)] = made[SCALE_COLUMN]
        if self._count_tokens:
            left_out = self._cuts.by_text
            found[TOKENS_COLUMN] = pa.array([tokens[position] for position in positions], pa.int32())
            found[LEFT_OUT_COLUMN] = pa.array([left_out[position] for position in positions], pa.int32())
        self._cuts.by_text.clear()
        return found

    def _vectors(self, texts: list[str], names: Sequence[str] | None) -> tuple[Matrix, list[int]]:
        normalize = self._folder.contract.normalize
        if texts:
            return checked_vectors(self._embedder, self._config.model, self._config, normalize, texts, names)
        none = np.empty((0, self._embedder.encoder.dimension), dtype=np.float32)
        return shorten(none, self._config.dimensions, normalize), []


def embed(
    dataset: "Dataset",
    *,
    model: str,
    batch_size: int = 2048,
    concurrency: int | tuple[int, int] | tuple[int, int, int] = 1,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    preserve_order: bool = True,
    map_arguments: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> "Dataset":
    """A Dataset with the vectors of its texts in a new column; lazy, streamed through a pool of actors.

    Nothing is collected: the driver checks what it can (options, model, columns where the schema is known) and adds an
    operation to the plan. Vectors are those of ``embedloom embed``; see ``Embedder``.

    Args:
        dataset: any; the columns it has stay.
        model: a model folder, ``.gguf`` file, Hugging Face id or shipped model; fetched by every node that runs an actor.
        batch_size: rows a call, as ``embedding.shard_rows`` of the command.
        concurrency: actors: a number, (least, most) or (least, most, at first), as ``map_batches`` takes it.
        num_cpus: CPUs that each actor reserves, and the threads it computes with; None: one, as Ray Data does.
        num_gpus: GPUs that each actor reserves.
        preserve_order: rows come out in the order in which they went in: sets the dataset's execution option of this name.
            Blocks that are finished wait for those before them.
        map_arguments: further arguments of ``Dataset.map_batches``, such as ``runtime_env``.
        options: of ``Embedder``.

    Raises:
        TypeError: an unknown option.
        ConfigError: a value that is not allowed, or does not fit the model.
        DataError, MissingDependency: a model that cannot be found, or a dataset without the column.
    """
    arguments = {"model": model, **options}
    bound = inspect.signature(Embedder).bind(**arguments)
    bound.apply_defaults()
    stated = {key: bound.arguments[key] for key in EmbeddingConfig.model_fields if key in bound.arguments}
    folder, config = checked_model(model, stated, num_gpus or 0)
    known = dataset.schema(fetch_if_missing=False)
    if known is not None:
        new = new_names(bound.arguments["vector_column"], config, bound.arguments["count_tokens"])
        check_names(known.names, config, new)
    embedded = dataset.map_batches(
        Embedder,
        fn_constructor_kwargs={**arguments, "model": folder.travels},
        batch_size=batch_size,
        batch_format="pyarrow",
        concurrency=concurrency,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        **(map_arguments or {}),
    )
    if preserve_order:
        embedded.context.execution_options.preserve_order = True
    return embedded


def checked_model(
    model: str | NodeModel, section: Mapping[str, Any], gpus: float
) -> tuple[ModelFolder, EmbeddingConfig]:
    """The model's folder, and the embedding section as a process of so many GPUs computes it, checked against the model.

    Raises:
        ConfigError: a value that is not allowed, or does not fit the model.
        DataError, MissingDependency: no such model.
    """
    name = model.name if isinstance(model, NodeModel) else model
    stated = {key: value for key, value in section.items() if value is not None}
    config = validate(EmbeddingConfig, {**stated, "model": name}, "embed")
    check_model_name(name, "embed: model")
    given = model if isinstance(model, NodeModel) else NodeModel.of(name, config.trust_remote_code)
    folder = open_model(given)
    return folder, checked_section(config.computed(gpus), folder)


def new_names(vector_column: str, config: EmbeddingConfig, count_tokens: bool) -> list[str]:
    """Names of the columns that are added."""
    scales = [scale_column(vector_column)] if config.dtype in ("int8", "binary") else []
    return [vector_column, *scales, *([TOKENS_COLUMN, LEFT_OUT_COLUMN] if count_tokens else [])]


def scale_column(vector_column: str) -> str:
    """Name of the column of scales of int8 and binary vectors."""
    return SCALE_COLUMN if vector_column == "vector" else f"{vector_column}_{SCALE_COLUMN}"


def check_names(names: Sequence[str], config: EmbeddingConfig, new: Sequence[str]) -> None:
    """Check a dataset's columns.

    Raises:
        DataError: one that is to be read is not there.
        ConfigError: a new one's name is taken.
    """
    for key in ("text_column", "title_column"):
        column = getattr(config, key)
        if (
            column is not None
            and column not in names
            and not (key == "title_column" and config.side == "query")
        ):
            raise DataError(f"embed: {key}: no column {column!r}; columns found: {list(names)}")
    for name in new:
        if name in names:
            raise ConfigError(
                f"embed: the column {name!r} is to be added, and the dataset has it already; allowed: another vector_column, or "
                "drop or rename the dataset's"
            )


def _names(columns: Mapping[str, Any], rows: Sequence[int]) -> list[str] | None:
    """What rows are called in errors."""
    known = next((name for name in _ID_COLUMNS if name in columns), None)
    return None if known is None else [str(columns[known][row]) for row in rows]


def _spread(column: pa.Array, filled: np.ndarray[Any, np.dtype[np.bool_]]) -> pa.Array:
    """A column of the filled rows over all of them: null, or 0 for a count, in the others."""
    rows = pa.array(np.cumsum(filled) - 1, mask=~filled)
    wide = column.take(rows)
    return wide.fill_null(0) if pa.types.is_integer(column.type) else wide


class _Told:
    """Tells on stderr what was dropped and cut, each time that it has doubled."""

    def __init__(self, fate: str) -> None:
        self._fate = fate
        self._rows = self._empty = 0
        self._next = 1

    def add(self, rows: int, empty: int, cuts: CutTexts) -> None:
        """Count a batch; ``cuts`` are those of all batches."""
        self._rows += rows
        self._empty += empty
        if self._empty + cuts.cut < self._next:
            return
        self._next = 2 * (self._empty + cuts.cut)
        note("embed", f"of {self._rows:,} rows so far {self._empty:,} without a text ({self._fate}); {cuts}")
