"""The texts a task will have embedded, listed before any scoring, and the instruction and side each of them gets."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import yaml
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRegression,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType

from embedloom.core.prompting import USUAL_TASK, PromptContract, Side, document_text, is_instructed
from embedloom.errors import DataError
from embedloom.evaluation.jobs import Keys, SentPrompts, text_keys
from embedloom.evaluation.retrieval_task import INSTRUCTION_COLUMN

# Which task, instruction and side a text of an mteb task gets.
#
# By default what the endpoint sends: the contract's own prompts. Where published scores are to be compared with, the
# rules behind llama-embed-nemotron-8b's, in this order: the table of 131 tasks (``benchmark_instructions.yaml``), the prompt in mteb's metadata, the contract's
# own for the task type. STS, pair classification and bitext always take the contract's; documents of retrieval and
# reranking stay bare, except in symmetric tasks such as ArguAna (arXiv 2511.07025 §2 and mteb's wrapper of the model).


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


# What a model will have to embed for a task, known before any scoring: so texts are embedded once, in fixed shards.
#
# Nothing depends on this list being complete: a text that is not on it is embedded when mteb asks for it, and its vector
# is not kept.


# Random draws of these run on from one subset to the next, so mteb must score their subsets in one go.
_SEQUENTIAL = (AbsTaskClustering, AbsTaskMultilabelClassification)
_TEXT = "{text}"
_MOST_PROMPTS = 20  # recorded of one task
_INDEPENDENT = (
    AbsTaskRetrieval, AbsTaskClassification, AbsTaskSTS, AbsTaskPairClassification, AbsTaskBitextMining,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One text in its role."""

    text: str
    side: Side
    instruction: str | None


@dataclass(frozen=True, slots=True)
class TextList:
    """Distinct texts of one subset, in the order mteb asks for them."""

    task_type: str
    entries: list[Entry]
    keys: Keys  # uint64 [texts, 2]


def scoring_subsets(task: AbsTask) -> list[str | None]:
    """The parts of a task that can be scored apart; None stands for the whole task at once."""
    whole = isinstance(task, _SEQUENTIAL) or not isinstance(task, _INDEPENDENT)
    if (whole and len(task.hf_subsets) > 1) or getattr(task, "parallel_subsets", False):
        return [None]
    return list(task.hf_subsets)


def list_texts(
    task: AbsTask, subset: str | None, contract: PromptContract, instructed: bool = True
) -> TextList:
    """The distinct texts of one part of a loaded task.

    Args:
        task: with its data.
        subset: one of ``scoring_subsets``.
        contract: of the model; texts that it formats alike are one text.
        instructed: whether texts get the benchmark's instructions, see ``role_of``.
    """
    entries: list[Entry] = []
    task_type = ""
    for texts, prompt_type, own in _asked(task, task.hf_subsets if subset is None else [subset]):
        role = role_of(task.metadata, prompt_type, contract, instructed)
        task_type = role.task_type
        instructions = (own if instructed else None) or [role.instruction] * len(texts)
        entries += [
            Entry(text, role.side, instruction) for text, instruction in zip(texts, instructions, strict=True)
        ]
    keys = text_keys(
        contract,
        task_type,
        [entry.text for entry in entries],
        [entry.side for entry in entries],
        [entry.instruction for entry in entries],
    )
    _, first = np.unique(keys, axis=0, return_index=True)
    kept = np.sort(first)
    return TextList(task_type, [entries[position] for position in kept], keys[kept])


