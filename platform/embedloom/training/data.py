"""Training data on disk: the rows of all sources as token ids, prepared once before any worker starts, read row by row."""

import hashlib
import math
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from embedloom.compute.shards import Piece, Shard, Tasks, plan_shards, run_here
from embedloom.config.training import DistillationConfig, SourceDistillation, TrainingConfig, TrainingSource
from embedloom.core.artefacts import Artefact, fingerprint
from embedloom.core.progress import Progress, note
from embedloom.core.prompting import LABEL_TASK_TYPES, PromptContract, Side
from embedloom.core.storage import Place
from embedloom.core.text import folded, hash64, mix
from embedloom.core.trained_prompts import Prompt, PromptCounter, TrainedPrompt, source_prompts
from embedloom.encoder.registry import NodeModel, local_folder
from embedloom.encoder.tokenizer import CutTexts, formatted_ids, load_tokenizer, prompt_ids, room_problem
from embedloom.errors import DataError
from embedloom.training.sources import (
    SourceExample,
    example_files,
    is_scored,
    no_rows,
    read_example_rows,
    read_source,
    reads_by_range,
    row_table,
    rows_of_table,
    source_bytes,
    source_state,
    with_absolute_paths,
)

# One example as the model sees it: token ids of a query, its positive and its negatives.


@dataclass(frozen=True, slots=True)
class Teaching:
    """What a teacher says of an example's documents, and how much that counts."""

    scores: list[float]  # over the teacher's temperature; NaN: none
    temperature: float  # of the model's similarities
    weight: float


@dataclass(frozen=True, slots=True)
class Group:
    """Token ids of one example: the query, then the documents, positive first."""

    id: str
    query: list[int]
    documents: list[list[int]]
    query_key: int | None = (
        None  # of the texts as the model sees them, see ``right_answers``; None: of their ids
    )
    document_keys: list[int] | None = None
    right_keys: list[int] | None = None  # of all right answers to the query; None: of its own positive
    teaching: Teaching | None = None  # of all groups of a batch, or of none

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text of the group."""
        return [len(self.query), *(len(document) for document in self.documents)]

    @property
    def tokens(self) -> int:
        """Real tokens of the group."""
        return sum(self.lengths)


def compute_cost(lengths: Sequence[int], hidden_size: int) -> float:
    """Work of texts of these lengths, in token units: n (1 + n / 6h) each.

    A Llama layer's matrix products take about 24 h² FLOPs a token and attention 4 h n (n: the text's length), so
    attention adds n / 6h: 2 % at 512 tokens and h = 4096, and 30 % at 512 tokens and h = 288.
    """
    return sum(length * (1 + length / (6 * hidden_size)) for length in lengths)


# Which documents answer which query, over all rows and sources of a mix: none of them is a negative of it.
#
# Texts are compared as the model sees them: their token ids, cut to the limit, read back, without case and blanks. A
# text is a key of 63 bits; among 10 million texts two different ones share a key with a chance of about 10^-5.


Keys = np.ndarray[Any, np.dtype[np.int64]]
_LISTS = pa.list_(pa.int64())
# One row an example, part for part as the token ids: the query, its right answers with the positive first, its negatives.
KEY_SCHEMA = pa.schema([("query_key", pa.int64()), ("rights", _LISTS), ("negatives", _LISTS)])


def seen_keys(
    tokenizer: Any, token_ids: Sequence[Sequence[int]], marks: Sequence[str] | None = None
) -> list[int]:
    """Key of each text as the model sees it; texts with different ``marks`` never share one."""
    texts = tokenizer.backend_tokenizer.decode_batch(
        [list(ids) for ids in token_ids], skip_special_tokens=False
    )
    return [
        hash64(f"{mark}\0{folded(text)}") >> 1
        for text, mark in zip(texts, marks or [""] * len(texts), strict=True)
    ]


class RightAnswers:
    """Right answers of the queries that have several, found by query; those of a row alone it knows itself."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        """Gather.

        Args:
            tables: of ``KEY_SCHEMA``, of every source of the mix.
        """
        queries, rights = (np.concatenate(found) for found in zip(*map(_pairs, tables), strict=True))
        _, first = np.unique(_joined(queries, rights), return_index=True)
        queries, rights = queries[first], rights[first]
        names, counts = np.unique(queries, return_counts=True)
        several = np.flatnonzero(np.isin(queries, names[counts > 1]))
        order = several[np.lexsort((rights[several], queries[several]))]
        self._queries, self._rights = queries[order], rights[order]
        self._pairs = _joined(self._queries, self._rights)

    def of(self, query: int) -> list[int]:
        """All right answers of a query; nothing where no query of the mix has more than one."""
        first, last = np.searchsorted(self._queries, [query, query + 1])
        return [int(key) for key in self._rights[first:last]]

    def touches(self, table: pa.Table) -> bool:
        """Whether a row of a source has a negative that is a right answer by another row."""
        queries = _column(table, "query_key")
        counts, negatives = _flat(table, "negatives")
        owners = np.repeat(np.arange(len(queries)), counts)
        return bool(np.isin(_joined(queries[owners], negatives), self._pairs).any())

    def table(self) -> pa.Table:
        """Of ``KEY_SCHEMA``, what makes the same right answers again: a row for each of a query's."""
        each = np.arange(len(self._rights) + 1, dtype=np.int32)
        none = pa.ListArray.from_arrays(np.zeros(len(each), np.int32), pa.array([], pa.int64()))
        rights = pa.ListArray.from_arrays(each, self._rights)
        return pa.table([pa.array(self._queries), rights, none], schema=KEY_SCHEMA)

    @property
    def digest(self) -> str:
        """Sixteen hex digits over all of them."""
        return hashlib.blake2b(self._queries.tobytes() + self._rights.tobytes(), digest_size=8).hexdigest()


