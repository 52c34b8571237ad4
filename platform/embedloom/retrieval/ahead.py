"""Query vectors made ahead: while other rows are still being written, in the Ray Data pipeline that writes them.

    generator actors ─► rows/part-N (task) ─► teacher actors ─► ahead/<teacher>/<round>/part-N

Only the names of parts pass between the pools, so the object store holds neither rows nor vectors, and generators
need not wait for teachers that cannot follow: what is written lies in files. Mining looks every query up by the
digest of what the teacher was given and embeds only what is missing; a row that was refused later costs its vector
and nothing else.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.config.resources import PoolConfig
from embedloom.encoder.tokenizer import InstructionTooLong
from embedloom.engines.actors import Link
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.retrieval.exact import Matrix
from embedloom.retrieval.shared_weights import share_weights
from embedloom.retrieval.stored import final_table, stored_vectors, vector_columns
from embedloom.retrieval.vector_files import CONTRACT_KEY, MODEL_KEY
from embedloom.storage import Place

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
