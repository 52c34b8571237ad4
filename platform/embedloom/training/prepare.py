"""Sources become token ids on disk once, before any worker starts.

Training then neither parses nor tokenizes: a worker maps the files and reads the rows of its share. Rows of one
source keep the source's order in parts of a few thousand, each written whole or not at all, so a killed preparation
goes on after its last whole part.
"""

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from embedloom.artefacts import fingerprint
from embedloom.config.training_data import TrainingSource
from embedloom.encoder.tokenizer import (
    CutTexts,
    formatted_ids,
    load_tokenizer,
    prompt_ids,
    room_problem,
)
from embedloom.errors import DataError
from embedloom.instructions import LABEL_TASK_TYPES, PromptContract, Side
from embedloom.ngrams import folded
from embedloom.storage import Place
from embedloom.trained_prompts import Prompt, PromptCounter
from embedloom.training.right_answers import KEY_SCHEMA, RightAnswers, seen_keys
from embedloom.training.sources import read_source
from embedloom.training.sources.example import SourceExample

PART_ROWS = 4096
_TOKENIZED_ROWS = 1024  # at a time
INDEX_FILE = "index.json"
_IDS = pa.list_(pa.int32())
PART_SCHEMA = pa.schema(
    [("id", pa.string()), ("lengths", _IDS), ("query", _IDS), ("documents", pa.list_(_IDS))]
)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of one example, and the keys of its texts as the model sees them."""

    id: str
    query: list[int]
    documents: list[list[int]]  # the positive first
    query_key: int
    rights: list[int]  # keys of all right answers, the positive first
    negatives: list[int]  # keys
    instructed: tuple[str, str]  # what stands before the query and the documents, as text
    prompt: Prompt
    dataset: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text."""
        return [len(self.query), *map(len, self.documents)]

    def with_negatives(self, most: int) -> "TokenRow":
        """The row with its first negatives, at most so many."""
        return replace(self, documents=self.documents[: 1 + most], negatives=self.negatives[:most])


