"""From one answer to rows: JSON, schema, the family's reading, then every check that looks at a row alone. Pure."""

from collections.abc import Sequence
from typing import Any

from embedloom.config.families import FamilyConfig, TaskFamilyConfig
from embedloom.config.quality import QualityConfig
from embedloom.engines.protocol import GenerationResult
from embedloom.synthesis.answers import read_json
from embedloom.synthesis.families.base import Ask, Attempt, ExtractingFamily, Family, Reject, Row, reject
from embedloom.synthesis.families.tasks import tasks_of
from embedloom.synthesis.prompt import Prompt
from embedloom.synthesis.quality.contamination import ContaminationIndex
from embedloom.synthesis.quality.row import RowContext, check_row


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
