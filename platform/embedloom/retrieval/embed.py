"""Embedding a table of texts in an actor pool, as mining does: Parquet in, Parquet vectors out, shard by shard."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.encoder.tokenizer import CutTexts
from embedloom.engines.shards import run_sharded
from embedloom.instructions import Side, document_text
from embedloom.retrieval.ahead import AheadVectors, Asked
from embedloom.retrieval.embedder import EmbedderSource, count_prefetched, taken_cuts
from embedloom.retrieval.shared_weights import share_weights
from embedloom.retrieval.stored import StoredType, final_table, vector_columns
from embedloom.retrieval.vector_files import CONTRACT_KEY, MODEL_KEY, cost_counts, cost_metadata
from embedloom.storage import Place


def vector_table(
    ids: list[str],
    vectors: np.ndarray[Any, Any],
    contract_hash: str,
    model_id: str,
    tokens: int,
    dtype: StoredType = "float32",
    cuts: CutTexts | None = None,
) -> pa.Table:
    """Vectors as Arrow: id, vector (fixed_size_list), where needed scale, and what made them in the schema metadata.

    Args:
        ids: one per row.
        vectors: [len(ids), dimension].
        contract_hash: of the prompt contract the texts went through.
        model_id: fingerprint or name of the weights.
        tokens: real tokens behind these rows.
        dtype: stored type.
        cuts: what the model did not see of their texts.
    """
    columns = vector_columns(np.ascontiguousarray(vectors, dtype=np.float32), dtype)
    metadata = {
        CONTRACT_KEY: contract_hash.encode(),
        MODEL_KEY: model_id.encode(),
        **cost_metadata(tokens, cuts or CutTexts()),
    }
    return final_table(pa.table({"id": pa.array(ids, pa.string()), **columns}), metadata)


@dataclass(frozen=True, slots=True)
class TextColumns:
    """Which columns of the input hold what."""

    id: str = "id"
    texts: tuple[str, ...] = ("title", "text")  # one text column, or (title, text)
    task_type: str | None = None  # None: every text is a retrieval text
    instruction: str | None = None  # None: the contract's own instructions


class EmbeddingWorker:
    """Actor that embeds one shard of texts."""

    def __init__(
        self,
        source: EmbedderSource,
        side: Side,
        done_folder: str,
        vector_dtype: StoredType,
        columns: TextColumns,
        ahead: Place | None = None,
    ) -> None:
        self.embedder = source.open()
        self.model_id = source.name
        self.side: Side = side
        self.done_folder = done_folder
        self.vector_dtype = vector_dtype
        self.columns = columns
        self.known = None if ahead is None else AheadVectors(ahead)

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Embed the shard's texts; identical texts, and those embedded ahead, go through the model once."""
        keys = list(
            zip(
                _texts(rows, self.columns.texts),
                _values(rows, self.columns.task_type, "retrieval"),
                _values(rows, self.columns.instruction, None),
                strict=True,
            )
        )
        unique: dict[tuple[str, str, str | None], int] = {}
        positions = [unique.setdefault(key, len(unique)) for key in keys]
        vectors, tokens = self._vectors(list(unique))
        ids = rows.column(self.columns.id).to_pylist()
        contract_hash = self.embedder.contract_hash
        table = vector_table(
            ids,
            vectors[positions],
            contract_hash,
            self.model_id,
            sum(tokens),
            self.vector_dtype,
            taken_cuts(self.embedder),
        )
        return {self.done_folder: table}

    def _vectors(self, asked: list[Asked]) -> tuple[np.ndarray[Any, Any], list[int]]:
        contract_hash = self.embedder.contract_hash
        known = {} if self.known is None else self.known.find(asked, contract_hash, self.model_id)
        count_prefetched(self.embedder, [asked[number] for number in known], self.side)
        new = [number for number in range(len(asked)) if number not in known]
        if new:
            texts, task_types, instructions = zip(*(asked[number] for number in new), strict=True)
            made = self.embedder.embed(texts, self.side, task_types, instructions)
            known |= dict(zip(new, zip(*made, strict=True), strict=True))
        vectors, tokens = zip(*(known[number] for number in range(len(asked))), strict=True)
        return np.stack(vectors), list(tokens)


def _values(rows: pa.Table, column: str | None, default: str | None) -> list[Any]:
    return rows.column(column).to_pylist() if column else [default] * rows.num_rows


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
    model: EmbedderSource,
    side: Side,
    pool: PoolConfig,
    shard_rows: int,
    vector_dtype: StoredType = "float32",
    columns: TextColumns = TextColumns(),
    by_file: bool = False,
    ahead: Place | None = None,
) -> dict[str, int]:
    """Embed every row below ``source_folder`` into ``output/done_folder/part-*.parquet``; resumes by shard.

    Args:
        stage: name on the progress lines.
        source: place whose ``source_folder`` (or several) holds Parquet files with ``columns``.
        output: where the vectors go.
        done_folder: folder of the vector parts.
        model: opened once in every actor; its name is stamped on the files.
        side: whether the texts are queries or documents.
        pool: actors and what each reserves.
        shard_rows: rows per shard and output file.
        vector_dtype: stored type, ``float32`` or ``float16``.
        columns: which columns hold what.
        by_file: no file of vectors holds rows of two input files.
        ahead: where vectors of some of these queries stand already; see ``ahead.py``.

    Returns:
        ``{"rows": …, "tokens": …}``: rows written and real tokens embedded; where texts were cut also ``texts_cut`` and
        ``tokens_left_out``, of the distinct texts of each shard.
    """
    parts = run_sharded(
        stage=stage,
        source=source,
        source_folder=source_folder,
        output=output,
        done_folder=done_folder,
        shard_rows=shard_rows,
        worker=EmbeddingWorker,
        worker_arguments=lambda: dict(
            source=share_weights(model, pool),
            side=side,
            done_folder=done_folder,
            vector_dtype=vector_dtype,
            columns=columns,
            ahead=ahead,
        ),
        pool=pool,
        unit="texts",
        by_file=by_file,
    )
    return vector_counts(output, parts)


def vector_counts(place: Place, parts: list[str]) -> dict[str, int]:
    """Rows, embedded tokens and cut texts of vector files, from their footers."""
    footers = [place.parquet_footer(part) for part in parts]
    return {"rows": sum(rows for _, rows in footers), **cost_counts(schema for schema, _ in footers)}