def _pairs(table: pa.Table) -> tuple[Keys, Keys]:
    counts, rights = _flat(table, "rights")
    return np.repeat(_column(table, "query_key"), counts), rights


def _column(table: pa.Table, name: str) -> Keys:
    return np.asarray(table.column(name).combine_chunks(), dtype=np.int64)


def _flat(table: pa.Table, name: str) -> tuple[Keys, Keys]:
    """Length of each list of a column, and all their values."""
    column = table.column(name).combine_chunks()
    return np.asarray(column.value_lengths(), dtype=np.int64), np.asarray(column.flatten(), dtype=np.int64)


def _joined(queries: Keys, documents: Keys) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """One key of a query and a document."""
    return mix(mix(queries.astype(np.uint64)) ^ documents.astype(np.uint64))


# Sources become token ids on disk once, before any worker starts.
#
# Training then neither parses nor tokenizes: a worker maps the files and reads the rows of its share. Rows of one
# source keep the source's order in parts of a few thousand, each written whole or not at all.
#
#     source ─► ranges of its rows, a task each: token ids, then counts ─► parts of equal length, a task each ─► index
#
# A core tokenizes 0.24 to 0.30 million tokens a second (512-token texts), so the 18 billion of the published recipe's first
# stage are twenty hours of one core: tasks on all CPUs of the cluster do them, before any GPU is asked for. A range is cut by
# row number alone, and done when its counts are there: a killed preparation does again what was under way. The driver holds
# counts. Files and index are those of one process that reads the source from its first row to its last.


