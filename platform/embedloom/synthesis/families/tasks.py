"""Step 1 of two: an LLM lists task sentences for a family; step 2 writes samples for them, best with another LLM.

Two separate prompts give more diverse data than one (arXiv 2401.00368 §3.1), and the paper lets step 1 and step 2
come from different models (arXiv 2511.07025 §6.2).
"""

from collections.abc import Mapping
from typing import Any

from embedloom.config.families import TaskFamilyConfig
from embedloom.config.languages import language_name
from embedloom.synthesis.families.base import Ask, Attempt, Reject, clean, drawn, reject
from embedloom.synthesis.prompt import SMALL_SUFFIX, Prompt, PromptRules, load_prompt

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
