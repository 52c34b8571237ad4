"""From attempts to requests, and from answers to rows or rejects: what runs in Ray tasks before and after an engine's actor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from embedloom.compute.generation import (
    ANSWERS,
    GenerationRequest,
    GenerationResult,
    read_results,
    request_table,
    side_by_side,
)
from embedloom.config.synthesis import (
    FamilyConfig,
    QualityConfig,
    Sampling,
    SynthesisConfig,
    TaskFamilyConfig,
)
from embedloom.core.prompting import document_text
from embedloom.core.schemas import SCHEMAS, table_from_rows
from embedloom.core.storage import Place
from embedloom.core.text import hash64
from embedloom.synthesis.attempts import read_attempts
from embedloom.synthesis.checks import ContaminationIndex, RowContext, check_row, load_index
from embedloom.synthesis.duplicates import exact_key, signature
from embedloom.synthesis.families.base import (
    Ask,
    Attempt,
    ExtractingFamily,
    Family,
    Reject,
    Row,
    read_json,
    reject,
    row_id,
)
from embedloom.synthesis.families.registry import FAMILIES
from embedloom.synthesis.families.written import ask_tasks, tasks_of
from embedloom.synthesis.prompt import Prompt
from embedloom.synthesis.prompts_used import sampling_of
from embedloom.synthesis.quotas import Cell, Tally
from embedloom.synthesis.refusals import ROWS_FOLDER

# Why a row is not kept: every reason there is, with its meaning for the report.


REASONS = {
    # the engine
    "engine_error": "the engine refused the request: the prompt was too long, or it failed on it",
    "truncated": "max_new_tokens ended the answer before its JSON did",
    "invalid_json": "the answer is not JSON",
    "schema": "JSON of another shape than the prompt asks for",
    # the text itself
    "unusable_characters": "a text holds control characters",
    "empty": "a text has no letter",
    "too_short": "a text is below the length bound",
    "too_long": "a text is above the length bound, or cut off by it",
    "language": "a text is in another language than asked for",
    # against the prompt, the document and the other texts of the row
    "copies_document": "the query stands in the document word for word",
    "echoes_prompt": "a text repeats what the prompt says",
    "repeats_itself": "two texts of the row that must differ are the same",
    "label_leak": "a word of the label stands in the text to classify",
    "untranslated": "a translation is the same as its source",
    "no_question": "the document holds no question of its own",
    # against other rows
    "duplicate": "another row has the same text",
    "near_duplicate": "another row has nearly the same text",
    "contamination": "shares text with an evaluation set",
    "round_trip": "the teacher does not find the document for the query",
    "judge": "the judge's grade is below the threshold",
}


# From one answer to rows: JSON, schema, the family's reading, then every check that looks at a row alone. Pure.


def read_answer(
    result: GenerationResult,
    ask: Ask,
    attempt: Attempt,
    family: Family[Any],
    prompt: Prompt,
    options: FamilyConfig,
    quality: QualityConfig,
    guard: ContaminationIndex | None = None,
) -> list[Row | Reject]:
    """Rows and rejects of one answer, always ``family.asked_rows(options)`` of them.

    Args:
        result: what the engine returned.
        ask: what it was asked.
        attempt: the request behind it.
        family: reads the answer.
        prompt: asked with.
        options: the family's section.
        quality: which checks run.
        guard: index of evaluation texts, if rows are held against one.
    """
    answer = read_json(result, ask)
    if isinstance(answer, Reject):
        return [answer] * family.asked_rows(options)
    context = RowContext(attempt, quality, guard, tuple(message.content for message in prompt.messages))
    return [_checked(row, context) for row in family.rows(attempt, answer, prompt, options)]


def read_extracted(
    attempt: Attempt,
    family: Family[Any],
    options: FamilyConfig,
    quality: QualityConfig,
    guard: ContaminationIndex | None = None,
) -> list[Row | Reject]:
    """Rows that stand in the attempt's document, checked as written ones are.

    Raises:
        TypeError: the family extracts nothing; the caller's mistake.
    """
    if not isinstance(family, ExtractingFamily):
        raise TypeError(f"{family.name} asks an LLM")
    context = RowContext(attempt, quality, guard, ())
    return [_checked(row, context) for row in family.extract(attempt, options)]


def read_tasks(
    result: GenerationResult, ask: Ask, prompt: Prompt, options: TaskFamilyConfig
) -> list[str | Reject]:
    """Task sentences of one answer of step 1, always ``options.tasks_per_answer`` items."""
    answer = read_json(result, ask)
    if isinstance(answer, Reject):
        return [answer] * options.tasks_per_answer
    return [_task(task, prompt) for task in tasks_of(answer, options)]


def _task(task: str | Reject, prompt: Prompt) -> str | Reject:
    lines = [line for message in prompt.messages for line in message.content.splitlines()]
    if isinstance(task, str) and _says(lines, task):
        return reject("echoes_prompt", task)
    return task


def _says(lines: Sequence[str], task: str) -> bool:
    return any(task.casefold() in line.casefold() for line in lines)


def _checked(row: Row | Reject, context: RowContext) -> Row | Reject:
    return row if isinstance(row, Reject) else check_row(row, context) or row


REJECTS_FOLDER = "rejects"

# What a row carries until it is final: its place in its cell, and what it is compared with other rows by.
STEP_FIELDS = (
    pa.field("family", pa.string()),
    pa.field("ordinal", pa.int64()),
    pa.field("number", pa.int64()),
    pa.field("exact_key", pa.uint64()),
    pa.field("signature", pa.binary()),
    pa.field("document_text", pa.string()),  # for the judge; null without one
)
STEP_SCHEMA = pa.schema([*SCHEMAS["pairs"].arrow(), *STEP_FIELDS])
TASK_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "family", "generator", "lang", "text", "prompt_hash")),
        ("ordinal", pa.int64()),
        ("number", pa.int64()),
        ("exact_key", pa.uint64()),
        ("signature", pa.binary()),  # always null: tasks are told apart by their text alone
    ]
)
_ENGINE_SEED_BITS = 0x7FFFFFFF  # engines take 31 bits
_Outcomes = Iterable[tuple[Attempt, Sequence[Row | Reject], GenerationResult | None]]


def build_request(attempt: Attempt, ask: Ask, sampling: Sampling) -> GenerationRequest:
    """One request, with a sampling seed of its own."""
    return GenerationRequest(
        id=attempt.id,
        messages=ask.messages,
        seed=attempt.seed & _ENGINE_SEED_BITS,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.sampling_temperature,
        top_p=sampling.top_p,
        json_schema=ask.json_schema,
    )


@dataclass(frozen=True)
class RowMaker:
    """Turns one generator's attempts into rows; picklable, the same in every task.

    Attributes:
        families: section per family key.
        prompts: prompt per family key; none for families that ask no LLM.
        config: the whole section.
        guard: file of the index of evaluation texts, if rows are held against one.
    """

    families: Mapping[str, FamilyConfig]
    prompts: Mapping[str, Prompt]
    config: SynthesisConfig
    guard: tuple[Place, str] | None = None

    def prepare(self, attempts: pa.Table) -> pa.Table:
        """Attempts with their requests beside them."""
        requests = [
            build_request(one, self.ask(one), sampling_of(self.families[one.family], self.config.sampling))
            for one in read_attempts(attempts)
        ]
        return side_by_side(attempts, request_table(requests))

    def finish(self, tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
        """Rows and rejects of answered attempts."""
        table = tables[ANSWERS]
        answered = zip(read_attempts(table), read_results(table), strict=True)
        return self.tables((one, self.read(one, result), result) for one, result in answered)

    def extract(self, tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
        """Rows and rejects of attempts that ask no LLM."""
        (table,) = tables.values()
        found = (
            (
                one,
                read_extracted(one, FAMILIES[options.family], options, self.config.quality, self._guard()),
                None,
            )
            for one in read_attempts(table)
            for options in [self.families[one.family]]
        )
        return self.tables(found)

    def ask(self, attempt: Attempt) -> Ask:
        """The request's messages and schema."""
        options = self.families[attempt.family]
        return FAMILIES[options.family].ask(attempt, self.prompts[attempt.family], options)

    def read(self, attempt: Attempt, result: GenerationResult) -> list[Row | Reject]:
        """What an answer is worth, row by row."""
        options = self.families[attempt.family]
        return read_answer(
            result, self.ask(attempt), attempt, FAMILIES[options.family], self.prompts[attempt.family], options,
            self.config.quality, guard=self._guard(),
        )  # fmt: skip

    def asked_rows(self, attempt: Attempt) -> int:
        """Rows that one attempt asks for."""
        options = self.families[attempt.family]
        return FAMILIES[options.family].asked_rows(options)

    def tables(self, outcomes: _Outcomes) -> dict[str, pa.Table]:
        """Rejects, then rows with the counts of the shard in their metadata."""
        rows: list[Row] = []
        rejects: list[Row] = []
        tally = Tally()
        for attempt, found, result in outcomes:
            counts = tally.of(Cell(attempt.family, attempt.generator, attempt.language))
            counts.attempts += 1
            counts.asked += self.asked_rows(attempt) if result else len(found)
            counts.prompt_tokens += result.prompt_tokens if result else 0
            counts.output_tokens += result.output_tokens if result else 0
            for number, one in enumerate(found):
                if isinstance(one, Reject):
                    counts.rejects[one.reason] += 1
                    rejects.append(
                        {"id": row_id(attempt, number), "reason": one.reason, "detail": one.detail}
                    )
                else:
                    counts.rows += 1
                    rows.append(self.step_row(one, attempt, number))
        return {
            REJECTS_FOLDER: table_from_rows("rejects", rejects),
            ROWS_FOLDER: tally.stamp(pa.Table.from_pylist(rows, schema=self.schema)),
        }

    @property
    def schema(self) -> pa.Schema:
        """Columns of ``rows/``."""
        return STEP_SCHEMA

    def step_row(self, row: Row, attempt: Attempt, number: int) -> Row:
        """A row as it stands in ``rows/``."""
        quality = self.config.quality
        shown = None
        if quality.judge is not None and row.get("positive") is None and attempt.document is not None:
            shown = document_text(attempt.document.title, attempt.document.text)
        return {
            **row,
            "family": attempt.family,
            "ordinal": attempt.ordinal,
            "number": number,
            "exact_key": exact_key(row) if quality.exact_duplicates else None,
            "signature": signature(row) if quality.near_duplicates is not None else None,
            "document_text": shown,
        }

    def _guard(self) -> ContaminationIndex | None:
        return None if self.guard is None else _loaded(*self.guard)