def sent_prompts(task: AbsTask, contract: PromptContract, instructed: bool) -> SentPrompts:
    """What a model reads before the task's queries; at most ``_MOST_PROMPTS`` different ones are listed.

    Arguments as of ``list_texts``.
    """
    kind = PromptType.query if isinstance(task, AbsTaskRetrieval) else None
    role, usual = (role_of(task.metadata, kind, contract, choice) for choice in (instructed, False))
    own = [role.instruction]
    if instructed and isinstance(task, AbsTaskRetrieval):
        splits = [
            split for part in (task.dataset or {}).values() for split in part.values() if "queries" in split
        ]
        columns = [
            split["queries"] for split in splits if INSTRUCTION_COLUMN in split["queries"].column_names
        ]
        own = sorted({text or None for rows in columns for text in rows[INSTRUCTION_COLUMN]}, key=str) or own
    texts = {contract.format(_TEXT, role.side, role.task_type, instruction) for instruction in own}
    default = contract.format(_TEXT, usual.side, usual.task_type)
    known = {default, *(contract.format(_TEXT, "query", name) for name in contract.tasks or {})}
    # Those that nobody could ask for come first, so that the gate sees them however many there are.
    return SentPrompts(sorted(texts, key=lambda text: (text in known, text))[:_MOST_PROMPTS], default)


Asked = tuple[Sequence[str], PromptType | None, list[str | None] | None]


def _asked(task: AbsTask, subsets: Sequence[str]) -> Iterator[Asked]:
    for subset in subsets:
        dataset = (task.dataset or {}).get(subset, task.dataset)
        for split in task.metadata.eval_splits:
            if isinstance(task, AbsTaskRetrieval):
                yield from _retrieval_texts(dataset[split])
            elif isinstance(task, AbsTaskRegression | AbsTaskMultilabelClassification):
                continue  # mteb draws their samples while it scores
            elif isinstance(task, AbsTaskClassification):
                yield from _classification_texts(task, dataset, split)
            elif isinstance(task, AbsTaskClustering):
                yield from _clustering_texts(task, dataset[split], len(subsets))
            elif isinstance(task, AbsTaskSTS | AbsTaskPairClassification | AbsTaskBitextMining):
                yield from _pair_texts(task, dataset[split])


def _retrieval_texts(data: Any) -> Iterator[Asked]:
    queries = data["queries"]
    judged = {query for query, grades in data["relevant_docs"].items() if grades}
    rows = [row for row in queries if row["id"] in judged and isinstance(row["text"], str)]
    texts = [f"{row['text']} {row['instruction']}" if row.get("instruction") else row["text"] for row in rows]
    own = (
        [row[INSTRUCTION_COLUMN] or None for row in rows]
        if INSTRUCTION_COLUMN in queries.column_names
        else None
    )
    yield texts, PromptType.query, own
    corpus = data["corpus"]
    titles = corpus["title"] if "title" in corpus.column_names else [None] * len(corpus)
    documents = [document_text(title, text) for title, text in zip(titles, corpus["text"], strict=True)]
    yield documents, PromptType.document, None


def _classification_texts(task: AbsTaskClassification, dataset: Any, split: str) -> Iterator[Asked]:
    column = task.input_column_name
    if not isinstance(column, str):
        return
    if not task.is_cross_validation:
        train = dataset[task.train_split]
        order: list[int] | None = None
        drawn: set[int] = set()
        for experiment in range(task.n_experiments):
            _, order, chosen = task._undersample_data(train, experiment, order)
            drawn.update(chosen)
        yield train.select(sorted(drawn))[column], None, None
    yield dataset[split][column], None, None


def _clustering_texts(task: AbsTaskClustering, data: Any, subsets: int) -> Iterator[Asked]:
    column = task.input_column_name
    share, most = task.max_fraction_of_documents_to_embed, task.max_document_to_embed
    if not isinstance(column, str):
        return
    if share is None and most is None:
        yield data[column], None, None
    elif subsets == 1:  # of several, only the first draw could be foreseen
        count = min(len(data), int(share * len(data)) if share is not None else int(most or 0))
        drawn = copy.deepcopy(task.rng_state).sample(range(len(data)), k=count)
        yield data.select(drawn)[column], None, None


def _pair_texts(task: AbsTask, data: Any) -> Iterator[Asked]:
    rows = data[0] if len(data) == 1 and isinstance(task, AbsTaskPairClassification) else data
    roles = {
        column: getattr(task, f"input{number}_prompt_type", None)
        for number, column in enumerate(task._get_content_columns(), start=1)
    }
    for column, prompt_type in roles.items():
        texts = rows[column]
        if len(texts) and isinstance(texts[0], str):
            yield texts, prompt_type, None
