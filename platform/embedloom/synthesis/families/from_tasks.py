"""Families written from a brainstormed task: the parts they share (arXiv 2401.00368 §3.1, two steps)."""

from embedloom.config.families import FamilyConfig
from embedloom.config.languages import language_name
from embedloom.synthesis.families.base import Attempt, drawn
from embedloom.synthesis.prompt import Prompt, PromptRules

_PLACEHOLDERS = ("task", "language", "document_language")


def task_rules(*fields: str, placeholders: tuple[str, ...] = ()) -> PromptRules:
    """Rules of a prompt that shows a task."""
    return PromptRules(fields, (*_PLACEHOLDERS, *placeholders), required=("task",))


def task_of(attempt: Attempt) -> str:
    """The attempt's task.

    Raises:
        ValueError: it has none; the caller's mistake.
    """
    if attempt.task is None:
        raise ValueError(f"attempt {attempt.id} of {attempt.family} has no task")
    return attempt.task


def task_values(attempt: Attempt, prompt: Prompt) -> dict[str, str]:
    """Values of the shared placeholders and of the prompt's attributes."""
    return {"task": task_of(attempt), **language_values(attempt), **drawn(attempt, prompt)}


def language_values(attempt: Attempt) -> dict[str, str]:
    """English names of both languages."""
    return {
        "language": language_name(attempt.language),
        "document_language": language_name(attempt.document_language),
    }


def instruction_of(attempt: Attempt, options: FamilyConfig) -> str:
    """The task's sentence is the training instruction, unless the section states one for all."""
    return options.instruction or task_of(attempt)
