"""From the prompts that a model was trained with to the contract that it is exported, merged and served with.

The prompt of most queries becomes the default of its task type; every prompt gets a name, by which a request may ask
for it. So what is served without a word is what was trained most, and nothing that was trained is out of reach.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml

from embedloom.core.prompting import USUAL_TASK, NamedTask, PromptContract, is_instructed
from embedloom.core.schemas import TASK_TYPES
from embedloom.errors import DataError

# Rows may bring an instruction each, thousands of different ones: so many of a task type get a name, the largest shares
# first; the others are counted together.
MAX_TASKS = 16
_MAX_STORED = 1_000  # of one source, in its index and the manifest
_MAX_COUNTED = (
    65_536  # of one source, in memory; a prompt first seen beyond it is counted as one of the others
)
_PROMPT_FIELDS = ("instructions", "document_instructions", "tasks", "default_task")  # of a contract
_DECIMALS = 6  # of a share
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class Prompt:
    """What stood before the texts of some queries and of their documents."""

    task_type: str
    instruction: str
    document_instruction: str  # "": the documents were bare


@dataclass(frozen=True, slots=True)
class TrainedPrompt:
    """A prompt, how many queries were trained with it, and what it is called after."""

    prompt: Prompt
    name: str  # of a source or dataset
    queries: float

    def as_json(self) -> Json:
        """For manifests."""
        return {**asdict(self.prompt), "name": self.name, "queries": self.queries}

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "TrainedPrompt":
        """Out of a manifest."""
        prompt = Prompt(content["task_type"], content["instruction"], content["document_instruction"])
        return cls(prompt, content["name"], float(content["queries"]))


@dataclass(slots=True)
class PromptCounter:
    """Counts the prompts of one source, row by row, in bounded memory."""

    rows: Counter[tuple[Prompt, str]] = field(default_factory=Counter)  # by prompt and dataset
    others: int = 0

    def add(self, prompt: Prompt, dataset: str, rows: int = 1) -> None:
        """Count one row, or several."""
        key = (prompt, dataset)
        if key in self.rows or len(self.rows) < _MAX_COUNTED:
            self.rows[key] += rows
        else:
            self.others += rows

    def as_json(self) -> Json:
        """The most frequent prompts, and how many rows have others."""
        ranked = sorted(self.rows.items(), key=lambda item: (-item[1], item[0]))
        kept = [
            {**asdict(prompt), "dataset": dataset, "rows": rows}
            for (prompt, dataset), rows in ranked[:_MAX_STORED]
        ]
        return {"kept": kept, "others": self.others + sum(rows for _, rows in ranked[_MAX_STORED:])}


def source_prompts(
    counted: Mapping[str, Any], source: str, by_dataset: bool, queries: float
) -> list[TrainedPrompt]:
    """The prompts of a source, each with its part of the queries that were drawn from it.

    Args:
        counted: what ``PromptCounter.as_json`` gave; empty for sources prepared without counting.
        source: name of the source.
        by_dataset: whether prompts are called after their dataset, where they have one.
        queries: drawn from the source in training.
    """
    rows = sum(entry["rows"] for entry in counted.get("kept", ())) + counted.get("others", 0)
    return [
        TrainedPrompt(
            Prompt(entry["task_type"], entry["instruction"], entry["document_instruction"]),
            (entry["dataset"] if by_dataset else "") or source,
            queries * entry["rows"] / rows,
        )
        for entry in counted.get("kept", ())
    ]


def trained_contract(
    contract: PromptContract, trained: Sequence[TrainedPrompt], queries: float
) -> PromptContract:
    """The contract of a model after training.

    Of each task type the prompt of most queries becomes the default, the first by name of equals; ``MAX_TASKS`` prompts
    get a name. A task type that was not trained keeps its instruction, unless that was the same text as a trained
    type's (reranking and retrieval): then it follows it. A text that comes without a task is taken for retrieval, or
    where none was trained for the task type of most queries.

    Args:
        contract: of the model the training began with; where its template has no place for a task, prompts decide
            nothing and it stays as it is.
        trained: prompts of all stages since the base.
        queries: trained in all, with those whose prompts are not listed.
    """
    if "{task}" not in contract.template or not trained:
        return contract
    by_type: dict[str, list[TrainedPrompt]] = defaultdict(list)
    for one in _summed(trained):
        by_type[one.prompt.task_type].append(one)
    weight = {kind: sum(one.queries for one in own) for kind, own in by_type.items()}
    defaults = {kind: own[0].prompt for kind, own in by_type.items()}
    usual = USUAL_TASK if USUAL_TASK in by_type else max(sorted(weight), key=lambda kind: weight[kind])
    return _with_defaults(contract, defaults).model_copy(
        update={
            "tasks": _named(
                [one for kind in sorted(by_type) for one in by_type[kind][:MAX_TASKS]], contract, queries
            ),
            "default_task": None if usual == USUAL_TASK else usual,
        }
    )


def _summed(trained: Iterable[TrainedPrompt]) -> list[TrainedPrompt]:
    """Each prompt once, called after whoever has most of it; most queries first."""
    groups: dict[Prompt, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in trained:
        groups[one.prompt][one.name] += one.queries
    found = [
        TrainedPrompt(prompt, min(names, key=lambda name: (-names[name], name)), float(sum(names.values())))
        for prompt, names in groups.items()
    ]
    # Sums of floats in another order differ in their last digits, which must not decide a tie.
    return sorted(found, key=lambda one: (-round(one.queries, 9), one.name, one.prompt))


def _with_defaults(contract: PromptContract, defaults: Mapping[str, Prompt]) -> PromptContract:
    """The contract with other default prompts of some task types, and of untrained ones that had the same."""
    before = contract.instructions
    followed = {
        kind: candidates.pop()
        for kind in before
        if kind not in defaults
        and len(candidates := {d for d, own in defaults.items() if _alike(contract, kind, d)}) == 1
    }
    chosen = dict(defaults) | {
        kind: replace(defaults[other], task_type=kind) for kind, other in followed.items()
    }
    documents = dict(contract.document_instructions or {})
    for kind, prompt in chosen.items():
        documents.pop(kind, None)
        if (stated := _stated_document(contract, prompt)) is not None:
            documents[kind] = stated
    instructions = {**before, **{kind: prompt.instruction for kind, prompt in chosen.items()}}
    return contract.model_copy(
        update={"instructions": instructions, "document_instructions": documents or None}
    )


def _alike(contract: PromptContract, kind: str, other: str) -> bool:
    """Whether two task types had the same prompts."""
    return other in contract.instructions and all(
        contract.prompt(side, kind) == contract.prompt(side, other) for side in ("query", "document")
    )


def _stated_document(contract: PromptContract, prompt: Prompt) -> str | None:
    """What must be said of a prompt's documents; None where the task type says it."""
    instructed = is_instructed("document", prompt.task_type, contract.symmetric_task_types)
    usual = prompt.instruction if instructed else ""
    return None if prompt.document_instruction == usual else prompt.document_instruction