class TextTokens:
    """Tokenizer and contract of a model folder, without its weights."""

    def __init__(self, folder: Path) -> None:
        self.contract = PromptContract.load(folder)
        self.tokenizer = load_tokenizer(folder)
        # Names of tasks decide no token: runs with other mixes go on sharing what their second stages read alike.
        prompts = self.contract.model_copy(update={"tasks": None, "default_task": None})
        self.identity = fingerprint(prompts.hash, self.tokenizer.backend_tokenizer.to_str())
        self._room_problem = lru_cache(maxsize=4096)(self._find_room_problem)
        self._prompt_ids = lru_cache(maxsize=4096)(lambda prompt: prompt_ids(self.tokenizer, prompt))

    def rows(self, rows: Sequence[SourceExample], cuts: CutTexts) -> list[TokenRow]:
        """Token ids and keys of examples; ``cuts`` takes note of what the limits leave out."""
        asked = [self._query(row, row.query) for row in rows]
        queries = formatted_ids(self.tokenizer, self.contract, asked, "query", cuts)
        documents = self._documents(rows, [[row.positive, *row.negatives] for row in rows], cuts)
        others = self._documents(rows, [list(row.others) for row in rows])
        asked_keys = iter(self._query_keys(rows, queries))
        keys = iter(
            self._document_keys(rows, [[*own, *more] for own, more in zip(documents, others, strict=True)])
        )
        found = []
        for row, query, own in zip(rows, queries, documents, strict=True):
            of_own, of_others = list(islice(keys, len(own))), list(islice(keys, len(row.others)))
            prompts = (self._query(row, ""), self._document(row, ""))
            rights, negatives = [of_own[0], *of_others], of_own[1:]
            key, prompt = next(asked_keys), self._prompt(row)
            found.append(TokenRow(row.id, query, own, key, rights, negatives, prompts, prompt, row.dataset))
        return found

    def swallowed(self, row: TokenRow) -> str | None:
        """Why a row's texts are cut down to their instruction, or nearly; None where they are not."""
        sides: tuple[tuple[Side, str, list[list[int]]], ...] = (
            ("query", row.instructed[0], [row.query]),
            ("document", row.instructed[1], row.documents),
        )
        for side, prompt, texts in sides:
            if any(len(ids) >= self.contract.max_tokens(side) for ids in texts):
                problem = self._room_problem(side, prompt)
                if problem is not None:
                    return problem
        return None

    def _find_room_problem(self, side: Side, prompt: str) -> str | None:
        return room_problem(self.tokenizer, self.contract, side, prompt)

    def _query_keys(self, rows: Sequence[SourceExample], queries: list[list[int]]) -> list[int]:
        """Keys of the queries without their instructions, which say how to ask, not what.

        A label is right for its task alone, though: the same text may have another one in the next.
        """
        bare = [self._bare(ids, self._query(row, "")) for row, ids in zip(rows, queries, strict=True)]
        tasks = [self._query(row, "") if row.task_type in LABEL_TASK_TYPES else "" for row in rows]
        return seen_keys(self.tokenizer, bare, tasks)

    def _document_keys(self, rows: Sequence[SourceExample], documents: list[list[list[int]]]) -> list[int]:
        prompts = [self._document(row, "") for row in rows]
        bare = [
            self._bare(ids, prompt) for prompt, own in zip(prompts, documents, strict=True) for ids in own
        ]
        return seen_keys(self.tokenizer, bare)

    def _bare(self, ids: list[int], prompt: str) -> list[int]:
        """Ids of a text without the prompt and the special tokens before it."""
        before = self._prompt_ids(prompt)
        same = (at for at, (own, other) in enumerate(zip(ids, before, strict=False)) if own != other)
        return ids[next(same, min(len(ids), len(before))) :]

    def _documents(
        self, rows: Sequence[SourceExample], texts: list[list[str]], cuts: CutTexts | None = None
    ) -> list[list[list[int]]]:
        formatted = [self._document(row, text) for row, own in zip(rows, texts, strict=True) for text in own]
        flat = iter(formatted_ids(self.tokenizer, self.contract, formatted, "document", cuts))
        return [list(islice(flat, len(own))) for own in texts]

    def _query(self, row: SourceExample, text: str) -> str:
        return self.contract.format(text, "query", row.task_type, row.instruction)

    def _document(self, row: SourceExample, text: str) -> str:
        return self.contract.format_opposite(text, row.task_type, row.instruction, row.document_instruction)

    def _prompt(self, row: SourceExample) -> Prompt:
        """What stands before the row's texts."""
        instruction = self.contract.instruction_for(row.task_type, row.instruction)
        opposite = self.contract.opposite_prompt(row.task_type, row.instruction, row.document_instruction)
        return Prompt(row.task_type, instruction, opposite or "")