PART_ROWS = 4096
_FEW_RANGES = 2
_SMALL_BYTES = 64 << 20
_TOKENIZED_ROWS = 1024  # at a time
INDEX_FILE = "index.json"
ROWS_FOLDER = "_rows"  # of a source that ranges are cut from, and
RANGES_FOLDER = "_ranges"  # what they became; both gone once the source is prepared
_IDS = pa.list_(pa.int32())
PART_SCHEMA = pa.schema(
    [("id", pa.string()), ("lengths", _IDS), ("query", _IDS), ("documents", pa.list_(_IDS))]
)
_KINDS = {"part": PART_SCHEMA, "keys": KEY_SCHEMA}
# One row an example, for sources whose teacher's scores are read: of the positive, then of each negative.
SCORE_SCHEMA = pa.schema([("scores", pa.list_(pa.float32()))])
Unscored = Literal["fail", "skip"]
Json = dict[str, Any]


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
    scores: list[float] = field(default_factory=list)  # a teacher's of the documents; empty: no teacher's

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text."""
        return [len(self.query), *map(len, self.documents)]

    def with_negatives(self, most: int) -> "TokenRow":
        """The row with its first negatives, at most so many."""
        return self.with_documents(range(min(most, len(self.negatives))))

    def with_documents(self, kept: Sequence[int]) -> "TokenRow":
        """The row with its positive and these of its negatives."""
        return replace(
            self,
            documents=[self.documents[0], *(self.documents[1 + at] for at in kept)],
            negatives=[self.negatives[at] for at in kept],
            scores=[self.scores[0], *(self.scores[1 + at] for at in kept)] if self.scores else [],
        )


class TextTokens:
    """Tokenizer and contract of a model folder, without its weights.

    Args:
        model: the folder, or what every node opens it by.
        document_tokens: of a document that are read; None: as many as the contract says.
    """

    def __init__(self, model: Path | NodeModel, document_tokens: int | None = None) -> None:
        self.model = model
        folder = local_folder(model)
        self.document_tokens = document_tokens
        shorter = {} if document_tokens is None else {"max_document_tokens": document_tokens}
        self.contract = PromptContract.load(folder).model_copy(update=shorter)
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
            found.append(
                TokenRow(row.id, query, own, key, rights, negatives, prompts, prompt, row.dataset, row.scores)
            )
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

    def __init__(
        self, negatives: int, repeat: bool, skip_bad: bool, unscored: Unscored | None = None
    ) -> None:
        self.negatives = negatives
        self.repeat = repeat
        self.skip_bad = skip_bad
        self.unscored = unscored  # what a row without a teacher's scores does; None: no scores are asked for
        self.rejects: Counter[str] = Counter()
        self.cleaned: Counter[str] = Counter()  # negatives taken from rows that stay
        self.swallowed_by = ""  # the first of the instructions that are too long, with its numbers

    @property
    def least(self) -> int:
        """Negatives that a row must keep."""
        return min(1, self.negatives) if self.repeat else self.negatives

    def accept(self, source: TrainingSource, example: SourceExample, limit: int) -> bool:
        """Whether to keep a row as its source gives it, of whose negatives at most ``limit`` are used.

        Raises:
            DataError: a bad row, where bad rows are not to be skipped, or one without the scores that are asked for.
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
        if problem is not None:
            return self.reject(source, example.id, *problem)
        if self.unscored == "fail" and not is_scored(example.scores, limit):
            raise DataError(
                f"source {source.name!r}: row {example.id!r} has no teacher's scores of its positive and its negatives, which "
                "training.distillation reads; allowed: rows with scores, training.distillation.unscored: skip, or "
                f"training.distillation.sources.{source.name}.weight: 0"
            )
        return True

    def reject(self, source: TrainingSource, row_id: str, reason: str, detail: str) -> bool:
        """Count a bad row; always False.

        Raises:
            DataError: bad rows are not to be skipped.
        """
        if not self.skip_bad:
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
        if example.scores:
            of_negatives = zip(example.scores[1:], reasons, strict=True)
            example.scores[1:] = [score for score, reason in of_negatives if reason is None]
        example.negatives[:] = kept
        return self._count([reason for reason in reasons if reason is not None], len(kept))

    def without_seen(self, row: TokenRow, wrong: Sequence[str | None]) -> TokenRow | None:
        """The row without the negatives that have a reason in ``wrong``; None if too few are left."""
        kept = [at for at, reason in enumerate(wrong) if reason is None]
        if not self._count([reason for reason in wrong if reason is not None], len(kept)):
            return None
        return row.with_documents(kept)

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


@dataclass(frozen=True, slots=True)
class SourceWork:
    """What tasks are told of a source; picklable.

    Attributes:
        source: with absolute paths.
        mined: the run's own mined examples.
        rows: where rows lie as they were read, of a source that only the driver's machine can read.
        model: whose tokenizer and contract make the ids.
        identity: of tokenizer and contract, so that a process keeps them loaded.
        rules: negatives wanted, whether they may repeat, whether bad rows are skipped.
        out: folder of the source's token ids.
        known: table with right answers by other rows and sources, which are no negatives here; None: each row by itself.
        unscored: what a row without a teacher's scores does; None: scores are not written.
        teacher: whose scores our own examples are to have; None: those that their negatives were chosen by.
        document_tokens: of a document that are read; None: as many as the contract says.
    """

    source: TrainingSource
    mined: Place | None
    rows: Place
    model: Path | NodeModel
    identity: str
    rules: tuple[int, bool, bool]
    out: Place
    known: str | None = None
    unscored: Unscored | None = None
    teacher: str | None = None
    document_tokens: int | None = None

    @property
    def kinds(self) -> dict[str, pa.Schema]:
        """Kinds of files that a part has, and their columns."""
        return _KINDS if self.unscored is None else _KINDS | {"scores": SCORE_SCHEMA}

    def row_rules(self) -> RowRules:
        """A fresh count of what becomes of its rows."""
        return RowRules(*self.rules, self.unscored)

    @property
    def limit(self) -> int:
        """Most negatives of a row that are used."""
        negatives = self.rules[0]
        return negatives if self.source.negatives is None else min(self.source.negatives, negatives)

    @property
    def examples(self) -> Place:
        """Of a source that is read by range."""
        place = self.mined if self.source.format == "mined" else Place(self.source.path or "")
        if place is None:
            raise DataError(f"source {self.source.name!r}: this stage was given no mined examples")
        return place

    def files(self) -> list[tuple[str, int]]:
        """(name, rows) of the files that ranges are cut from."""
        if reads_by_range(self.source):
            return example_files(self.source, self.examples)
        return [(name, rows) for name, rows in self.rows.read_json(INDEX_FILE)["files"]]

    def read(self, piece: Piece) -> Iterator[SourceExample]:
        """The examples of some rows of one file."""
        if reads_by_range(self.source):
            return read_example_rows(
                self.source, self.examples, piece.file, piece.start, piece.stop, self.teacher
            )
        return islice(rows_of_table(self.rows.read_table(piece.file)), piece.start, piece.stop)


