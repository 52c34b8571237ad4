"""Families that start from texts that are there: queries for documents, questions that documents hold, translated pairs."""

import re
from collections.abc import Mapping
from typing import Any

from embedloom.config.synthesis import ExistingQuestionsConfig, SeedQueriesConfig, TranslationConfig
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS, document_text
from embedloom.core.schemas import content_id
from embedloom.core.text import language_name
from embedloom.synthesis.families.base import (
    Ask,
    Attempt,
    Reject,
    Row,
    SeedDocument,
    Source,
    clean,
    clean_fields,
    cut,
    drawn,
    reject,
    row_id,
    synthetic_row,
)
from embedloom.synthesis.families.written import language_values
from embedloom.synthesis.prompt import Prompt, PromptRules

# Queries for documents of the corpus (arXiv 2511.07025 §4.3, strategy S2); negatives are mined later.
#
# Persona, query type, length and difficulty are drawn per attempt, as Qwen3-Embedding does (arXiv 2506.05176); the
# query's language may differ from the document's.


class SeedQueries:
    """Several queries a document."""

    name = "seed_queries"
    task_type = "retrieval"
    source: Source = "documents"
    extracts = False

    def own_prompt(self, options: SeedQueriesConfig) -> tuple[str, PromptRules]:
        """See Family."""
        placeholders = ("document", "title", "language", "document_language", "count", "questions")
        return self.name, PromptRules(("queries",), placeholders, required=("document",))

    def asked_rows(self, options: SeedQueriesConfig) -> int:
        """See Family."""
        return options.queries_per_document

    def ask(self, attempt: Attempt, prompt: Prompt, options: SeedQueriesConfig) -> Ask:
        """See Family."""
        document = seed_of(attempt)
        count = options.queries_per_document
        values = {
            "document": shown_text(document, options.max_document_characters),
            "title": document.title or "",
            "language": language_name(attempt.language),
            "document_language": language_name(attempt.document_language),
            "count": str(count),
            "questions": "one specific question" if count == 1 else f"{count} specific, different questions",
            **drawn(attempt, prompt),
        }
        schema = prompt.answer_schema({"queries": options.max_query_characters}, {"queries": count})
        return Ask(prompt.render(values), schema)

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: SeedQueriesConfig
    ) -> list[Row | Reject]:
        """See Family."""
        found: list[Row | Reject] = []
        for number, value in enumerate(answer["queries"]):
            query = clean(value, options.max_query_characters)
            if isinstance(query, Reject):
                found.append(query)
                continue
            instruction = options.instruction or prompt.instruction or DEFAULT_INSTRUCTIONS[self.task_type]
            row = synthetic_row(
                attempt,
                number,
                prompt,
                query=query,
                task_type=self.task_type,
                instruction=instruction,
                document_id=seed_of(attempt).id,
            )
            found.append(row)
        return found


def seed_of(attempt: Attempt) -> SeedDocument:
    """The attempt's document.

    Raises:
        ValueError: it has none; the caller's mistake.
    """
    if attempt.document is None:
        raise ValueError(f"attempt {attempt.id} of {attempt.family} has no document")
    return attempt.document


def shown_text(document: SeedDocument, max_characters: int) -> str:
    """The document's title and text as the prompt shows them."""
    return cut(document_text(document.title, document.text), max_characters)


# Questions that documents already end with, as those of Nemotron-CC's Diverse-QA split do (arXiv 2511.07025 §4.1).
#
# Such a document is its text, a blank line, then ``Question: ... Answer: ...`` pairs, one after another. The text
# without them is the positive. Nothing is generated, so the rows count as public, not as synthetic.


# A question may run over several lines (multiple choice); its answer ends it.
_QUESTION = re.compile(r"^\s*(?:[-*•]\s*|\d+[.)]\s*)?Question:[ \t]*", re.MULTILINE)
_ANSWER = re.compile(r"\s*\bAnswer:", re.MULTILINE)


class ExistingQuestions:
    """Up to ``questions_per_document`` pairs a document, in its own order."""

    name = "existing_questions"
    task_type = "retrieval"
    source: Source = "documents"
    extracts = True

    def own_prompt(self, options: ExistingQuestionsConfig) -> tuple[str, PromptRules]:
        """None: no LLM is asked."""
        raise ValueError("existing_questions asks no LLM")

    def asked_rows(self, options: ExistingQuestionsConfig) -> int:
        """See Family."""
        return options.questions_per_document

    def ask(self, attempt: Attempt, prompt: Prompt, options: ExistingQuestionsConfig) -> Ask:
        """None: no LLM is asked."""
        raise ValueError("existing_questions asks no LLM")

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: ExistingQuestionsConfig
    ) -> list[Row | Reject]:
        """None: no LLM is asked."""
        raise ValueError("existing_questions asks no LLM")

    def extract(self, attempt: Attempt, options: ExistingQuestionsConfig) -> list[Row | Reject]:
        """The document's first questions, each with the text before them; one reject if there is none."""
        document = seed_of(attempt)
        body, questions = split_questions(document.text)
        if not questions:
            return [reject("no_question", document.text[-200:])]
        if len(body) < options.min_document_characters:
            return [reject("too_short", body)]
        positive = document_text(document.title, body)
        found: list[Row | Reject] = []
        for number, question in enumerate(questions[: options.questions_per_document]):
            query = clean(question, options.max_query_characters)
            row: Row = {
                "id": row_id(attempt, number),
                # The corpus's own document shows the question, so the pair gets its text without it.
                "document_id": content_id("without questions", document.id),
                "positive": positive,
                "query": query,
                "task_type": self.task_type,
                "instruction": options.instruction or DEFAULT_INSTRUCTIONS[self.task_type],
                "lang": attempt.language,
                "document_lang": attempt.document_language,
                "origin": "public",
            }
            found.append(query if isinstance(query, Reject) else row)
        return found


def split_questions(text: str) -> tuple[str, list[str]]:
    """(text before the trailing questions, the questions without their answers)."""
    starts = list(_QUESTION.finditer(text))
    if not starts:
        return text.strip(), []
    ends = [match.start() for match in starts[1:]] + [len(text)]
    questions = []
    for match, end in zip(starts, ends, strict=True):
        block = text[match.end() : end]
        answer = _ANSWER.search(block)
        # Without an answer only the question's own line is sure to be the question.
        question = block[: answer.start()] if answer else (block.splitlines() or [""])[0]
        questions.append(question.strip())
    return text[: starts[0].start()].strip(), [question for question in questions if question]


# Existing pairs in another language (strategy S3): the query alone, for cross-lingual pairs, or both sides.


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
