"""Which task, instruction and side a text of an mteb task gets.

By default what the endpoint sends: the contract's own prompts. Where published scores are to be compared with, the
rules behind llama-embed-nemotron-8b's, in this order: the table of 131 tasks (``benchmark_instructions.yaml``), the prompt in mteb's metadata, the contract's
own for the task type. STS, pair classification and bitext always take the contract's; documents of retrieval and
reranking stay bare, except in symmetric tasks such as ArguAna (arXiv 2511.07025 §2 and mteb's wrapper of the model).
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType

from embedloom.errors import DataError
from embedloom.instructions import USUAL_TASK, PromptContract, Side, is_instructed

# mteb's task types in our words; what is missing here is not about text alone.
TASK_TYPES = {
    "Retrieval": "retrieval",
    "InstructionRetrieval": "retrieval",
    "Reranking": "reranking",
    "InstructionReranking": "instruction_reranking",
    "Classification": "classification",
    "Regression": "classification",
    "MultilabelClassification": "multilabel_classification",
    "Clustering": "clustering",
    "STS": "sts",
    "Summarization": "sts",
    "PairClassification": "pair_classification",
    "BitextMining": "bitext",
}
# One instruction for all tasks of these types, whatever mteb's metadata says.
_FIXED_INSTRUCTION = ("sts", "pair_classification", "bitext")


@dataclass(frozen=True, slots=True)
class Role:
    """How the texts of one call are formatted."""

    side: Side
    task_type: str
    instruction: str | None  # None: the contract's own, or none on a bare document


def role_of(
    metadata: TaskMetadata, prompt_type: PromptType | None, contract: PromptContract, instructed: bool = True
) -> Role:
    """Side, task type and instruction of the texts that mteb hands over.

    Args:
        metadata: of the task.
        prompt_type: query or document; None where both texts play the same part.
        contract: of the model.
        instructed: whether the benchmark's own instructions are wanted.

    Raises:
        DataError: a task type that a text encoder cannot take.
    """
    task_type = task_type_of(metadata)
    side: Side = "document" if prompt_type == PromptType.document else "query"
    if not instructed:
        # A search names no task, as the README's own call does not.
        return Role(side, contract.task_type_of() if task_type == USUAL_TASK else task_type, None)
    if not is_instructed(side, task_type, contract.symmetric_task_types):
        # A foreign model's files say what stands before a document, in every task.
        if metadata.name not in _table()["symmetric"] or contract.document_template is not None:
            return Role("document", task_type, None)
        side = "query"
    return Role(side, task_type, task_instruction(metadata, task_type))


def task_type_of(metadata: TaskMetadata) -> str:
    """Our task type of an mteb task.

    Raises:
        DataError: a type that a text encoder cannot take.
    """
    if metadata.type not in TASK_TYPES:
        raise DataError(
            f"mteb task {metadata.name!r}: type {metadata.type!r} is not supported; "
            f"allowed: {', '.join(sorted(TASK_TYPES))}"
        )
    return TASK_TYPES[metadata.type]


def task_instruction(metadata: TaskMetadata, task_type: str) -> str | None:
    """The task's own instruction, or None for the contract's."""
    if task_type in _FIXED_INSTRUCTION:
        return None
    listed = _table()["instructions"].get(metadata.name)
    if listed:
        return str(listed)
    prompt = metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get(PromptType.query.value)
    return prompt or None


@cache
def _table() -> dict[str, Any]:
    text = resources.files("embedloom.evaluation").joinpath("benchmark_instructions.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content
