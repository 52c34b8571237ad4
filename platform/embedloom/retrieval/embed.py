"""Embedding a table of texts in an actor pool, shard by shard, and the query vectors that are made before the table is whole."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.compute.shards import Link, run_sharded
from embedloom.config.cluster import PoolConfig
from embedloom.core.prompting import Side, document_text
from embedloom.core.storage import Place
from embedloom.encoder.tokenizer import CutTexts, InstructionTooLong
from embedloom.retrieval.embedder import EmbedderSource, count_prefetched, share_weights, taken_cuts
from embedloom.retrieval.search import Matrix
from embedloom.retrieval.stored import StoredType, final_table, stored_vectors, vector_columns
from embedloom.retrieval.vector_files import CONTRACT_KEY, MODEL_KEY, cost_counts, cost_metadata

# Query vectors made ahead: while other rows are still being written, in the Ray Data pipeline that writes them.
#
#     generator actors ─► rows/part-N (task) ─► teacher actors ─► ahead/<teacher>/<round>/part-N
#
# Only the names of parts pass between the pools, so the object store holds neither rows nor vectors, and generators
# need not wait for teachers that cannot follow: what is written lies in files. Mining looks every query up by the
# digest of what the teacher was given and embeds only what is missing; a row that was refused later costs its vector
# and nothing else.


AHEAD_FOLDER = "ahead"  # beside the artefacts of a run, gone once mining is done
Asked = tuple[str, str, str | None]  # text, task type, instruction
_COLUMNS = ["query", "task_type", "instruction"]


@dataclass(frozen=True, slots=True)
class Ahead:
    """Who embeds rows while they are written, and where to.

    Attributes:
        place: folder of the vectors, one below it for each teacher.
        teachers: mining's, in order.
        pool: actors of each teacher, taken beside the generators' own.
    """

    place: Place
    teachers: tuple[EmbedderSource, ...]
    pool: PoolConfig

    def links(self, rows: Place, rows_folder: str, key: str) -> tuple[Link, ...]:
        """Pools that embed the queries of ``rows_folder/part-*.parquet``; vectors go below ``key``."""
        return tuple(
            Link(
                AheadWorker,
                {
                    "source": share_weights(teacher, self.pool),
                    "rows": rows.child(rows_folder),
                    "out": self.place.child(f"{number}/{key}"),
                },
                self.pool,
            )
            for number, teacher in enumerate(self.teachers)
        )


class AheadWorker:
    """Actor that embeds the queries of written parts."""

    def __init__(self, source: EmbedderSource, rows: Place, out: Place) -> None:
        self._embedder = source.open()
        self._model_id = source.name
        self._rows = rows
        self._out = out

    def __call__(self, name: str) -> None:
        """Write ``name`` with digest, vector and tokens of every different query; a part without rows has no file."""
        if self._out.exists(name):
            return
        table = self._rows.read_table(name, _COLUMNS)
        asked = list(dict.fromkeys(zip(*(table.column(c).to_pylist() for c in _COLUMNS), strict=True)))
        try:
            vectors, tokens = self._embed(asked)
        except InstructionTooLong:
            # Mining counts such queries among its rejects; here they are left out.
            asked = [one for one in asked if self._has_room(one)]
            vectors, tokens = self._embed(asked)
        if not asked:
            return
        columns = {
            "digest": pa.array([asked_digest(one) for one in asked], pa.binary(16)),
            **vector_columns(np.ascontiguousarray(vectors, dtype=np.float32), "float32"),
            "tokens": pa.array(tokens, pa.int32()),
        }
        metadata = {CONTRACT_KEY: self._embedder.contract_hash.encode(), MODEL_KEY: self._model_id.encode()}
        self._out.write_table(name, final_table(pa.table(columns), metadata))

    def _embed(self, asked: Sequence[Asked]) -> tuple[Matrix, Sequence[int]]:
        if not asked:
            return np.empty((0, 0), np.float32), []
        texts, task_types, instructions = zip(*asked, strict=True)
        return self._embedder.embed(texts, "query", task_types, instructions)

    def _has_room(self, one: Asked) -> bool:
        try:
            self._embed([one])
        except InstructionTooLong:
            return False
        return True


def asked_digest(asked: Asked) -> bytes:
    """128 bits of what a teacher is given."""
    return hashlib.blake2b(repr(asked).encode(), digest_size=16).digest()


class AheadVectors:
    """Looks vectors of one teacher up; 16 bytes a query in every actor."""

    def __init__(self, place: Place) -> None:
        """Read the digests of all files below ``place``."""
        self._place = place
        self._names = [name for name in place.files() if name.endswith(".parquet")]
        found = [_keys(place.read_table(name, ["digest"])) for name in self._names]
        lengths = [len(keys) for keys in found]
        keys = np.concatenate([np.empty(0, np.uint64), *found])
        files = np.repeat(np.arange(len(found), dtype=np.int32), lengths)
        rows = np.concatenate([np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in lengths)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._files, self._rows = keys[order], files[order], rows[order]

    def find(
        self, asked: Sequence[Asked], contract_hash: str, model_id: str
    ) -> dict[int, tuple[Matrix, int]]:
        """Vector [d] and tokens, by number in ``asked``, of those that are there from the same model and prompts."""
        digests = [asked_digest(one) for one in asked]
        keys = np.frombuffer(b"".join(digests), np.uint64)[::2]
        places = np.searchsorted(self._keys, keys)
        known = places < len(self._keys)
        known[known] = self._keys[places[known]] == keys[known]
        wanted = np.flatnonzero(known)
        found: dict[int, tuple[Matrix, int]] = {}
        for file in np.unique(self._files[places[wanted]]):
            table = self._place.read_table(self._names[file])
            metadata = table.schema.metadata or {}
            if (metadata.get(CONTRACT_KEY), metadata.get(MODEL_KEY)) != (
                contract_hash.encode(),
                model_id.encode(),
            ):
                continue
            here = wanted[self._files[places[wanted]] == file]
            rows = table.take(pa.array(self._rows[places[here]]))
            vectors = stored_vectors(rows, self._names[file])
            stored = zip(rows.column("digest").to_pylist(), rows.column("tokens").to_pylist(), strict=True)
            for number, vector, (digest, tokens) in zip(here, vectors, stored, strict=True):
                if digest == digests[number]:
                    found[int(number)] = (vector, tokens)
        return found


def _keys(table: pa.Table) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first half of each digest."""
    return np.frombuffer(b"".join(table.column("digest").to_pylist()), np.uint64)[::2]


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
        ahead: where vectors of some of these queries stand already; see ``embed.py``.

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