class RowRules:
    """What makes a row an example, and what becomes of the others."""

    def __init__(self, negatives: int, repeat: bool, skip_bad: bool) -> None:
        self.negatives = negatives
        self._repeat = repeat
        self._skip_bad = skip_bad
        self.rejects: Counter[str] = Counter()
        self.cleaned: Counter[str] = Counter()  # negatives taken from rows that stay
        self.repeated = 0
        self.swallowed_by = ""  # the first of the instructions that are too long, with its numbers

    @property
    def least(self) -> int:
        """Negatives that a row must keep."""
        return min(1, self.negatives) if self._repeat else self.negatives

    def accept(self, source: TrainingSource, example: SourceExample, limit: int) -> bool:
        """Whether to keep a row as its source gives it, of whose negatives at most ``limit`` are used.

        Raises:
            DataError: a bad row, where bad rows are not to be skipped.
        """
        found = min(len(example.negatives), limit)
        problem = example.problem
        if problem is None and not example.query.strip():
            problem = ("no_query", "its query is empty")
        if problem is None and not example.positive.strip():
            problem = ("no_positive", "it has no positive")
        if problem is None and self.negatives and not found:
            problem = ("no_negatives", f"it has no negatives, {self.negatives} are wanted")
        if problem is None and found < self.least:
            problem = (
                "too_few_negatives",
                f"it has {found} negatives, {self.negatives} are wanted and repeat_negatives is off",
            )
        return problem is None or self.reject(source, example.id, *problem)

    def reject(self, source: TrainingSource, row_id: str, reason: str, detail: str) -> bool:
        """Count a bad row; always False.

        Raises:
            DataError: bad rows are not to be skipped.
        """
        if not self._skip_bad:
            raise DataError(
                f"source {source.name!r}: row {row_id!r}: {detail} ({reason}); "
                "allowed: correct the row, or training.bad_rows: skip"
            )
        self.rejects[reason] += 1
        return False

    def swallowed(self, problem: str) -> None:
        """Count a row whose instruction leaves no room for its text, whatever ``bad_rows`` says: one long instruction
        among thousands should not end a run, and one for all rows leaves the source without any, which does."""
        self.rejects["instruction_too_long"] += 1
        self.swallowed_by = self.swallowed_by or problem

    def without_wrong(self, example: SourceExample) -> bool:
        """Take the negatives that are none from a row; whether enough are left.

        A row that they leave without is counted and not refused, whatever ``bad_rows`` says: nothing is wrong with
        its form, but it would teach the model to tell a text from itself.
        """
        rights = {folded(text) for text in (example.positive, *example.others)}
        own = None if example.task_type in LABEL_TASK_TYPES else folded(example.query)
        reasons = [_not_negative(folded(text), rights, own) for text in example.negatives]
        kept = [text for text, reason in zip(example.negatives, reasons, strict=True) if reason is None]
        example.negatives[:] = kept
        return self._count([reason for reason in reasons if reason is not None], len(kept))

    def without_seen(self, row: TokenRow, wrong: Sequence[str | None]) -> TokenRow | None:
        """The row without the negatives that have a reason in ``wrong``; None if too few are left."""
        kept = [at for at, reason in enumerate(wrong) if reason is None]
        if not self._count([reason for reason in wrong if reason is not None], len(kept)):
            return None
        documents = [row.documents[0], *(row.documents[1 + at] for at in kept)]
        return replace(row, documents=documents, negatives=[row.negatives[at] for at in kept])

    def _count(self, wrong: Sequence[str], left: int) -> bool:
        if wrong and left < self.least:
            self.rejects[wrong[0]] += 1
            return False
        self.cleaned.update(wrong)
        return True


def _not_negative(text: str | int, rights: Collection[str | int], query: str | int | None) -> str | None:
    """Why a text is no negative of a row."""
    if text in rights:
        return "negative_is_positive"
    return "negative_is_query" if text == query else None


