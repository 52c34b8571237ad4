"""Families written from scratch: an LLM lists tasks, then writes triples, classes, or texts of like meaning."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from embedloom.config.synthesis import (
    BitextConfig,
    ClassificationConfig,
    FamilyConfig,
    LongLongConfig,
    ShortLongConfig,
    ShortShortConfig,
    STSConfig,
    TaskFamilyConfig,
)
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS
from embedloom.core.text import language_name
from embedloom.synthesis.families.base import (
    Ask,
    Attempt,
    Reject,
    Row,
    Source,
    clean,
    clean_fields,
    drawn,
    reject,
    synthetic_row,
)
from embedloom.synthesis.prompt import SMALL_SUFFIX, Prompt, PromptRules, load_prompt

# Families written from a brainstormed task: the parts they share (arXiv 2401.00368 §3.1, two steps).


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


# Step 1 of two: an LLM lists task sentences for a family; step 2 writes samples for them, best with another LLM.
#
# Two separate prompts give more diverse data than one (arXiv 2401.00368 §3.1), and the paper lets step 1 and step 2
# come from different models (arXiv 2511.07025 §6.2).


RULES = PromptRules(("tasks",), ("count", "language"))


def tasks_prompt(options: TaskFamilyConfig, small: bool) -> Prompt:
    """The prompt that asks for tasks of a family; see registry.family_prompt.

    Raises:
        ConfigError: see load_prompt.
    """
    name = options.tasks_prompt or f"{options.family}_tasks{SMALL_SUFFIX if small else ''}"
    return load_prompt(name, RULES, f"synthesis.families.{options.key}.tasks_prompt")


def ask_tasks(attempt: Attempt, prompt: Prompt, options: TaskFamilyConfig) -> Ask:
    """The request for ``options.tasks_per_answer`` tasks."""
    count = options.tasks_per_answer
    values = {"count": str(count), "language": language_name(attempt.language), **drawn(attempt, prompt)}
    schema = prompt.answer_schema({"tasks": options.max_task_characters}, {"tasks": count})
    return Ask(prompt.render(values), schema)


def tasks_of(answer: Mapping[str, Any], options: TaskFamilyConfig) -> list[str | Reject]:
    """Each task of a valid answer, or why it is refused; a repetition within the answer is a duplicate."""
    found: list[str | Reject] = []
    seen: set[str] = set()
    for value in answer["tasks"]:
        task = clean(value, options.max_task_characters)
        if isinstance(task, str):
            task = task.rstrip(".")  # instructions end without a full stop, as mteb's do
            key = task.casefold()
            task = reject("duplicate", task) if key in seen else task
            seen.add(key)
        found.append(task)
    return found


# Retrieval triples written from scratch (strategy S1): query, matching text and a text that only seems to match.
#
# The three differ in the lengths of their sides: see arXiv 2401.00368 §3.1 and its tables of prompts.


TripleOptions = TypeVar("TripleOptions", bound=FamilyConfig)


class Triples(ABC, Generic[TripleOptions]):
    """Three texts of which the first two belong together; a subclass states its name, its fields and their bounds."""

    name: str
    task_type = "retrieval"
    source: Source = "tasks"
    extracts = False
    fields: tuple[str, str, str]  # query, positive and negative in the answer
    documents: tuple[str, ...] = ()  # fields that keep their line breaks

    @abstractmethod
    def limits(self, options: TripleOptions) -> dict[str, int]:
        """Field -> most characters."""

    def own_prompt(self, options: TripleOptions) -> tuple[str, PromptRules]:
        """See Family."""
        return self.name, task_rules(*self.fields)

    def asked_rows(self, options: TripleOptions) -> int:
        """See Family."""
        return 1

    def ask(self, attempt: Attempt, prompt: Prompt, options: TripleOptions) -> Ask:
        """See Family."""
        return Ask(prompt.render(self.values(attempt, prompt)), prompt.answer_schema(self.limits(options)))

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: TripleOptions
    ) -> list[Row | Reject]:
        """See Family."""
        texts = clean_fields(answer, self.limits(options), self.documents)
        if isinstance(texts, Reject):
            return [texts]
        query, positive, negative = three = tuple(texts[field] for field in self.fields)
        if len({text.casefold() for text in three}) < len(three):
            return [reject(self.same_reason(*three), " | ".join(three))]
        row = synthetic_row(
            attempt,
            0,
            prompt,
            query=query,
            task_type=self.task_type,
            instruction=self.instruction(attempt, prompt, options),
            positive=positive,
            negatives=[negative],
        )
        return [row]

    def values(self, attempt: Attempt, prompt: Prompt) -> dict[str, str]:
        """What the prompt's placeholders stand for."""
        return task_values(attempt, prompt)

    def instruction(self, attempt: Attempt, prompt: Prompt, options: TripleOptions) -> str:
        """The row's training instruction."""
        return instruction_of(attempt, options)

    def same_reason(self, query: str, positive: str, negative: str) -> str:
        """Why texts of which two are the same are refused."""
        return "repeats_itself"


