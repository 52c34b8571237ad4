"""Queries for documents of the corpus (arXiv 2511.07025 §4.3, strategy S2); negatives are mined later.

Persona, query type, length and difficulty are drawn per attempt, as Qwen3-Embedding does (arXiv 2506.05176); the
query's language may differ from the document's.
"""

from collections.abc import Mapping
from typing import Any

from embedloom.config.families import SeedQueriesConfig
from embedloom.config.languages import language_name
from embedloom.instructions import DEFAULT_INSTRUCTIONS, document_text
from embedloom.synthesis.families.base import (
    Ask,
    Attempt,
    Reject,
    Row,
    SeedDocument,
    Source,
    clean,
    cut,
    drawn,
    synthetic_row,
)
from embedloom.synthesis.prompt import Prompt, PromptRules


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
