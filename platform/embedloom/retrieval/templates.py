"""What stands around a text before a foreign teacher reads it; our own encoders have their prompt contract."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedloom.errors import DataError
from embedloom.instructions import DEFAULT_INSTRUCTIONS, PLAIN_TEMPLATE, SYMMETRIC_TASK_TYPES, Side

_TEXT = "{text}"
_INSTRUCTION = "{instruction}"


@dataclass(frozen=True, slots=True)
class Templates:
    """Model text of queries and documents: templates with ``{text}`` once and, optionally, ``{instruction}``.

    In symmetric task types (STS, classification, ...) both texts play the same part, so documents take the query
    template too, as E5, e5-mistral and Qwen3-Embedding ask for in their model cards; both take ``symmetric`` where that
    is stated.
    """

    query: str = PLAIN_TEMPLATE
    document: str = PLAIN_TEMPLATE
    instructions: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_INSTRUCTIONS))
    symmetric_task_types: tuple[str, ...] = SYMMETRIC_TASK_TYPES
    symmetric: str | None = None

    def around(self, side: Side, task_type: str, instruction: str | None) -> tuple[str, str]:
        """What stands before and after the text.

        Args:
            side: whether it is a query or a document.
            task_type: decides the default instruction, and whether a document is written as a query.
            instruction: None or empty for the default of the task type.

        Raises:
            DataError: no instruction, and none known for the task type.
        """
        template = self.query if side == "query" else self.document
        if task_type in self.symmetric_task_types:
            template = self.query if self.symmetric is None else self.symmetric
        before, _, after = template.partition(_TEXT)
        if _INSTRUCTION not in before + after:
            return before, after
        if not instruction and task_type not in self.instructions:
            raise DataError(f"task_type: {task_type!r} is unknown; allowed: {sorted(self.instructions)}")
        own = instruction or self.instructions[task_type]
        return before.replace(_INSTRUCTION, own), after.replace(_INSTRUCTION, own)

    def facts(self) -> dict[str, Any]:
        """Everything that shapes a text, for a contract hash."""
        return {
            "query": self.query,
            "document": self.document,
            "instructions": dict(self.instructions),
            "symmetric_task_types": list(self.symmetric_task_types),
            **({} if self.symmetric is None else {"symmetric": self.symmetric}),
        }
