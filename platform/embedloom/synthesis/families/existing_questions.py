"""Questions that documents already end with, as those of Nemotron-CC's Diverse-QA split do (arXiv 2511.07025 §4.1).

Such a document is its text, a blank line, then ``Question: ... Answer: ...`` pairs, one after another. The text
without them is the positive. Nothing is generated, so the rows count as public, not as synthetic.
"""

import re
from collections.abc import Mapping
from typing import Any

from embedloom.config.families import ExistingQuestionsConfig
from embedloom.instructions import DEFAULT_INSTRUCTIONS, document_text
from embedloom.records import content_id
from embedloom.synthesis.families.base import Ask, Attempt, Reject, Row, Source, clean, reject, row_id
from embedloom.synthesis.families.seed_queries import seed_of
from embedloom.synthesis.prompt import Prompt, PromptRules

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