def prepare_works(label: str, works: Sequence[SourceWork], tasks: Tasks) -> list[Json]:
    """Write the token ids of sources that are not there yet, and return the index of each: rows per part and counts.

    Args:
        label: of the stage, for progress lines.
        works: the sources.
        tasks: runs a function over many items, in order. What is small is done here, as a worker process takes longer to
            start: ten CPU seconds of imports.

    Raises:
        DataError: a source that does not fit its format, has no usable row, or a bad one where those are not skipped.
    """
    missing = list({work.out.uri: work for work in works if not work.out.exists(INDEX_FILE)}.values())
    unread = [work for work in missing if not reads_by_range(work.source)]
    large = [work for work in unread if source_bytes(work.source) >= _SMALL_BYTES]
    for work in unread:
        if work not in large:
            write_rows(work)
    for _ in tasks(label, write_rows, large, cpus=0, beside_driver=True) if large else ():
        pass
    ranges = [(work, shard) for work in missing for shard in plan_shards(work.files(), PART_ROWS)]
    counts: dict[str, list[Json]] = {work.out.uri: [] for work in missing}
    is_large = len(ranges) > _FEW_RANGES
    tasks = tasks if is_large else run_here
    progress = (
        Progress(f"{label}, tokens", sum(shard.rows for _, shard in ranges), "rows") if is_large else None
    )
    for (work, shard), one in zip(ranges, tasks(label, tokenize_range, ranges, cpus=1), strict=True):
        counts[work.out.uri].append(one)
        if progress is not None:
            progress.advance(shard.rows)
    for work in missing:
        _finish(label, work, counts[work.out.uri], tasks)
    for work in works:
        work.out.child(RANGES_FOLDER).remove()
    return [work.out.read_json(INDEX_FILE) for work in works]


def write_rows(work: SourceWork) -> None:
    """Read a source from its first row to its last, and write its rows for tasks to share.

    Raises:
        DataError: the source does not fit its format, or a bad row where those are not skipped.
    """
    if work.rows.exists(INDEX_FILE):
        return
    files: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory(prefix="embedloom-source-") as scratch:
        read = read_source(work.source, work.mined, Path(scratch), work.teacher)
        examples = (_refused_early(work, example) for example in read)
        while batch := list(islice(examples, PART_ROWS)):
            name = f"rows-{len(files):06d}.parquet"
            if not work.rows.exists(name):
                work.rows.write_table(name, row_table(batch))
            files.append((name, len(batch)))
    work.rows.write_json(INDEX_FILE, {"files": files})


def _refused_early(work: SourceWork, example: SourceExample) -> SourceExample:
    """The example; or what tokenizing would say of it, raised here and not after the whole source was read."""
    negatives, repeat, skip_bad = work.rules
    is_bad = not skip_bad and not RowRules(negatives, repeat, True).accept(work.source, example, work.limit)
    if is_bad or work.unscored == "fail":
        rules = work.row_rules()
        copy = replace(example, negatives=list(example.negatives), scores=list(example.scores))
        if rules.without_wrong(copy):
            rules.accept(work.source, copy, work.limit)
    return example


def tokenize_range(item: tuple[SourceWork, Shard]) -> Json:
    """Write token ids and keys of the usable rows of one range, and return its counts.

    Raises:
        DataError: a bad row, where those are not skipped.
    """
    work, shard = item
    done = f"{RANGES_FOLDER}/{shard.index:06d}.json"
    if work.out.exists(done):
        return work.out.read_json(done)
    rules = work.row_rules()
    known = None if work.known is None else _known(work.known)
    tokenizing = _Tokenizing(
        work.source, work.limit, _text_tokens(work.model, work.identity, work.document_tokens), rules, known
    )
    found = [example for piece in shard.pieces for example in work.read(piece)]
    kept = list(tokenizing.rows(_usable(work.source, work.limit, iter(found), rules)))
    if kept:
        for kind, schema in work.kinds.items():
            name = f"{RANGES_FOLDER}/{kind}-{shard.index:06d}.arrow"
            work.out.write_bytes(name, _ipc_bytes(_token_table(schema, kept)))
    prompts = Counter((row.prompt, row.dataset) for row in kept)
    counts = {
        "found": len(found), "rows": len(kept), "tokens": sum(sum(row.lengths) for row in kept),
        "repeated_negatives": sum(rules.negatives - len(row.negatives) for row in kept),
        "rejects": dict(rules.rejects), "cleaned": dict(rules.cleaned), "cut": asdict(tokenizing.cuts),
        "swallowed_by": rules.swallowed_by,
        "prompts": [[asdict(prompt), dataset, rows] for (prompt, dataset), rows in prompts.items()],
        "scored": sum(is_scored(row.scores, len(row.negatives)) for row in kept),
    }  # fmt: skip
    work.out.write_json(done, counts)
    return counts