def _named(
    trained: Sequence[TrainedPrompt], contract: PromptContract, queries: float
) -> dict[str, NamedTask]:
    """Named tasks, the largest shares first to choose a name; a name that is taken gets a number."""
    named: dict[str, NamedTask] = {}
    for one in sorted(trained, key=lambda one: (-round(one.queries, 9), one.name, one.prompt)):
        named[_free_name(one.name, named)] = NamedTask(
            task_type=one.prompt.task_type,
            instruction=one.prompt.instruction,
            document_instruction=_stated_document(contract, one.prompt),
            share=round(one.queries / queries, _DECIMALS),
        )
    return named


def _free_name(wanted: str, taken: Mapping[str, NamedTask]) -> str:
    """The name, or with the first number that makes it another than a task type and all names so far."""
    name, number = wanted, 1
    while name in taken or name in TASK_TYPES:
        number += 1
        name = f"{re.sub(r'-[0-9]+$', '', wanted)}-{number}"
    return name


def merged_contract(
    contracts: Mapping[str, PromptContract], weights: Sequence[float], default: str | None = None
) -> PromptContract:
    """The contract of a merged model: all named tasks, and of each task type the prompt with the largest share.

    A model's share of a prompt counts by the model's weight; one that names no tasks counts whole for its prompt of
    retrieval. Where nothing was trained for a task type, the models' own defaults count, called after the model; of
    equals the first by name wins. What else a contract says is the first model's.

    Args:
        contracts: of the models, by name; alike in all but their prompts.
        weights: of the models; one of zero or less counts nothing, and if none is above, all count alike.
        default: a task that is to be the default of its task type and of texts without a task; None: by share.

    Raises:
        DataError: ``default`` is neither a task type nor the name of a task.
    """
    positive = [max(float(weight), 0.0) for weight in weights]
    if not sum(positive):
        positive = [1.0] * len(positive)
    parts = {name: weight / sum(positive) for name, weight in zip(contracts, positive, strict=True)}
    first = next(iter(contracts.values()))
    contracts = {name: own for name, own in contracts.items() if parts[name] > 0}
    spoken = next(iter(contracts.values()))
    first = first.model_copy(update={name: getattr(spoken, name) for name in _PROMPT_FIELDS})
    trained = [one for name, own in contracts.items() for one in _own_prompts(own, parts[name])]
    if trained:
        trained += [
            TrainedPrompt(_default_prompt(own, USUAL_TASK), name, parts[name])
            for name, own in contracts.items()
            if not own.tasks
        ]
    kinds = {one.prompt.task_type for one in trained}
    for kind in sorted(set(first.instructions) - kinds):
        own = {
            name: _default_prompt(contract, kind)
            for name, contract in contracts.items()
            # What follows a trained task type is no prompt of its own.
            if not any(_alike(contract, kind, other) for other in kinds)
        }
        if len(set(own.values())) > 1:
            trained += [TrainedPrompt(prompt, name, parts[name]) for name, prompt in own.items()]
    return with_default(trained_contract(first, trained, 1.0), default)