def prepare_source(
    source: TrainingSource,
    mined: Place | None,
    tokens: TextTokens,
    rules: RowRules,
    out: Place,
    known: RightAnswers | None = None,
) -> dict[str, Any]:
    """Write one source's token ids below ``out`` and return its index: rows per part and counts.

    Args:
        source: what to read.
        mined: the run's own mined examples.
        tokens: what makes the ids.
        rules: for rows; counts what it leaves out.
        out: folder of this source alone.
        known: right answers by other rows and sources, which are no negatives here; None: each row by itself.

    Raises:
        DataError: the source does not fit its format, or has no usable row.
    """
    if out.exists(INDEX_FILE):
        return out.read_json(INDEX_FILE)
    limit = rules.negatives if source.negatives is None else min(source.negatives, rules.negatives)
    parts: list[int] = []
    prompts = PromptCounter()
    total = 0
    tokenizing = _Tokenizing(source, limit, tokens, rules, known)
    with tempfile.TemporaryDirectory(prefix="embedloom-source-") as scratch:
        rows = _usable(source, limit, read_source(source, mined, Path(scratch)), rules)
        kept = tokenizing.rows(rows)
        while batch := list(islice(kept, PART_ROWS)):
            for row in batch:
                prompts.add(row.prompt, row.dataset)
            for kind, schema in (("part", PART_SCHEMA), ("keys", KEY_SCHEMA)):
                name = f"{kind}-{len(parts):06d}.arrow"
                table = _token_table(schema, batch)
                if not out.exists(name):
                    out.write_bytes(name, _ipc_bytes(table))
            parts.append(len(batch))
            total += sum(sum(row.lengths) for row in batch)
            rules.repeated += sum(rules.negatives - len(row.negatives) for row in batch)
    rejects = dict(rules.rejects)
    if not parts:
        why = f"; {rules.swallowed_by}" if rules.swallowed_by else ""
        raise DataError(f"source {source.name!r}: no usable row; rejects: {rejects}{why}")
    index = {
        "parts": parts, "rejects": rejects, "repeated_negatives": rules.repeated, "tokens": total,
        "prompts": prompts.as_json(),
        "cleaned": dict(rules.cleaned), "cut": asdict(tokenizing.cuts), "swallowed_by": rules.swallowed_by,
    }  # fmt: skip
    out.write_json(INDEX_FILE, index)
    return index


def _usable(
    source: TrainingSource, limit: int, rows: Iterator[SourceExample], rules: RowRules
) -> Iterator[SourceExample]:
    """The rows that can become examples by their texts."""
    return (row for row in rows if rules.without_wrong(row) and rules.accept(source, row, limit))


class _Tokenizing:
    """Rows become token ids, less those that the model's limits or other rows make useless."""

    def __init__(
        self,
        source: TrainingSource,
        limit: int,
        tokens: TextTokens,
        rules: RowRules,
        known: RightAnswers | None,
    ) -> None:
        self._source = source
        self._limit = limit
        self._tokens = tokens
        self._rules = rules
        self._known = known
        self.cuts = CutTexts()

    def rows(self, examples: Iterator[SourceExample]) -> Iterator[TokenRow]:
        """The usable rows, each with at most ``limit`` negatives."""
        while batch := list(islice(examples, _TOKENIZED_ROWS)):
            # Negatives beyond the limit cost as much as the others, and few rows ever need them.
            short = [replace(row, negatives=row.negatives[: self._limit]) for row in batch]
            for example, row in zip(batch, self._tokens.rows(short, self.cuts), strict=True):
                kept = self._kept(example, row)
                if kept is not None:
                    yield kept

    def _kept(self, example: SourceExample, row: TokenRow) -> TokenRow | None:
        problem = self._tokens.swallowed(row)
        if problem is not None:
            self._rules.swallowed(problem)
            return None
        if self._known is not None:
            # Also for the batch: what another row knows is right is no negative there either.
            row = replace(row, rights=list(dict.fromkeys([*row.rights, *self._known.of(row.query_key)])))
        wrong = self._wrong(example, row)
        if not any(wrong):
            return row
        if len(example.negatives) > self._limit:
            (whole,) = self._tokens.rows([example], CutTexts())
            row = replace(whole, rights=row.rights)
            wrong = self._wrong(example, row)
        kept = self._rules.without_seen(row, wrong)
        return None if kept is None else kept.with_negatives(self._limit)

    def _wrong(self, example: SourceExample, row: TokenRow) -> list[str | None]:
        """Why each negative of a row, as the model sees it, is none."""
        rights = set(row.rights)
        own = None if example.task_type in LABEL_TASK_TYPES else row.query_key
        return [_not_negative(key, rights, own) for key in row.negatives]


def _token_table(schema: pa.Schema, rows: list[TokenRow]) -> pa.Table:
    return pa.table({name: [getattr(row, name) for row in rows] for name in schema.names}, schema=schema)


def _ipc_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())
