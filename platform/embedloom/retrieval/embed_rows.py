"""Vectors of a ledger's rows: new texts go through the model shard by shard, then shared vectors are filled in.

A shard whose texts are all its own goes straight into ``vectors``. Of the others the own vectors go into ``own``,
and when all are there, every such shard is put together from ``own``, ``vectors`` and the earlier artefact. A
killed build keeps every finished file of both folders.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.config.use import EmbeddingConfig
from embedloom.engines.pool import stream
from embedloom.errors import DataError
from embedloom.progress import Progress
from embedloom.retrieval.embedder import EmbedderSource, taken_cuts
from embedloom.retrieval.fill_in import OWN_FOLDER, VECTORS_FOLDER, fill_in
from embedloom.retrieval.inputs import TextSource
from embedloom.retrieval.ledger import Ledger, origin_column
from embedloom.retrieval.scan import ROWS_FOLDER, Numbers, text_digest, texts_of
from embedloom.retrieval.search import check_vectors
from embedloom.retrieval.stored import dequantize, final_table, quantize, shorten, vector_columns
from embedloom.retrieval.vector_files import CONTRACT_KEY, MODEL_KEY, cost_counts, cost_metadata
from embedloom.storage import Place

_DTYPE_KEY, _SIDE_KEY, _DIMENSION_KEY = b"dtype", b"side", b"dimension"


class RowsWorker:
    """Actor that embeds the new texts of one shard."""

    def __init__(self, source: EmbedderSource, config: EmbeddingConfig, normalize: bool) -> None:
        self.embedder = source.open()
        self.model_id = source.name
        self.config = config
        self.normalize = normalize

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Vectors of the rows' texts in their stored type, checked after rounding.

        Raises:
            DataError: a vector that is zero or not finite, named by id.
            ConfigError: dimensions that the model does not have.
        """
        config = self.config
        texts = rows.column("text").to_pylist()
        vectors, tokens = self.embedder.embed(
            texts, config.side, [config.task_type] * len(texts), [config.instruction] * len(texts)
        )
        vectors = shorten(vectors, config.dimensions, self.normalize)
        check_vectors(vectors, f"model {self.model_id}", rows.column("id"))
        if config.dtype == "float16":  # a value beyond 65504 becomes infinite, a tiny vector zero
            check_vectors(
                dequantize(*quantize(vectors, config.dtype)),
                f"model {self.model_id}, as float16",
                rows.column("id"),
            )
        columns = {"id": rows.column("id"), "offset": rows.column("offset")}
        table = pa.table({**columns, **vector_columns(vectors, config.dtype)})
        metadata = {
            CONTRACT_KEY: self.embedder.contract_hash.encode(),
            MODEL_KEY: self.model_id.encode(),
            **cost_metadata(sum(tokens), taken_cuts(self.embedder)),
            _DTYPE_KEY: config.dtype.encode(),
            _SIDE_KEY: config.side.encode(),
            _DIMENSION_KEY: str(vectors.shape[1]).encode(),
        }
        return {OWN_FOLDER: final_table(table, metadata)}


@dataclass(frozen=True, slots=True)
class OwnTexts:
    """Reads the texts that a shard embeds; runs in a Ray task."""

    source: TextSource
    out: Place
    parts: tuple[str, ...]
    shard_rows: int
    shards: tuple[int, ...]

    def __call__(self, item: int) -> pa.Table:
        """id, offset in the shard, and text of the new texts of shard ``shards[item]``.

        Raises:
            DataError: the input was changed since the ledger was written.
        """
        shard = self.shards[item]
        rows = self.out.read_table(f"{ROWS_FOLDER}/{self.parts[shard]}")
        offsets = np.flatnonzero(origin_column(rows) == shard * self.shard_rows + np.arange(rows.num_rows))
        rows = rows.take(pa.array(offsets))
        texts = self._texts(np.asarray(rows.column("file")), np.asarray(rows.column("row")))
        for text, digest, name in zip(
            texts, rows.column("digest").to_pylist(), rows.column("id").to_pylist(), strict=True
        ):
            if text_digest(text) != digest:
                raise DataError(
                    f"{self.source.place.uri}: the text of id {name!r} was changed while it was being embedded; "
                    f"delete {self.out.uri} and run again"
                )
        columns = {"id": rows.column("id"), "offset": pa.array(offsets, pa.int64())}
        return pa.table({**columns, "text": pa.array(texts, pa.string())})

    def _texts(self, files: Numbers, rows: Numbers) -> list[str]:
        """Texts of (file, row), which ascend."""
        texts: list[str] = []
        for file in np.unique(files):
            mine = rows[files == file]
            table = self.source.place.read_rows(
                self.source.files[file][0], int(mine[0]), int(mine[-1]) + 1, self.source.columns
            )
            texts.extend(texts_of(table.take(pa.array(mine - mine[0])), self.source))
        return texts


def embed_rows(
    *,
    stage: str,
    source: TextSource,
    ledger: Ledger,
    out: Place,
    model: EmbedderSource,
    normalize: bool,
    config: EmbeddingConfig,
    pool: PoolConfig,
    previous: Place | None,
) -> dict[str, int]:
    """Write ``vectors/part-*.parquet`` of every shard that is missing; returns the ``cost_counts`` of all new texts.

    Args:
        stage: name on the progress lines.
        source: the texts.
        ledger: which row takes which vector.
        out: the artefact being built.
        model: opened once in every actor; its name is stamped on the files.
        normalize: whether the model's vectors have unit length.
        config: side, stored type and dimensions.
        pool: actors and what each reserves.
        previous: the earlier artefact that the ledger takes vectors from.
    """
    done = {
        name.rsplit("/", 1)[1]
        for folder in (VECTORS_FOLDER, OWN_FOLDER)
        for name in out.names(folder, ".parquet")
    }
    missing = [n for n, part in enumerate(ledger.parts) if ledger.own[n] and part not in done]
    todo = sum(ledger.own[n] for n in missing)
    total = sum(ledger.own)
    progress = Progress(stage, total, "texts", done=total - todo)
    if missing:
        items = stream(
            stage=stage,
            items=len(missing),
            read=OwnTexts(source, out, tuple(ledger.parts), ledger.shard_rows, tuple(missing)),
            write=_writer(out, ledger, missing),
            written=_written(out, ledger, missing),
            worker=RowsWorker,
            worker_arguments=dict(source=model, config=config, normalize=normalize),
            done_folder=OWN_FOLDER,
            pool=pool,
        )
        for item in items:
            progress.advance(ledger.own[missing[item]])
    fill_in(stage, ledger, out, previous)
    return _cost(out)


def _writer(out: Place, ledger: Ledger, missing: list[int]) -> Callable[[int, str, pa.Table], None]:
    def write(item: int, folder: str, table: pa.Table) -> None:
        shard = missing[item]
        if ledger.own[shard] == ledger.rows[shard]:
            folder, table = VECTORS_FOLDER, table.drop_columns(["offset"])
        out.write_table(f"{folder}/{ledger.parts[shard]}", table)

    return write


def _written(out: Place, ledger: Ledger, missing: list[int]) -> Callable[[int], bool]:
    def written(item: int) -> bool:
        part = ledger.parts[missing[item]]
        return out.exists(f"{VECTORS_FOLDER}/{part}") or out.exists(f"{OWN_FOLDER}/{part}")

    return written


def _cost(out: Place) -> dict[str, int]:
    return cost_counts(out.parquet_footer(name)[0] for name in out.names(VECTORS_FOLDER, ".parquet"))
