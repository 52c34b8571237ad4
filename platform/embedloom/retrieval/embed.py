"""Embedding a table of texts in an actor pool: Parquet in, Parquet vectors out, shard by shard."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.encoder.device import DTypeName
from embedloom.encoder.model import Encoder
from embedloom.engines.shards import run_sharded
from embedloom.errors import DataError
from embedloom.instructions import PromptContract, Side, document_text
from embedloom.retrieval.vectors import CONTRACT_KEY, MODEL_KEY, TOKENS_KEY
from embedloom.storage import Place


def vector_table(
    ids: list[str],
    vectors: np.ndarray[Any, Any],
    contract_hash: str,
    model_id: str,
    tokens: int,
    dtype: str = "float32",
) -> pa.Table:
    """Vectors as Arrow: id, vector (fixed_size_list), and what made them in the schema metadata.

    Args:
        ids: one per row.
        vectors: [len(ids), dimension].
        contract_hash: of the prompt contract the texts went through.
        model_id: fingerprint or name of the weights.
        tokens: real tokens behind these rows.
        dtype: ``float32`` or ``float16``.
    """
    values = pa.array(np.ascontiguousarray(vectors, dtype=dtype).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    metadata = {
        CONTRACT_KEY: contract_hash.encode(),
        MODEL_KEY: model_id.encode(),
        TOKENS_KEY: str(tokens).encode(),
    }
    schema = pa.schema(
        [pa.field("id", pa.string(), False), pa.field("vector", column.type, False)], metadata=metadata
    )
    return pa.table([pa.array(ids, pa.string()), column], schema=schema)


class EmbeddingWorker:
    """Actor that embeds one shard of texts."""

    def __init__(
        self,
        model: Path,
        model_id: str,
        contract: PromptContract | None,
        side: Side,
        done_folder: str,
        dtype: DTypeName,
        vector_dtype: str,
        id_column: str,
        text_columns: tuple[str, ...],
        task_type: str,
        instruction_column: str | None,
    ) -> None:
        self.encoder = Encoder.load(model, dtype=dtype, contract=contract)
        self.model_id = model_id
        self.side: Side = side
        self.done_folder = done_folder
        self.vector_dtype = vector_dtype
        self.id_column = id_column
        self.text_columns = text_columns
        self.task_type = task_type
        self.instruction_column = instruction_column

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Embed the shard's texts; identical texts go through the model once."""
        texts = _texts(rows, self.text_columns)
        instructions = (
            rows.column(self.instruction_column).to_pylist()
            if self.instruction_column
            else [None] * len(texts)
        )
        unique: dict[tuple[str, str | None], int] = {}
        positions = [unique.setdefault(key, len(unique)) for key in zip(texts, instructions, strict=True)]
        token_ids = self.encoder.tokenize(
            [text for text, _ in unique],
            self.side,
            self.task_type,
            [instruction for _, instruction in unique],
        )
        vectors = self.encoder.embed_tokens(token_ids)[positions]
        ids = rows.column(self.id_column).to_pylist()
        tokens = sum(len(ids_of_text) for ids_of_text in token_ids)
        table = vector_table(
            ids, vectors, self.encoder.contract.hash, self.model_id, tokens, self.vector_dtype
        )
        return {self.done_folder: table}


def _texts(rows: pa.Table, columns: tuple[str, ...]) -> list[str]:
    """One text a row: ``(title, text)`` as a document, or a single column as it is."""
    if len(columns) == 1:
        return [str(text) for text in rows.column(columns[0]).to_pylist()]
    titles = (
        rows.column(columns[0]).to_pylist() if columns[0] in rows.column_names else [None] * rows.num_rows
    )
    return [
        document_text(title, text)
        for title, text in zip(titles, rows.column(columns[1]).to_pylist(), strict=True)
    ]


def embed_corpus(
    *,
    stage: str,
    source: Place,
    source_folder: str | tuple[str, ...],
    output: Place,
    done_folder: str,
    model: Path,
    contract: PromptContract | None,
    side: Side,
    pool: PoolConfig,
    shard_rows: int,
    dtype: DTypeName = "auto",
    vector_dtype: str = "float32",
    model_id: str | None = None,
    id_column: str = "id",
    text_columns: tuple[str, ...] = ("title", "text"),
    task_type: str = "retrieval",
    instruction_column: str | None = None,
) -> dict[str, int]:
    """Embed every row below ``source_folder`` into ``output/done_folder/part-*.parquet``; resumes by shard.

    Args:
        stage: name on the progress lines.
        source: place whose ``source_folder`` (or several) holds Parquet files with ``id_column`` and ``text_columns``.
        output: where the vectors go.
        done_folder: folder of the vector parts.
        model: model folder.
        contract: replaces the folder's own contract (a teacher with other length limits).
        side: whether the texts are queries or documents.
        pool: actors and what each reserves.
        shard_rows: rows per shard and output file.
        dtype: compute type.
        vector_dtype: stored type, ``float32`` or ``float16``.
        model_id: stamped on the files; default the model folder's name.
        id_column: the id column.
        text_columns: one text column, or (title, text).
        task_type: decides the instruction, see PromptContract.format.
        instruction_column: column with a query's own instruction.

    Returns:
        ``{"rows": …, "tokens": …}``: rows written and real tokens embedded.
    """
    parts = run_sharded(
        stage=stage,
        source=source,
        source_folder=source_folder,
        output=output,
        done_folder=done_folder,
        shard_rows=shard_rows,
        worker=EmbeddingWorker,
        worker_arguments=dict(
            model=model, model_id=model_id or model.name, contract=contract, side=side, done_folder=done_folder,
            dtype=dtype, vector_dtype=vector_dtype, id_column=id_column, text_columns=text_columns,
            task_type=task_type, instruction_column=instruction_column,
        ),
        pool=pool,
        unit="texts",
    )  # fmt: skip
    return vector_counts(output, parts)


def vector_counts(place: Place, parts: list[str]) -> dict[str, int]:
    """Rows and embedded tokens of vector files, from their footers."""
    counts = {"rows": 0, "tokens": 0}
    for part in parts:
        schema, rows = place.parquet_footer(part)
        counts["rows"] += rows
        counts["tokens"] += int(schema.metadata[TOKENS_KEY])
    return counts


def read_vectors(
    place: Place, folder: str, contract_hash: str | None = None
) -> tuple[list[str], np.ndarray[Any, Any]]:
    """All vectors of a folder: ids and float32 [n, dimension].

    Raises:
        DataError: no vectors, files of different contracts, or another contract than asked for.
    """
    ids: list[str] = []
    blocks = []
    for name in place.names(folder, ".parquet"):
        table = place.read_table(name)
        found = (table.schema.metadata or {}).get(CONTRACT_KEY, b"").decode()
        contract_hash = contract_hash or found
        if found != contract_hash:
            raise DataError(
                f"{place.uri}/{name}: contract_hash {found!r}, expected {contract_hash!r}; vectors of different prompts cannot be compared"
            )
        column = table.column("vector").combine_chunks()
        blocks.append(
            np.asarray(column.flatten(), dtype=np.float32).reshape(table.num_rows, column.type.list_size)
        )
        ids.extend(table.column("id").to_pylist())
    if not blocks:
        raise DataError(f"{place.uri}/{folder}: no vectors")
    return ids, np.concatenate(blocks)
