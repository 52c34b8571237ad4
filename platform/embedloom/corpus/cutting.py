"""The last steps of a corpus: what stays of a range is cut into chunks and written, then gathered into parts of one size."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.compute.shards import Shard
from embedloom.core.schemas import GRADE, SCHEMAS, content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.corpus.chunk import Chunk, Chunker
from embedloom.corpus.clean import SourceRow
from embedloom.corpus.exchange import BATCH_ROWS, Counts, read_piece, read_rows, received, write_rows
from embedloom.corpus.questions import (
    SPLIT_REJECTS,
    SPLITS,
    Settled,
    own_questions,
    split_of,
    write_rejects,
)
from embedloom.corpus.reading import REJECT_SCHEMA, ROW_SCHEMA, Work, own_rows, sorted_name
from embedloom.encoder.registry import NodeModel, local_folder

PART_ROWS = 10_000
CUT_FOLDER = "cut"
_UNKNOWN_LANGUAGE = "und"  # ISO 639-3: undetermined
_ROWS_AT_ONCE = 512


@lru_cache(maxsize=2)
def chunker_of(model: Path | NodeModel, chunk_tokens: int, overlap_tokens: int) -> Chunker:
    """A chunker, loaded once in a process.

    Raises:
        DataError: the folder has no fast tokenizer.
    """
    return Chunker(local_folder(model), chunk_tokens, overlap_tokens)


@dataclass(slots=True)
class _Output:
    """Rows of one table that a range makes, held as Arrow but for the last few."""

    kind: str
    rows: list[dict[str, object]] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)

    def add(self, row: dict[str, object]) -> None:
        self.rows.append(row)
        if len(self.rows) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        self.tables.append(table_from_rows(self.kind, self.rows))
        self.rows = []

    def write(self, work: Work, folder: str, number: int) -> int:
        self._flush()
        schema = SCHEMAS[self.kind].arrow()
        return write_rows(work.place, f"{CUT_FOLDER}/{folder}/{number:06d}.arrow", schema, self.tables)


def cut_range(item: None, number: int, work: Work, model: Path | NodeModel) -> Counts:
    """Write the documents, chunks and pairs of a range; a pair names its document's first chunk."""
    size, overlap = work.config.chunk_tokens, work.config.chunk_overlap_tokens
    chunker = None if size is None else chunker_of(model, size, overlap)
    outputs = {f"documents/{split}": _Output("documents") for split in SPLITS}
    outputs |= {f"pairs/{split}": _Output("pairs") for split in SPLITS}
    outputs["chunks"] = _Output("chunks")
    questions = own_questions(work, number)
    rejects: list[dict[str, object]] = []
    counts = Counter[str]()
    for place, chunks in _chunked(work, number, chunker):
        row = chunks[0].row
        split = split_of(row.group, work.config.split, work.seed)
        for index, chunk in enumerate(chunks, start=1):
            if len(chunks) > 1:
                outputs["chunks"].add(_place(chunk, index, chunks))
            outputs[f"documents/{split}"].add(_document(chunk.row))
        counts["tokens"] += sum(chunk.tokens for chunk in chunks)
        for question, other in questions.get(place, ()):
            if other is None:
                outputs[f"pairs/{split}"].add(_pair(row, question))
                counts["moved"] += question["moved"]
            else:
                detail = f"{question['text']!r} of {question['source']} is asked in {other}"
                document_id = chunks[0].document_id or row.id
                rejects.append({"id": document_id, "reason": "query_in_other_split", "detail": detail})
    write_rejects(work, SPLIT_REJECTS, number, rejects)
    counts["query_in_other_split"] = len(rejects)
    return {**counts, "rows": {name: output.write(work, name, number) for name, output in outputs.items()}}


def _chunked(work: Work, number: int, chunker: Chunker | None) -> Iterator[tuple[int, list[Chunk]]]:
    """The place of every row that stays, and its chunks."""
    dropped = Settled.of(work, number).stays
    first = 0
    for table in read_rows(work.place, sorted_name(number), ROW_SCHEMA):
        for start in range(0, table.num_rows, _ROWS_AT_ONCE):
            part = table.slice(start, _ROWS_AT_ONCE)
            places = np.arange(first + start, first + start + part.num_rows)
            stays = [place not in dropped for place in places.tolist()]
            rows = list(own_rows(part.filter(pa.array(stays))))
            chunks: Iterator[list[Chunk]] = iter([Chunk(row, 0)] for row in rows)
            if chunker is not None:
                chunks = chunker.cut(rows)
            yield from zip(places[stays].tolist(), chunks, strict=True)
        first += table.num_rows


def _document(row: SourceRow) -> dict[str, object]:
    return {"id": row.id, "text": row.text, "title": row.title, "lang": row.lang, "source": row.source}


def _place(chunk: Chunk, number: int, chunks: Sequence[Chunk]) -> dict[str, object]:
    return {
        "id": chunk.row.id,
        "document_id": chunk.document_id,
        "chunk": number,
        "chunks": len(chunks),
    }


def _pair(row: SourceRow, asked: dict[str, Any]) -> dict[str, object]:
    return {
        "id": content_id(asked["text"], row.id),
        "query": asked["text"],
        "document_id": row.id,
        "task_type": "retrieval",
        "instruction": asked["instruction"],
        "lang": asked["lang"] or _UNKNOWN_LANGUAGE,
        "document_lang": row.lang or _UNKNOWN_LANGUAGE,
        "origin": "public",
        # A plain "relevant" says nothing, so that pairs without grades keep their bytes.
        "attributes": None if asked["grade"] == 1 else json.dumps({GRADE: asked["grade"]}),
        "dataset": asked["dataset"] or None,
    }


# Rejects of reading and of repeated questions lie where others noted them; each range or piece puts its own in order.


def order_rejects(item: None, number: int, work: Work, folder: str) -> Counts:
    """Write the rejects sent to a piece or range in the order of the rows that they are about."""
    found = received(work.place, folder, number, REJECT_SCHEMA).sort_by("at").drop_columns(["at"])
    schema = SCHEMAS["rejects"].arrow()
    rows = write_rows(work.place, f"{CUT_FOLDER}/{folder}/{number:06d}.arrow", schema, [found.cast(schema)])
    return {"rows": rows}


# Parts: the rows of all ranges in parts of one size, so that how the corpus was cut for the work leaves no trace.


def write_part(item: tuple[str, Shard], _: int, work: Work, kind: str, out: Place) -> Counts:
    """Write one part of a folder of the artefact out of the rows of ranges."""
    folder, shard = item
    schema = SCHEMAS[kind].arrow()
    tables = [table for piece in shard.pieces for table in read_piece(work.place, piece, schema)]
    out.write_table(f"{folder}/{shard.part}", pa.concat_tables(tables).combine_chunks())
    return {}