class TaskMaker(RowMaker):
    """Turns one generator's attempts into task sentences (step one)."""

    def ask(self, attempt: Attempt) -> Ask:
        """The request's messages and schema."""
        return ask_tasks(attempt, self.prompts[attempt.family], _task_options(self.families[attempt.family]))

    def read(self, attempt: Attempt, result: GenerationResult) -> list[Row | Reject]:
        """Each task of an answer, as a row of TASK_SCHEMA."""
        options = _task_options(self.families[attempt.family])
        prompt = self.prompts[attempt.family]
        return [
            one if isinstance(one, Reject) else {"id": row_id(attempt, number), "text": one}
            for number, one in enumerate(read_tasks(result, self.ask(attempt), prompt, options))
        ]

    def asked_rows(self, attempt: Attempt) -> int:
        """Tasks that one attempt asks for."""
        return _task_options(self.families[attempt.family]).tasks_per_answer

    @property
    def schema(self) -> pa.Schema:
        """Columns of ``rows/``."""
        return TASK_SCHEMA

    def step_row(self, row: Row, attempt: Attempt, number: int) -> Row:
        """A task as it stands in ``rows/``."""
        return {
            **row,
            "family": attempt.family,
            "generator": attempt.generator,
            "lang": attempt.language,
            "prompt_hash": self.prompts[attempt.family].hash,
            "ordinal": attempt.ordinal,
            "number": number,
            "exact_key": hash64(" ".join(str(row["text"]).casefold().split())),
        }


def _task_options(options: FamilyConfig) -> TaskFamilyConfig:
    if not isinstance(options, TaskFamilyConfig):
        raise TypeError(f"{options.key} is not written from tasks")
    return options


@lru_cache(maxsize=1)
def _loaded(place: Place, file: str) -> ContaminationIndex:
    """Read once a process; some hundred megabytes for large evaluation sets."""
    return load_index(place, file)
