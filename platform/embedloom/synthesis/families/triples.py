"""Retrieval triples written from scratch (strategy S1): query, matching text and a text that only seems to match.

The three differ in the lengths of their sides: see arXiv 2401.00368 §3.1 and its tables of prompts.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from embedloom.config.families import FamilyConfig
from embedloom.synthesis.families.base import (
    Ask,
    Attempt,
    Reject,
    Row,
    Source,
    clean_fields,
    reject,
    synthetic_row,
)
from embedloom.synthesis.families.from_tasks import instruction_of, task_rules, task_values
from embedloom.synthesis.prompt import Prompt, PromptRules

Options = TypeVar("Options", bound=FamilyConfig)


class Triples(ABC, Generic[Options]):
    """What the three families share; a subclass states its name, its fields and their bounds."""

    name: str
    task_type = "retrieval"
    source: Source = "tasks"
    extracts = False
    fields: tuple[str, str, str]  # query, positive and negative in the answer
    documents: tuple[str, ...]  # fields that keep their line breaks

    @abstractmethod
    def limits(self, options: Options) -> dict[str, int]:
        """Field -> most characters."""

    def own_prompt(self, options: Options) -> tuple[str, PromptRules]:
        """See Family."""
        return self.name, task_rules(*self.fields)

    def asked_rows(self, options: Options) -> int:
        """See Family."""
        return 1

    def ask(self, attempt: Attempt, prompt: Prompt, options: Options) -> Ask:
        """See Family."""
        return Ask(prompt.render(task_values(attempt, prompt)), prompt.answer_schema(self.limits(options)))

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: Options
    ) -> list[Row | Reject]:
        """See Family."""
        texts = clean_fields(answer, self.limits(options), self.documents)
        if isinstance(texts, Reject):
            return [texts]
        query, positive, negative = (texts[field] for field in self.fields)
        if len({text.casefold() for text in (query, positive, negative)}) < 3:
            return [reject("repeats_itself", f"{query} | {positive} | {negative}")]
        row = synthetic_row(
            attempt,
            0,
            prompt,
            query=query,
            task_type=self.task_type,
            instruction=instruction_of(attempt, options),
            positive=positive,
            negatives=[negative],
        )
        return [row]