def _own_prompts(contract: PromptContract, part: float) -> list[TrainedPrompt]:
    found = []
    for name, task in (contract.tasks or {}).items():
        document = contract.prompt("document", name) or ""
        prompt = Prompt(task.task_type, task.instruction, document)
        found.append(TrainedPrompt(prompt, name, part * (1.0 if task.share is None else task.share)))
    return found


def _default_prompt(contract: PromptContract, kind: str) -> Prompt:
    return Prompt(kind, contract.instruction_for(kind), contract.prompt("document", kind) or "")


def with_default(contract: PromptContract, task: str | None) -> PromptContract:
    """The contract with a task as default of its task type and of texts that come without a task; None: unchanged.

    Raises:
        DataError: neither a task type nor the name of a task.
    """
    if task is None:
        return contract
    if not contract.knows(task):
        raise DataError(f"serving.default_task: {task!r} is unknown; allowed: {contract.known_tasks}")
    kind = contract.task_type_of(task)
    changed = _with_defaults(
        contract,
        {kind: Prompt(kind, contract.instruction_for(task), contract.prompt("document", task) or "")},
    )
    return changed.model_copy(update={"default_task": None if kind == USUAL_TASK else kind})


def check_default(contract: PromptContract, task: str | None, where: str) -> None:
    """Refuse a contract whose default is not the task that the config names.

    Raises:
        DataError: it is not, or there is no such task; the message has both instructions.
    """
    if with_default(contract, task) != contract:
        raise DataError(
            f"serving.default_task: {task!r} has the instruction {contract.instruction_for(task)!r}, but the default of "
            f"{where} is {contract.instruction_for()!r}; merge again, so that it is evaluated and judged as it is served"
        )


def reader_prompts(contract: PromptContract) -> dict[str, str]:
    """What sentence-transformers puts before texts, by prompt name: both sides by default, trained types, named tasks.

    A template that goes on after the text cannot be said in this form; its beginning is.
    """
    prompts = {"query": contract.text_before("query"), "document": contract.text_before("document")}
    named = contract.tasks or {}
    for task in [*named, *sorted({one.task_type for one in named.values()})]:
        prompts[task] = contract.text_before("query", task)
        before = contract.text_before("document", task)
        if before not in ("", prompts[task]):
            prompts[f"{task}-document"] = before
    return prompts


def hub_card(header: Mapping[str, Any], lines: Sequence[str], tags: Sequence[str] = ()) -> str:
    """A model card: the YAML header that the Hub reads, and Markdown.

    Written here and not by ``huggingface_hub.ModelCard``, which orders the header's keys its own way: cards of before
    would change.

    Args:
        header: what it states beside what all our models have in common.
        lines: the Markdown.
        tags: further ones.
    """
    common = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity", *tags, "embedloom"],
    }
    stated = yaml.safe_dump({**common, **header}, sort_keys=False).strip()
    return "\n".join(["---", stated, "---", "", *lines]) + "\n"


def prompt_lines(contract: PromptContract) -> list[str]:
    """What stands before queries, by task, as Markdown table rows: the model card's and ``explain``'s."""
    lines = [
        "| task | task type | instruction of queries | of documents | share | default |",
        "|---|---|---|---|---|---|",
    ]
    named = contract.tasks or {}
    types = {task.task_type for task in named.values()} or set(contract.instructions)
    rows = [
        *named,
        *sorted(types - {task.task_type for name, task in named.items() if contract.is_default(name)}),
    ]
    for name in rows:
        kind = contract.task_type_of(name)
        share = named[name].share if name in named else None
        default = name == kind or contract.is_default(name)
        cells = (
            name, kind, contract.prompt("query", name), contract.prompt("document", name) or "none",
            "" if share is None else f"{100 * share:.4g} %",
            ("of all" if kind == contract.task_type_of() else f"of {kind}") if default else "",
        )  # fmt: skip
        lines.append(
            f"| {' | '.join(' '.join(str(cell).split()).replace('|', chr(92) + '|') for cell in cells)} |"
        )
    return lines