def _finish(label: str, work: SourceWork, ranges: Sequence[Json], tasks: Tasks) -> None:
    """Cut the rows of all ranges into parts of one length, then write the index."""
    rejects, cleaned = Counter[str](), Counter[str]()
    prompts, cuts = PromptCounter(), CutTexts()
    for one in ranges:
        rejects.update(one["rejects"])
        cleaned.update(one["cleaned"])
        cuts.add(CutTexts(**one["cut"]))
        for prompt, dataset, rows in one["prompts"]:
            prompts.add(Prompt(**prompt), dataset, rows)
    swallowed_by = next((one["swallowed_by"] for one in ranges if one["swallowed_by"]), "")
    if not sum(one["found"] for one in ranges):
        raise no_rows(work.source)
    parts = plan_shards([(f"{number:06d}", one["rows"]) for number, one in enumerate(ranges)], PART_ROWS)
    if not parts:
        why = f"; {swallowed_by}" if swallowed_by else ""
        raise DataError(f"source {work.source.name!r}: no usable row; rejects: {dict(rejects)}{why}")
    for _ in tasks(label, gather_part, parts, work.out, tuple(work.kinds)):
        pass
    index = {
        "parts": [part.rows for part in parts], "rejects": dict(rejects),
        "repeated_negatives": sum(one["repeated_negatives"] for one in ranges),
        "tokens": sum(one["tokens"] for one in ranges), "prompts": prompts.as_json(),
        "cleaned": dict(cleaned), "cut": asdict(cuts), "swallowed_by": swallowed_by,
    }  # fmt: skip
    if work.unscored is not None:
        index["scored"] = sum(one["scored"] for one in ranges)
    work.out.write_json(INDEX_FILE, index)


def gather_part(part: Shard, out: Place, kinds: Sequence[str]) -> None:
    """Write one part out of the rows of its ranges, a file for each kind."""
    for kind in kinds:
        name = f"{kind}-{part.index:06d}.arrow"
        if out.exists(name):
            continue
        tables = []
        for piece in part.pieces:
            content = out.read_bytes(f"{RANGES_FOLDER}/{kind}-{piece.file}.arrow")
            whole = pa.ipc.open_file(pa.BufferReader(content)).read_all()
            tables.append(whole.slice(piece.start, piece.stop - piece.start))
        out.write_bytes(name, _ipc_bytes(pa.concat_tables(tables)))


@lru_cache(maxsize=2)
def _text_tokens(model: Path | NodeModel, identity: str, document_tokens: int | None) -> TextTokens:
    """Tokenizer and contract, loaded once in a process; ``identity`` tells another model in the same folder."""
    return TextTokens(model, document_tokens)


@lru_cache(maxsize=2)
def _known(name: str) -> RightAnswers:
    folder, _, base = name.rpartition("/")
    content = Place(folder).read_bytes(base)
    return RightAnswers([pa.ipc.open_file(pa.BufferReader(content)).read_all()])


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
            short = [
                replace(row, negatives=row.negatives[: self._limit], scores=row.scores[: 1 + self._limit])
                for row in batch
            ]
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


# Prepared examples of all sources, read row by row from memory-mapped files.
#
# Only the pages that are read take memory, and workers of one node share them, so the data may be larger than memory.
# Below an object store, parts are copied to the node's own disk when first needed.
#
# A part once mapped stays so: a batch's rows lie in as many parts as it has rows, and with a limit of 2,048 a stage of
# 2,887 parts opened some 600 files anew in every step and rank. A mapping is a handful of objects and no file descriptor,
# its pages belong to the system, and Linux allows 65,530 of them (vm.max_map_count): two a part of 4,096 rows.


