"""Embedding a table of texts in an actor pool, shard by shard, and the query vectors that are made before the table is whole."""

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.compute.shards import PLAIN, Handling, Link, run_sharded
from embedloom.config.cluster import PoolConfig
from embedloom.core.prompting import Side, document_text
from embedloom.core.storage import Place
from embedloom.encoder.tokenizer import CutTexts, InstructionTooLong
from embedloom.retrieval.embedder import (
    EmbedderSource,
    SplitSource,
    TokenEmbedder,
    count_prefetched,
    share_weights,
    taken_cuts,
    weights_of,
)
from embedloom.retrieval.search import Matrix
from embedloom.retrieval.stored import StoredType, final_table, stored_vectors, vector_columns
from embedloom.retrieval.tokenizing import opened_tokenizer
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
                weights_of(teacher),
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
        return self.find_digests([asked_digest(one) for one in asked], contract_hash, model_id)

    def find_digests(
        self, digests: Sequence[bytes], contract_hash: str, model_id: str
    ) -> dict[int, tuple[Matrix, int]]:
        """As ``find``, by what ``asked_digest`` gave."""
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


# On pools with GPUs texts are tokenized in the tasks that read them, one CPU each, wherever CPUs are free: on nodes without
# GPUs where there are some, else on those that the actors leave free (62 of 94 on a node of eight). Small models take a
# million tokens a second and GPU, a core makes a quarter of a million: in the actor itself the GPU would wait three quarters
# of the time. The actors get ids, and work on two shards at once, so that one is computed while the other is written up.
# Only our own encoder's texts: sentence-transformers tokenizes as a model's modules say, which come with its weights.


