"""STS and bitext: three texts S1, S2, S3, of which the first two belong together more than the first and the third."""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from embedloom.config.families import BitextConfig, STSConfig
from embedloom.instructions import DEFAULT_INSTRUCTIONS
from embedloom.synthesis.families.base import (
    Ask,
    Attempt,
    Reject,
    Row,
    Source,
    clean_fields,
    drawn,
    reject,
    synthetic_row,
)
from embedloom.synthesis.families.from_tasks import language_values
from embedloom.synthesis.prompt import Prompt, PromptRules

FIELDS = ("S1", "S2", "S3")
Options = TypeVar("Options", STSConfig, BitextConfig)


class Opposite(Generic[Options]):
    """What the two families share; there is no brainstorm step."""

    name: str
    task_type: str
    source: Source = "none"
    extracts = False

    def own_prompt(self, options: Options) -> tuple[str, PromptRules]:
        """See Family."""
        return self.name, PromptRules(FIELDS, ("language", "document_language"))

    def asked_rows(self, options: Options) -> int:
        """See Family."""
        return 1

    def ask(self, attempt: Attempt, prompt: Prompt, options: Options) -> Ask:
        """See Family."""
        values = {**language_values(attempt), **drawn(attempt, prompt)}
        return Ask(prompt.render(values), prompt.answer_schema(_limits(options)))

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: Options
    ) -> list[Row | Reject]:
        """See Family."""
        texts = clean_fields(answer, _limits(options))
        if isinstance(texts, Reject):
            return [texts]
        if len({text.casefold() for text in texts.values()}) < len(FIELDS):
            return [reject(self.same_reason(texts), " | ".join(texts.values()))]
        row = synthetic_row(
            attempt,
            0,
            prompt,
            query=texts["S1"],
            task_type=self.task_type,
            instruction=options.instruction or prompt.instruction or DEFAULT_INSTRUCTIONS[self.task_type],
            positive=texts["S2"],
            negatives=[texts["S3"]],
        )
        return [row]

    def same_reason(self, texts: Mapping[str, str]) -> str:
        """Why texts that are the same are refused."""
        return "repeats_itself"


def _limits(options: STSConfig | BitextConfig) -> dict[str, int]:
    return dict.fromkeys(FIELDS, options.max_text_characters)
