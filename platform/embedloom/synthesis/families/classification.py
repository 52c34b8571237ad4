"""Classification: a text, its label and misleading labels (arXiv 2511.07025 §6.2).

The triple is the text with the task's sentence as its instruction, the label, and the misleading labels; labels
carry no instruction. Mining keeps the given negatives.
"""

from collections.abc import Mapping
from typing import Any

from embedloom.config.families import ClassificationConfig
from embedloom.synthesis.families.base import (
    Ask,
    Attempt,
    Reject,
    Row,
    Source,
    clean,
    clean_fields,
    reject,
    synthetic_row,
)
from embedloom.synthesis.families.from_tasks import instruction_of, task_rules, task_values
from embedloom.synthesis.prompt import Prompt, PromptRules


class Classification:
    """One labelled text an attempt."""

    name = "classification"
    task_type = "classification"
    source: Source = "tasks"
    extracts = False

    def own_prompt(self, options: ClassificationConfig) -> tuple[str, PromptRules]:
        """See Family."""
        return self.name, task_rules("input_text", "label", "misleading_labels", placeholders=("count",))

    def asked_rows(self, options: ClassificationConfig) -> int:
        """See Family."""
        return 1

    def ask(self, attempt: Attempt, prompt: Prompt, options: ClassificationConfig) -> Ask:
        """See Family."""
        count = options.misleading_labels
        limits = {**_limits(options), "misleading_labels": options.max_label_characters}
        schema = prompt.answer_schema(limits, {"misleading_labels": count})
        return Ask(prompt.render({**task_values(attempt, prompt), "count": str(count)}), schema)

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: ClassificationConfig
    ) -> list[Row | Reject]:
        """See Family; a misleading label that repeats another or the label is left out, one at least must be left."""
        texts = clean_fields(answer, _limits(options))
        if isinstance(texts, Reject):
            return [texts]
        labels: dict[str, str] = {}
        for value in answer["misleading_labels"]:
            label = clean(value, options.max_label_characters)
            if isinstance(label, Reject):
                return [Reject(label.reason, f"misleading_labels: {label.detail}")]
            labels.setdefault(label.casefold(), label)
        labels.pop(texts["label"].casefold(), None)
        if not labels:
            return [reject("repeats_itself", f"every misleading label is the label {texts['label']!r}")]
        row = synthetic_row(
            attempt,
            0,
            prompt,
            query=texts["input_text"],
            task_type=self.task_type,
            instruction=instruction_of(attempt, options),
            positive=texts["label"],
            negatives=list(labels.values()),
        )
        return [row]


def _limits(options: ClassificationConfig) -> dict[str, int]:
    return {"input_text": options.max_text_characters, "label": options.max_label_characters}
