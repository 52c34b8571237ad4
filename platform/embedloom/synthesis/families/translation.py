"""Existing pairs in another language (strategy S3): the query alone, for cross-lingual pairs, or both sides."""

from collections.abc import Mapping
from typing import Any

from embedloom.config.families import TranslationConfig
from embedloom.config.languages import language_name
from embedloom.synthesis.families.base import (
    Ask,
    Attempt,
    Reject,
    Row,
    Source,
    clean_fields,
    cut,
    drawn,
    reject,
    synthetic_row,
)
from embedloom.synthesis.families.from_tasks import language_values
from embedloom.synthesis.prompt import Prompt, PromptRules

_PLACEHOLDERS = ("query", "document", "language", "document_language", "source_language")


class Translation:
    """One pair an attempt; task type and instruction stay those of the pair."""

    name = "translation"
    task_type = "retrieval"
    source: Source = "pairs"
    extracts = False

    def own_prompt(self, options: TranslationConfig) -> tuple[str, PromptRules]:
        """See Family."""
        if options.sides == "query":
            return "translation", PromptRules(("query",), _PLACEHOLDERS, required=("query",))
        return "translation_pair", PromptRules(
            ("query", "document"), _PLACEHOLDERS, required=("query", "document")
        )

    def asked_rows(self, options: TranslationConfig) -> int:
        """See Family."""
        return 1

    def ask(self, attempt: Attempt, prompt: Prompt, options: TranslationConfig) -> Ask:
        """See Family."""
        pair = _pair(attempt)
        values = {
            "query": pair["query"],
            "document": cut(pair["positive"] or "", options.max_document_characters),
            **language_values(attempt),
            **drawn(attempt, prompt),
            "source_language": language_name(pair["lang"]),
        }
        return Ask(prompt.render(values), prompt.answer_schema(_limits(options)))

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: TranslationConfig
    ) -> list[Row | Reject]:
        """See Family."""
        pair = _pair(attempt)
        texts = clean_fields(answer, _limits(options), paragraphs=("document",))
        if isinstance(texts, Reject):
            return [texts]
        originals = {"query": pair["query"], "document": pair["positive"] or ""}
        for side, text in texts.items():
            if text.casefold() == " ".join(originals[side].split()).casefold():
                return [reject("untranslated", f"{side}: {text}")]
        row = synthetic_row(
            attempt,
            0,
            prompt,
            query=texts["query"],
            task_type=pair["task_type"],
            instruction=options.instruction or pair["instruction"],
            document_id=None if "document" in texts else pair["document_id"],
            positive=texts.get("document", pair["positive"]),
            # Negatives that came with the pair are still wrong for the translated query, in their own language.
            negatives=None if "document" in texts else pair.get("negatives"),
        )
        return [row if "document" in texts else {**row, "document_lang": pair["document_lang"]}]


def _pair(attempt: Attempt) -> Mapping[str, Any]:
    if attempt.pair is None:
        raise ValueError(f"attempt {attempt.id} of {attempt.family} has no pair")
    return attempt.pair


def _limits(options: TranslationConfig) -> dict[str, int]:
    limits = {"query": options.max_query_characters}
    return limits if options.sides == "query" else {**limits, "document": options.max_document_characters}
