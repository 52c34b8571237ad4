"""Sources become token ids on disk once, before any worker starts.

Training then neither parses nor tokenizes: a worker maps the files and reads the rows of its share. Rows of one
source keep the source's order in parts of a few thousand, each written whole or not at all, so a killed preparation
goes on after its last whole part.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from embedloom.artefacts import fingerprint
from embedloom.config.training_data import TrainingSource
from embedloom.encoder.tokenizer import contract_ids, formatted_ids, load_tokenizer
from embedloom.errors import DataError
from embedloom.instructions import PromptContract
from embedloom.storage import Place
from embedloom.trained_prompts import Prompt, PromptCounter
from embedloom.training.sources import read_source
from embedloom.training.sources.example import LABEL_TASK_TYPES, SourceExample

PART_ROWS = 4096
INDEX_FILE = "index.json"
_IDS = pa.list_(pa.int32())
PART_SCHEMA = pa.schema(
    [("id", pa.string()), ("lengths", _IDS), ("query", _IDS), ("documents", pa.list_(_IDS))]
)


class TextTokens:
    """Tokenizer and contract of a model folder, without its weights."""

    def __init__(self, folder: Path) -> None:
        self.contract = PromptContract.load(folder)
        self.tokenizer = load_tokenizer(folder)
        # Names of tasks decide no token: runs with other mixes go on sharing what their second stages read alike.
        prompts = self.contract.model_copy(update={"tasks": None, "default_task": None})
        self.identity = fingerprint(prompts.hash, self.tokenizer.backend_tokenizer.to_str())

    def queries(self, rows: list[SourceExample]) -> list[list[int]]:
        """Ids of the rows' queries, with their instructions."""
        return contract_ids(
            self.tokenizer, self.contract, [row.query for row in rows], "query",
            [row.task_type for row in rows], [row.instruction for row in rows],
        )  # fmt: skip

    def documents(self, rows: list[SourceExample]) -> list[list[list[int]]]:
        """Ids of the rows' documents, the positive first."""
        texts = [self._text(row, text) for row in rows for text in (row.positive, *row.negatives)]
        flat = iter(formatted_ids(self.tokenizer, texts, self.contract.max_tokens("document")))
        return [list(islice(flat, 1 + len(row.negatives))) for row in rows]

    def prompt(self, row: SourceExample) -> Prompt:
        """What stands before the row's texts."""
        instruction = self.contract.instruction_for(row.task_type, row.instruction)
        return Prompt(row.task_type, instruction, self._document_instruction(row) or "")

    def _text(self, row: SourceExample, text: str) -> str:
        instruction = self._document_instruction(row)
        return self.contract.format(text, "query", row.task_type, instruction) if instruction else text

    def _document_instruction(self, row: SourceExample) -> str | None:
        """Passages and label names are bare; texts that stand opposite each other both carry the instruction."""
        if row.document_instruction:
            return row.document_instruction
        if row.document_instruction is None or row.task_type in LABEL_TASK_TYPES:
            return None
        return self.contract.prompt("document", row.task_type, row.instruction)


class RowRules:
    """What makes a row an example, and what becomes of the others."""

    def __init__(self, negatives: int, repeat: bool, skip_bad: bool) -> None:
        self.negatives = negatives
        self._repeat = repeat
        self._skip_bad = skip_bad
        self.rejects: Counter[str] = Counter()
        self.repeated = 0

    def accept(self, source: TrainingSource, example: SourceExample) -> bool:
        """Whether to keep a row.

        Raises:
            DataError: a bad row, where bad rows are not to be skipped.
        """
        found = len(example.negatives)
        problem = example.problem
        if problem is None and not example.query.strip():
            problem = ("no_query", "its query is empty")
        if problem is None and not example.positive.strip():
            problem = ("no_positive", "it has no positive")
        if problem is None and self.negatives and not found:
            problem = ("no_negatives", f"it has no negatives, {self.negatives} are wanted")
        if problem is None and found < self.negatives and not self._repeat:
            problem = (
                "too_few_negatives",
                f"it has {found} negatives, {self.negatives} are wanted and repeat_negatives is off",
            )
        if problem is None:
            self.repeated += max(0, self.negatives - found)
            return True
        if not self._skip_bad:
            raise DataError(
                f"source {source.name!r}: row {example.id!r}: {problem[1]} ({problem[0]}); "
                "allowed: correct the row, or training.bad_rows: skip"
            )
        self.rejects[problem[0]] += 1
        return False


def prepare_source(
    source: TrainingSource, mined: Place | None, tokens: TextTokens, rules: RowRules, out: Place
) -> dict[str, Any]:
    """Write one source's token ids below ``out`` and return its index: rows per part and counts.

    Raises:
        DataError: the source does not fit its format, or has no usable row.
    """
    if out.exists(INDEX_FILE):
        return out.read_json(INDEX_FILE)
    limit = rules.negatives if source.negatives is None else min(source.negatives, rules.negatives)
    parts: list[int] = []
    prompts = PromptCounter()
    total = 0
    with tempfile.TemporaryDirectory(prefix="embedloom-source-") as scratch:
        rows = _cut(source, limit, read_source(source, mined, Path(scratch)))
        kept = (row for row in rows if rules.accept(source, row))
        while batch := list(islice(kept, PART_ROWS)):
            table = _token_table(tokens, batch)
            for row in batch:
                prompts.add(tokens.prompt(row), row.dataset)
            name = f"part-{len(parts):06d}.arrow"
            if not out.exists(name):
                out.write_bytes(name, _ipc_bytes(table))
            parts.append(len(batch))
            total += pa.compute.sum(table.column("lengths").combine_chunks().flatten()).as_py()
    rejects = dict(rules.rejects)
    if not parts:
        raise DataError(f"source {source.name!r}: no usable row; rejects: {rejects}")
    index = {
        "parts": parts, "rejects": rejects, "repeated_negatives": rules.repeated, "tokens": total,
        "prompts": prompts.as_json(),
    }  # fmt: skip
    out.write_json(INDEX_FILE, index)
    return index


def _cut(source: TrainingSource, limit: int, rows: Iterator[SourceExample]) -> Iterator[SourceExample]:
    """Each row with at most ``limit`` of its own negatives."""
    for row in rows:
        if len(row.negatives) > limit:
            del row.negatives[limit:]
        yield row


def _token_table(tokens: TextTokens, rows: list[SourceExample]) -> pa.Table:
    queries, documents = tokens.queries(rows), tokens.documents(rows)
    return pa.table(
        {
            "id": [row.id for row in rows],
            "lengths": [[len(q), *map(len, d)] for q, d in zip(queries, documents, strict=True)],
            "query": queries,
            "documents": documents,
        },
        schema=PART_SCHEMA,
    )


def _ipc_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())