# Short query, long documents: the usual shape of search.


class ShortLong(Triples[ShortLongConfig]):
    """A query, a document that answers it, and one that looks as if it did."""

    name = "short_long"
    fields = ("user_query", "positive_document", "hard_negative_document")
    documents = ("positive_document", "hard_negative_document")

    def limits(self, options: ShortLongConfig) -> dict[str, int]:
        """Field -> most characters."""
        most = options.max_document_characters
        return {
            "user_query": options.max_query_characters,
            "positive_document": most,
            "hard_negative_document": most,
        }


# Long texts on both sides: matching a document with another.


class LongLong(Triples[LongLongConfig]):
    """A document, one that matches it with few words in common, and one that does not match."""

    name = "long_long"
    fields = ("input", "positive_document", "hard_negative_document")
    documents = fields

    def limits(self, options: LongLongConfig) -> dict[str, int]:
        """Field -> most characters."""
        return dict.fromkeys(self.fields, options.max_document_characters)


# Phrases or sentences on both sides.


class ShortShort(Triples[ShortShortConfig]):
    """A phrase, one that matches it with few words in common, and one that does not match."""

    name = "short_short"
    fields = ("input", "positive_document", "hard_negative_document")

    def limits(self, options: ShortShortConfig) -> dict[str, int]:
        """Field -> most characters."""
        return dict.fromkeys(self.fields, options.max_query_characters)


# Classification: a text, its label and misleading labels (arXiv 2511.07025 §6.2).
#
# The triple is the text with the task's sentence as its instruction, the label, and the misleading labels; labels
# carry no instruction. Mining keeps the given negatives.


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
        limits = {**_label_limits(options), "misleading_labels": options.max_label_characters}
        schema = prompt.answer_schema(limits, {"misleading_labels": count})
        return Ask(prompt.render({**task_values(attempt, prompt), "count": str(count)}), schema)

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: ClassificationConfig
    ) -> list[Row | Reject]:
        """See Family; a misleading label that repeats another or the label is left out, one at least must be left."""
        texts = clean_fields(answer, _label_limits(options))
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


def _label_limits(options: ClassificationConfig) -> dict[str, int]:
    return {"input_text": options.max_text_characters, "label": options.max_label_characters}


# STS and bitext: three texts S1, S2, S3, of which the first two belong together more than the first and the third.


OppositeOptions = TypeVar("OppositeOptions", STSConfig, BitextConfig)


class Opposite(Triples[OppositeOptions]):
    """What the two families share; there is no brainstorm step."""

    source: Source = "none"
    fields = ("S1", "S2", "S3")

    def limits(self, options: OppositeOptions) -> dict[str, int]:
        """Field -> most characters."""
        return dict.fromkeys(self.fields, options.max_text_characters)

    def own_prompt(self, options: OppositeOptions) -> tuple[str, PromptRules]:
        """See Family."""
        return self.name, PromptRules(self.fields, ("language", "document_language"))

    def values(self, attempt: Attempt, prompt: Prompt) -> dict[str, str]:
        """What the prompt's placeholders stand for."""
        return {**language_values(attempt), **drawn(attempt, prompt)}

    def instruction(self, attempt: Attempt, prompt: Prompt, options: OppositeOptions) -> str:
        """The row's training instruction."""
        return options.instruction or prompt.instruction or DEFAULT_INSTRUCTIONS[self.task_type]


# Semantic similarity: three texts with target scores, drawn per attempt and kept in ``attributes``.
#
# S1 and S2 aim at 4 to 5 of 5, S1 and S3 at 2.5 to 3.5 (arXiv 2401.00368, appendix). Training uses the order alone:
# S2 is the positive, S3 the hard negative.


class STS(Opposite[STSConfig]):
    """One graded triple an attempt."""

    name = "sts"
    task_type = "sts"


# Bitext mining: a text, a good translation, and one that reads well but is wrong in detail (arXiv 2401.00368).


class Bitext(Opposite[BitextConfig]):
    """One text with two translations an attempt."""

    name = "bitext"
    task_type = "bitext"

    def same_reason(self, query: str, positive: str, negative: str) -> str:
        """A translation that is its source was not translated."""
        same = query.casefold() in (positive.casefold(), negative.casefold())
        return "untranslated" if same else "repeats_itself"
