"""An LLM as judge: it grades a row from 1 to 10, the config's threshold decides. Rows are never rewritten."""

from collections.abc import Mapping
from typing import Any

from embedloom.config.quality import JudgeCheck
from embedloom.engines.protocol import GenerationResult
from embedloom.instructions import DEFAULT_INSTRUCTIONS
from embedloom.synthesis.answers import read_json
from embedloom.synthesis.families.base import Ask, Reject, cut
from embedloom.synthesis.prompt import Prompt, PromptRules, load_prompt

RULES = PromptRules(
    ("score",), ("query", "positive", "instruction", "task_type"), required=("query", "positive")
)


def judge_prompt(check: JudgeCheck) -> Prompt:
    """The prompt that asks for the grade.

    Raises:
        ConfigError: see load_prompt.
    """
    return load_prompt(check.prompt, RULES, "synthesis.quality.judge.prompt")


def judge_ask(row: Mapping[str, Any], document: str, prompt: Prompt, check: JudgeCheck) -> Ask:
    """The request for one row's grade.

    Args:
        row: of the pairs schema.
        document: text of its positive.
        prompt: of judge_prompt.
        check: bounds what is shown.
    """
    values = {
        "query": cut(str(row["query"]), check.max_characters),
        "positive": cut(document, check.max_characters),
        "instruction": str(row.get("instruction") or DEFAULT_INSTRUCTIONS[str(row["task_type"])]),
        "task_type": str(row["task_type"]),
    }
    return Ask(prompt.render(values), prompt.answer_schema({}))


def judge_grade(result: GenerationResult, ask: Ask) -> float | Reject:
    """The grade of an answer, or why it is none."""
    answer = read_json(result, ask)
    return answer if isinstance(answer, Reject) else float(answer["score"])