_CUTS = b"cuts"
_SHARDS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class RowTokens:
    """A shard of texts as ids, made where no model is; picklable.

    Attributes:
        source: pickled ``SplitSource``.
        side: whether the texts are queries or documents.
        columns: which columns of the input hold what.
    """

    source: bytes
    side: Side
    columns: TextColumns

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Per row its id, the number of its text, and where no row before has that text, its tokens and digest."""
        asked, positions = distinct_texts(rows, self.columns)
        tokenizer = opened_tokenizer(self.source)
        texts, task_types, instructions = zip(*asked, strict=True)
        token_ids = tokenizer.tokenize(texts, self.side, task_types, instructions)
        given: list[Any] = [None] * rows.num_rows
        digests: list[Any] = [None] * rows.num_rows
        for number, row in enumerate(np.unique(positions, return_index=True)[1].tolist()):
            given[row], digests[row] = token_ids[number], asked_digest(asked[number])
        columns = {
            "id": pa.array(rows.column(self.columns.id).to_pylist(), pa.string()),
            "text": pa.array(positions, pa.int32()),
            "tokens": pa.array(given, pa.list_(pa.int32())),
            "digest": pa.array(digests, pa.binary(16)),
        }
        cuts = json.dumps(asdict(tokenizer.cuts.take())).encode()
        return pa.table(columns).replace_schema_metadata({_CUTS: cuts})


def distinct_texts(rows: pa.Table, columns: TextColumns) -> tuple[list[Asked], list[int]]:
    """The different texts of a shard in order, each with task type and instruction, and each row's number among them."""
    keys = zip(
        _texts(rows, columns.texts),
        _values(rows, columns.task_type, "retrieval"),
        _values(rows, columns.instruction, None),
        strict=True,
    )
    unique: dict[Asked, int] = {}
    positions = [unique.setdefault(key, len(unique)) for key in keys]
    return list(unique), positions


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
        tokenized: bool = False,
    ) -> None:
        """Load the model.

        Args:
            source: of the model.
            side: whether the texts are queries or documents.
            done_folder: folder of the vectors.
            vector_dtype: stored type.
            columns: which columns of the input hold what.
            ahead: where vectors of some of these texts stand already.
            tokenized: whether shards come from ``RowTokens``.
        """
        self.embedder = source.open()
        self.model_id = source.name
        self.side: Side = side
        self.done_folder = done_folder
        self.vector_dtype = vector_dtype
        self.columns = columns
        self.known = None if ahead is None else AheadVectors(ahead)
        self._tokenized = tokenized

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Embed the shard's texts; identical texts, and those embedded ahead, go through the model once."""
        if self._tokenized:
            ids, positions, vectors, tokens, cuts = self._of_tokens(rows)
        else:
            asked, positions = distinct_texts(rows, self.columns)
            ids = rows.column(self.columns.id).to_pylist()
            vectors, tokens = self._vectors(asked)
            cuts = taken_cuts(self.embedder)
        table = vector_table(
            ids,
            vectors[positions],
            self.embedder.contract_hash,
            self.model_id,
            sum(tokens),
            self.vector_dtype,
            cuts,
        )
        return {self.done_folder: table}

    def _of_tokens(
        self, rows: pa.Table
    ) -> tuple[list[str], list[int], np.ndarray[Any, Any], list[int], CutTexts]:
        """Ids, numbers of texts, the texts' vectors and tokens, and what was cut of them, of a tokenized shard."""
        first = rows.filter(pc.is_valid(rows.column("tokens")))
        lists, digests = first.column("tokens").combine_chunks(), first.column("digest").to_pylist()
        flat, stops = np.asarray(lists.flatten()), np.cumsum(np.asarray(lists.value_lengths()))
        token_ids = cast("list[Sequence[int]]", np.split(flat, stops[:-1]))
        known = (
            {}
            if self.known is None
            else self.known.find_digests(digests, self.embedder.contract_hash, self.model_id)
        )
        new = [number for number in range(len(token_ids)) if number not in known]
        if new:
            embedder = cast("TokenEmbedder", self.embedder)
            made = embedder.embed_tokens([token_ids[number] for number in new])
            known |= {
                number: (vector, len(token_ids[number])) for number, vector in zip(new, made, strict=True)
            }
        vectors, tokens = zip(*(known[number] for number in range(len(token_ids))), strict=True)
        cuts = CutTexts(**json.loads((rows.schema.metadata or {})[_CUTS]))
        ids, positions = rows.column("id").to_pylist(), rows.column("text").to_pylist()
        return ids, positions, np.stack(vectors), list(tokens), cuts

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
    tokenize_apart: bool | None = None,
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
        tokenize_apart: whether the tasks that read texts tokenize them, for our own encoder; None: on pools with GPUs.

    Returns:
        ``{"rows": …, "tokens": …}``: rows written and real tokens embedded; where texts were cut also ``texts_cut`` and
        ``tokens_left_out``, and ``tokens_unknown`` to the tokenizer, of the distinct texts of each shard.
    """
    apart = isinstance(model, SplitSource) and (pool.gpus > 0 if tokenize_apart is None else tokenize_apart)
    arguments = {
        "side": side, "done_folder": done_folder, "vector_dtype": vector_dtype, "columns": columns, "ahead": ahead,
        "tokenized": apart,
    }  # fmt: skip
    parts = run_sharded(
        stage=stage,
        source=source,
        source_folder=source_folder,
        output=output,
        done_folder=done_folder,
        shard_rows=shard_rows,
        worker=EmbeddingWorker,
        worker_arguments=lambda: {"source": share_weights(model, pool), **arguments},
        pool=pool,
        unit="texts",
        by_file=by_file,
        handling=replace(_tokenizing(model, side, columns) if apart else PLAIN, weights=weights_of(model)),
    )
    return vector_counts(output, parts)


def _tokenizing(model: EmbedderSource, side: Side, columns: TextColumns) -> Handling:
    tokens = RowTokens(pickle.dumps(model), side, columns)
    return Handling(prepare=tokens, prepare_cpus=1.0, in_flight=_SHARDS_AT_ONCE)


def vector_counts(place: Place, parts: list[str]) -> dict[str, int]:
    """Rows, embedded tokens and cut texts of vector files, from their footers."""
    footers = [place.parquet_footer(part) for part in parts]
    return {"rows": sum(rows for _, rows in footers), **cost_counts(schema for schema, _ in footers)}