class ExampleStore:
    """Rows numbered through all sources, in the order in which they are named."""

    def __init__(
        self,
        place: Place,
        folders: Mapping[str, str],
        negatives: int,
        teaching: Mapping[str, SourceDistillation] | None = None,
    ) -> None:
        """Read the sources' indexes.

        Args:
            place: below which they lie.
            folders: of each source, by its name.
            negatives: that every example shall have.
            teaching: how much each source's teacher counts; None: no teacher is asked.
        """
        self._teaching = teaching
        self._place = place
        self._folders = dict(folders)
        self._names = list(folders)
        self._negatives = negatives
        self.indexes = {name: place.child(folder).read_json(INDEX_FILE) for name, folder in folders.items()}
        self._part = cache(self._open_part)
        self.sizes = {name: int(sum(index["parts"])) for name, index in self.indexes.items()}
        self._starts = np.cumsum([0, *self.sizes.values()])

    @cached_property
    def keys(self) -> dict[str, pa.Table]:
        """Of every source, 8 bytes a text; read when first asked for, as who only counts rows needs none."""
        return {name: self._keys_of(name) for name in self._folders}

    @cached_property
    def rights(self) -> RightAnswers:
        """Right answers of the queries that have several."""
        return RightAnswers(list(self.keys.values()))

    def first_row(self, name: str) -> int:
        """Number of a source's first row."""
        return int(self._starts[self._names.index(name)])

    def ids(self, rows: Sequence[int]) -> list[str]:
        """``source/id`` of rows."""
        return [f"{name}/{self._value(name, at, 'id')}" for name, at in map(self._find, rows)]

    def lengths(self, rows: Sequence[int]) -> list[list[int]]:
        """Tokens of every text of every row: query, positive, then exactly ``negatives`` negatives."""
        found = [self._value(name, at, "lengths") for name, at in map(self._find, rows)]
        return [[*own[:2], *self._repeated(own[2:])] for own in found]

    def groups(self, rows: Sequence[int]) -> list[Group]:
        """Token ids of rows; negatives short of the number wanted repeat in turn, as NeMo's trainer does."""
        groups = []
        for name, at in map(self._find, rows):
            documents = self._value(name, at, "documents")
            query, rights, negatives = (self._value(name, at, column, "keys") for column in KEY_SCHEMA.names)
            groups.append(
                Group(
                    f"{name}/{self._value(name, at, 'id')}",
                    self._value(name, at, "query"),
                    [documents[0], *self._repeated(documents[1:])],
                    query,
                    [rights[0], *self._repeated(negatives)],
                    list(dict.fromkeys([*rights, *self.rights.of(query)])),
                    self._taught(name, at),
                )
            )
        return groups

    def _taught(self, name: str, at: int) -> Teaching | None:
        """A teacher's scores of one row's documents; negatives that repeat have none, as each counts once."""
        if self._teaching is None:
            return None
        own = self._teaching[name]
        weight, temperature, of_teacher = (
            own.weight or 0.0,
            own.temperature or 1.0,
            own.teacher_temperature or 1.0,
        )
        known = self._value(name, at, "scores", "scores")[: 1 + self._negatives] if weight else []
        scores = [*(score / of_teacher for score in known), *[math.nan] * (1 + self._negatives - len(known))]
        return Teaching(scores, temperature, weight)

    def _repeated(self, negatives: list[Any]) -> list[Any]:
        return [negatives[number % len(negatives)] for number in range(self._negatives)]

    def _find(self, row: int) -> tuple[str, int]:
        """Source of a row, and its number there."""
        source = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._names[source], int(row) - int(self._starts[source])

    def _value(self, name: str, at: int, column: str, kind: str = "part") -> Any:
        return self._part(name, kind, at // PART_ROWS).column(column)[at % PART_ROWS].as_py()

    def _keys_of(self, name: str) -> pa.Table:
        parts = range(len(self.indexes[name]["parts"]))
        return pa.Table.from_batches([self._part(name, "keys", number) for number in parts], KEY_SCHEMA)

    def _open_part(self, name: str, kind: str, number: int) -> pa.RecordBatch:
        path = self._local(f"{self._folders[name]}/{kind}-{number:06d}.arrow")
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)

    def _local(self, name: str) -> Path:
        if self._place.is_local:
            return self._place.local / name
        key = hashlib.sha256(self._place.uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"embedloom-parts-{key}" / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Workers of a node may fetch one part at once; each renames a whole file over the other's.
            temporary = path.with_name(f"_tmp-{os.getpid()}-{path.name}")
            temporary.write_bytes(self._place.read_bytes(name))
            temporary.replace(path)
        return path


# Prepared sources by content: what stages and candidates of a run read alike is tokenized once.
#
# A source's folder is named by everything that decides its token ids, so it can never belong to another config, and its
# index is written last, so one without index is unfinished. Two drivers that prepare the same source at once write the
# same bytes, each file by rename.


Prepared = dict[str, dict[str, Any]]  # index of each source, with its "folder"
# Which rows are drawn how often, and what the source is called, is decided later.
_NOT_READ = {"name", "weight", "cap", "license"}
_LEFT_OUT = {"rejects": "rows left out", "cleaned": "negatives taken out of rows that stay"}
_FORM = 2  # of the files; what an earlier version prepared is prepared again


def source_folder(
    source: TrainingSource, config: TrainingConfig, negatives: int, mined: Artefact | None, tokens: TextTokens
) -> str:
    """Name of the folder of a source's token ids, a hash of what decides them."""
    own = mined.fingerprint if source.format == "mined" and mined is not None else None
    rules = (negatives, config.repeat_negatives, config.bad_rows, PART_ROWS, _FORM)
    state = source_state(source)
    reading = {key: value for key, value in state["settings"].items() if key not in _NOT_READ}
    unscored = unscored_rule(config.distillation, source.name)
    teacher = teacher_of(config.distillation, source)
    scores = () if unscored is None else (unscored, *(() if teacher is None else (teacher,)))
    return fingerprint(reading, state["contents"], own, rules, tokens.identity, *scores)


def unscored_rule(section: DistillationConfig | None, source: str) -> Unscored | None:
    """What a source's rows without a teacher's scores do; None where its scores are not read."""
    return section.unscored if section is not None and section.reads(source) else None


def teacher_of(section: DistillationConfig | None, source: TrainingSource) -> str | None:
    """Which of several teachers' scores a source's rows are to have; other formats' rows have one teacher's."""
    own = source.format in ("mined", "examples")
    return section.teacher if section is not None and own and section.reads(source.name) else None


def prepare_sources(
    label: str,
    config: TrainingConfig,
    negatives: int,
    sources: Sequence[TrainingSource],
    mined: Artefact | None,
    model: Path | NodeModel,
    data: Place,
    tasks: Tasks = run_here,
    document_tokens: int | None = None,
) -> Prepared:
    """Prepare every source below ``data`` that is not yet there.

    Args:
        label: of the stage, for the progress lines.
        config: says what becomes of bad rows.
        negatives: wanted for every query.
        sources: of the stage.
        mined: the run's own mined examples.
        model: whose tokenizer and contract make the ids.
        data: folder with one subfolder a source, shared between stages and candidates.
        tasks: runs a function over many items, in order: in this process, or ``run_tasks``.
        document_tokens: of a document that are read; None: as many as the contract says.

    Raises:
        DataError: a source that does not fit its format, has no usable row, or fewer than its cap.
    """
    with _ONE_AT_A_TIME:
        tokens = TextTokens(model, document_tokens)
        return _Reader(label, config, negatives, mined, tokens, data, tasks).prepare(sources)


_ONE_AT_A_TIME = threading.Lock()  # candidates that are trained side by side read the same sources: once


class _Reader:
    """Prepares the sources of one stage."""

    def __init__(
        self,
        label: str,
        config: TrainingConfig,
        negatives: int,
        mined: Artefact | None,
        tokens: TextTokens,
        data: Place,
        tasks: Tasks,
    ) -> None:
        self._label = label
        self._config = config
        self._negatives = negatives
        self._mined = mined
        self._tokens = tokens
        self._data = data
        self._tasks = tasks

    def prepare(self, sources: Sequence[TrainingSource]) -> Prepared:
        """Each source by itself; then those anew whose negatives another's rows know to be right."""
        folders = {
            source.name: source_folder(source, self._config, self._negatives, self._mined, self._tokens)
            for source in sources
        }
        found = self._prepared(sources, folders, folders, None)
        parts = sum(len(index["parts"]) for index in found.values())
        tasks = self._tasks if parts > _FEW_RANGES else run_here
        (shared,) = tasks(self._label, find_shared_answers, [folders], self._data, cpus=1)
        touched = [source for source in sources if source.name in shared.touched]
        if touched:
            for source in touched:
                note(
                    self._label,
                    f"{source.name}: has negatives that are right answers by other rows; read again",
                )
            others = {source.name: f"{folders[source.name]}-{shared.digest}" for source in touched}
            found |= self._prepared(touched, others, folders, f"{self._data.uri}/{shared.file}")
            self._data.delete(shared.file)
        for source in sources:
            self._data.child(f"{folders[source.name]}/{ROWS_FOLDER}").remove()
            self._check(source, found[source.name])
        return {source.name: found[source.name] for source in sources}

    def _prepared(
        self,
        sources: Sequence[TrainingSource],
        folders: Mapping[str, str],
        read_below: Mapping[str, str],
        known: str | None,
    ) -> Prepared:
        """The indexes of sources; prepared with what other rows and sources know, they have folders of their own."""
        rules = (self._negatives, self._config.repeat_negatives, self._config.bad_rows == "skip")
        mined = self._mined.place.absolute() if self._mined is not None else None
        works = [
            SourceWork(
                with_absolute_paths(source),
                mined,
                self._data.child(f"{read_below[source.name]}/{ROWS_FOLDER}"),
                self._tokens.model,
                self._tokens.identity,
                rules,
                self._data.child(folders[source.name]),
                known,
                unscored_rule(self._config.distillation, source.name),
                teacher_of(self._config.distillation, source),
                self._tokens.document_tokens,
            )
            for source in sources
        ]
        before = {work.out.uri for work in works if work.out.exists(INDEX_FILE)}
        indexes = prepare_works(self._label, works, self._tasks)
        for work, index in zip(works, indexes, strict=True):
            size = f"{sum(index['parts']):,} examples, {index['tokens']:,} tokens"
            again = ", prepared before" if work.out.uri in before else ""
            note(self._label, f"{work.source.name}: {size}, {CutTexts(**index['cut'])}{again}")
        return {
            source.name: {**index, "folder": folders[source.name]}
            for source, index in zip(sources, indexes, strict=True)
        }

    def _check(self, source: TrainingSource, index: dict[str, Any]) -> None:
        """Say what was left out of a source, and raise DataError if its cap is above what is left."""
        rows = sum(index["parts"])
        for what in ("rejects", "cleaned"):
            if index[what]:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(index[what].items()))
                note(self._label, f"{source.name}: {_LEFT_OUT[what]}: {reasons}")
        if index.get("scored", rows) < rows:
            note(
                self._label,
                f"{source.name}: {rows - index['scored']:,} of {rows:,} examples have no teacher's scores and are trained "
                "by the contrastive loss alone",
            )
        if index["swallowed_by"]:
            note(self._label, f"{source.name}: instruction_too_long: {index['swallowed_by']}")
        if source.cap is not None and source.cap > rows:
            raise DataError(
                f"source {source.name!r}: cap is {source.cap:,}, but it has {rows:,} usable rows; rejects: {index['rejects']}"
            )


@dataclass(frozen=True, slots=True)
class SharedAnswers:
    """Sources with negatives that are right answers by other rows, and the file with all right answers, if there are any."""

    touched: list[str]
    digest: str
    file: str


def find_shared_answers(folders: Mapping[str, str], data: Place) -> SharedAnswers:
    """Compare what the prepared sources of a stage know of each other's queries; 8 bytes a text and source in memory."""
    store = ExampleStore(data, folders, 0)
    rights = store.rights
    touched = [name for name in folders if rights.touches(store.keys[name])]
    file = f"_right-answers-{rights.digest}.arrow"
    if touched:
        data.write_bytes(file, _ipc_bytes(rights.table()))
    return SharedAnswers(touched, rights.digest, file)


def drawn_prompts(
    sources: Sequence[TrainingSource], prepared: Prepared, drawn: Mapping[str, int]
) -> list[TrainedPrompt]:
    """The prompts of a stage's queries.

    Args:
        sources: of the stage.
        prepared: what was found in them.
        drawn: queries that the stage draws, by source.
    """
    found: list[TrainedPrompt] = []
    for source in sources:
        counted = prepared[source.name].get("prompts", {})
        several = source.dataset is None and source.format in ("mined", "examples")
        found += source_prompts(counted, source.name, several, drawn[source.name])
    return found


def preparation_counts(prepared: Prepared) -> dict[str, Any]:
    """Counts for the manifest: negatives that were repeated, rejects by reason; and, where there are any, negatives
    taken out of rows that stay (``cleaned``, by reason), texts cut at a limit (``texts_cut``, ``tokens_left_out``), ``tokens_unknown``, and
    rows from whose teacher nothing is learnt (``unscored``).
    """
    rejects: Counter[str] = Counter()
    cleaned: Counter[str] = Counter()
    cuts = CutTexts()
    for index in prepared.values():
        rejects.update(index["rejects"])
        cleaned.update(index["cleaned"])
        cuts.add(CutTexts(**index["cut"]))
    repeated = sum(index["repeated_negatives"] for index in prepared.values())
    counts: dict[str, Any] = {"repeated_negatives": repeated, "rejects": dict(rejects)}
    unscored = sum(sum(index["parts"]) - index["scored"] for index in prepared.values() if "scored" in index)
    silent = {"unscored": unscored} if unscored else {}
    return {**counts, **({"cleaned": dict(cleaned)} if cleaned else {}), **cuts.counts(), **silent}
